"""Benchmarks: products and solves compared with other implementations, and an edit compared with retraining."""

RTOL, MOST_STEPS = 1e-3, 400  # of iterative solvers, here and in other libraries
