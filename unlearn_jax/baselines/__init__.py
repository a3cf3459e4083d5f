"""Baselines for an edit: retraining and first-order methods, on the same loss, dataset and edits.

    training = Training(optax.adam(1e-4), budget=20_000, weight_decay=1e-3)
    npo(loss, adapter, dataset, [Remove([3, 7])], training).adapter

All of them take the same arguments first, and return a `Trained`:

    loss      as of `unlearn_jax.erase`
    adapter   the start: the trained adapter, for `retrain` any
    dataset   the data that it was trained on
    edits     as of `erase`
    training  the optimizer and the number of example-gradients

The forgotten examples of the other methods are the old forms of all examples that the edits remove or replace, and for
`MaskTokens` the elements that it masks.
"""

from unlearn_jax.baselines.e2urec import e2urec
from unlearn_jax.baselines.forgetting import grad_diff, gradient_ascent, npo, rmu, simnpo
from unlearn_jax.baselines.pbrf import pbrf
from unlearn_jax.baselines.retraining import Sisa, converge, ensemble, retrain
from unlearn_jax.baselines.training import Trained, Training

__all__ = [
    "Sisa",
    "Trained",
    "Training",
    "converge",
    "e2urec",
    "ensemble",
    "grad_diff",
    "gradient_ascent",
    "npo",
    "pbrf",
    "retrain",
    "rmu",
    "simnpo",
]
