"""What else could be done: retraining, and the first-order methods of the field, on the same loss, dataset and edits.

    training = Training(optax.adam(1e-4), budget=20_000, weight_decay=1e-3)
    npo(loss, adapter, dataset, [Remove([3, 7])], training).adapter

All of them take the same arguments first, and return a `Trained`:

    loss      as of `unlearn_jax.erase`
    adapter   where they start: the trained adapter, of `retrain` any
    dataset   what it was trained on
    edits     as of `erase`
    training  how they descend, and for how many example-gradients

Methods that drive examples away take for these the old form of whatever the edits remove or replace, and of `MaskTokens` the
elements that it masks.
"""

from unlearn_jax.baselines.forgetting import grad_diff, gradient_ascent, npo, rmu, simnpo
from unlearn_jax.baselines.pbrf import pbrf
from unlearn_jax.baselines.retraining import Sisa, converge, ensemble, retrain
from unlearn_jax.baselines.training import Trained, Training

__all__ = [
    "Sisa",
    "Trained",
    "Training",
    "converge",
    "ensemble",
    "grad_diff",
    "gradient_ascent",
    "npo",
    "pbrf",
    "retrain",
    "rmu",
    "simnpo",
]
