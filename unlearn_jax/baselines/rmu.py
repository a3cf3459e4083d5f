"""Representation misdirection (Li et al. 2024, arXiv:2403.03218): forget by scrambling what a layer says."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from unlearn_jax.baselines.training import Term, Trained, Training, descend, forgotten, split
from unlearn_jax.edits import Edit
from unlearn_jax.loss import Example, Loss, Params
from unlearn_jax.objective import FORWARD


def rmu(
    loss: Callable,
    adapter: Params,
    dataset: Any,
    edits: Sequence[Edit],
    training: Training,
    *,
    activations: Callable[[Params, Example], jax.Array],
    coefficient: float = 2.0,
    gamma: float = 1.0,
    alpha: float = 1.0,
) -> Trained:
    """gamma |h - c u|^2 on the forgotten + alpha |h - h_ref|^2 on the rest, means over elements and width.

    activations: (params, example) -> [elements, width], the output of a layer (open-unlearning takes the seventh); the mask
                 of `loss` says which elements count
    coefficient: c, the length of the target; u is a unit vector of uniform random coordinates
    """
    data = split(loss, dataset, edits)
    forget = forgotten(data.forget, edits)
    width = jax.eval_shape(activations, adapter, data.before.example(0)).shape[-1]
    u = np.random.default_rng(training.seed).random(width)
    target = jnp.asarray(coefficient * u / np.linalg.norm(u), jnp.float32)
    even = lambda data: np.asarray(data.weights) / data.weights.sum()
    terms = [
        Term(Partial(misdirected, loss, activations, target), forget, even(forget), scale=gamma),
        Term(Partial(kept, loss, activations, adapter), data.after, even(data.after), scale=alpha, cost=1 + FORWARD),
    ]
    return descend(terms, adapter, training)


def misdirected(
    loss: Callable, activations: Callable, target: jax.Array, params: Params, example: Example
) -> jax.Array:
    return _mean_square(loss, example, activations(params, example) - target)


def kept(loss: Callable, activations: Callable, reference: Params, params: Params, example: Example) -> jax.Array:
    fixed = jax.lax.stop_gradient(activations(reference, example))
    return _mean_square(loss, example, activations(params, example) - fixed)


def _mean_square(loss, example, difference):
    square = jnp.square(difference).mean(axis=-1)
    mask = loss.element_mask(example) if isinstance(loss, Loss) else None
    return square.mean() if mask is None else jnp.sum(jnp.where(mask != 0, mask * square, 0)) / mask.sum()
