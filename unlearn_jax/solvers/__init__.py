"""Solvers of (A + damping) x = b on pytrees, as values: `cg(rtol=.1, preconditioner=nystrom(rank=50))`.

A solver's name is in lower case, because it is used like a function. Its fields are the settings, and its method `solve` works
inside `jax.jit` and outside. `Solver.takes` names the form of A, which is without the damping.
"""

from unlearn_jax.solvers.base import Info, Solution, Solver, relative_residual
from unlearn_jax.solvers.gradients import datainf, dual
from unlearn_jax.solvers.krylov import Krylov, cg, identity, minres
from unlearn_jax.solvers.preconditioners import Preconditioner, diagonal, ekfac, nystrom
from unlearn_jax.solvers.spectrum import eigenpairs, extremes, fraction_of_largest, lanczos, low_rank_solve
from unlearn_jax.solvers.stochastic import adam_qp, lissa, sgd_qp

SOLVERS: dict[str, type[Solver]] = {
    kind.__name__: kind for kind in (cg, minres, lanczos, lissa, sgd_qp, adam_qp, dual, ekfac, datainf, identity)
}
PRECONDITIONERS: dict[str, type] = {kind.__name__: kind for kind in (nystrom, diagonal, ekfac)}

__all__ = [
    "PRECONDITIONERS",
    "SOLVERS",
    "Info",
    "Krylov",
    "Preconditioner",
    "Solution",
    "Solver",
    "adam_qp",
    "cg",
    "datainf",
    "diagonal",
    "dual",
    "eigenpairs",
    "ekfac",
    "extremes",
    "fraction_of_largest",
    "identity",
    "lanczos",
    "lissa",
    "low_rank_solve",
    "minres",
    "nystrom",
    "relative_residual",
    "sgd_qp",
]
