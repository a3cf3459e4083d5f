"""What products and solves cost beside other implementations of them, and what an edit costs beside retraining."""

RTOL, MOST_STEPS = 1e-3, 400  # of the solvers that iterate: ours, and those of other libraries
