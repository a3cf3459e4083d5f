"""Solvers of (A + damping) x = b on pytrees: curvature comes in as products or as per-example gradients.

All of them return (x, Info) and can be jitted. `matvec(v) -> A v` (for `lissa`, `sgd_qp`, `adam_qp`
`matvec(v, k) -> A_k v`) is without the damping. Preconditioners are callable pytrees, so they can pass through `jax.jit`
as arguments.
"""

from unlearn_jax.solvers.cg import cg
from unlearn_jax.solvers.damping import fraction_of_largest
from unlearn_jax.solvers.datainf import datainf
from unlearn_jax.solvers.diagonal import diagonal
from unlearn_jax.solvers.ekfac import ekfac
from unlearn_jax.solvers.identity import identity
from unlearn_jax.solvers.krylov import Krylov
from unlearn_jax.solvers.lanczos import eigenpairs, extremes, lanczos, low_rank_solve
from unlearn_jax.solvers.lissa import lissa
from unlearn_jax.solvers.minres import minres
from unlearn_jax.solvers.nystrom import nystrom
from unlearn_jax.solvers.qp import adam_qp, quadratic_program, sgd_qp
from unlearn_jax.solvers.system import Info, relative_residual
from unlearn_jax.solvers.woodbury import dual

__all__ = [
    "Info",
    "Krylov",
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
    "quadratic_program",
    "relative_residual",
    "sgd_qp",
]
