"""Edits of an adapter after which chosen training examples no longer count, or count as corrected.

    erasure = unlearn_jax.erase(loss, adapter, dataset, [unlearn_jax.Remove([3, 7])])

It knows nothing of models: a loss, a pytree of parameters and examples are all it needs.
"""

from unlearn_jax.config import ErasureConfig
from unlearn_jax.curvature import fvp, ggnvp, hvp
from unlearn_jax.dataset import Dataset
from unlearn_jax.edits import CorrectResponse, MaskTokens, ModifyQuery, Remove, apply
from unlearn_jax.erase import Erasure, erase
from unlearn_jax.loss import CrossEntropy, Loss, SquaredError
from unlearn_jax.solvers import (
    adam_qp,
    cg,
    datainf,
    diagonal,
    dual,
    ekfac,
    identity,
    lanczos,
    lissa,
    minres,
    nystrom,
    sgd_qp,
)

__all__ = [
    "CorrectResponse",
    "CrossEntropy",
    "Dataset",
    "Erasure",
    "ErasureConfig",
    "Loss",
    "MaskTokens",
    "ModifyQuery",
    "Remove",
    "SquaredError",
    "adam_qp",
    "apply",
    "cg",
    "datainf",
    "diagonal",
    "dual",
    "ekfac",
    "erase",
    "fvp",
    "ggnvp",
    "hvp",
    "identity",
    "lanczos",
    "lissa",
    "minres",
    "nystrom",
    "sgd_qp",
]
