"""Negative preference: forgetting as the answer that is not preferred."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from unlearn_jax.baselines.ascent import retain_term
from unlearn_jax.baselines.training import Term, Trained, Training, descend, forgotten, split
from unlearn_jax.edits import Edit
from unlearn_jax.loss import Example, Params, sum_and_weight
from unlearn_jax.objective import FORWARD


def npo(
    loss: Callable,
    adapter: Params,
    dataset: Any,
    edits: Sequence[Edit],
    training: Training,
    *,
    beta: float = 0.1,
    gamma: float = 1.0,
    alpha: float = 1.0,
    retain: Literal["loss", "kl"] = "loss",
) -> Trained:
    """Negative preference optimisation (Zhang et al. 2024, arXiv:2404.05868) with a retain term.

    gamma * mean -(2 / beta) log sigmoid(beta (L - L_ref)) over the forgotten, L the summed loss of an answer. As beta goes
    to zero its gradient becomes that of gradient ascent on L.
    """
    away = Partial(npo_loss, loss, adapter, _positive(beta))
    return _prefer(away, 1 + FORWARD, loss, adapter, dataset, edits, training, gamma, alpha, retain)


def simnpo(
    loss: Callable,
    adapter: Params,
    dataset: Any,
    edits: Sequence[Edit],
    training: Training,
    *,
    beta: float = 4.5,
    delta: float = 0.0,
    gamma: float = 0.125,
    alpha: float = 1.0,
    retain: Literal["loss", "kl"] = "loss",
) -> Trained:
    """The same without reference model (Fan et al. 2024, arXiv:2410.07163): the mean loss of an answer less `delta`."""
    away = Partial(simnpo_loss, loss, _positive(beta), jnp.asarray(delta))
    return _prefer(away, 1.0, loss, adapter, dataset, edits, training, gamma, alpha, retain)


def npo_loss(loss: Callable, reference: Params, beta: jax.Array, params: Params, example: Example) -> jax.Array:
    total, _ = sum_and_weight(loss, params, example)
    before, _ = sum_and_weight(loss, reference, example)
    return -2 / beta * jax.nn.log_sigmoid(beta * (total - jax.lax.stop_gradient(before)))


def simnpo_loss(loss: Callable, beta: jax.Array, delta: jax.Array, params: Params, example: Example) -> jax.Array:
    total, weight = sum_and_weight(loss, params, example)
    return -2 / beta * jax.nn.log_sigmoid(beta * (total / weight - delta))


def _prefer(away, cost, loss, adapter, dataset, edits, training, gamma, alpha, retain):
    data = split(loss, dataset, edits)
    forget = forgotten(data.forget, edits)
    weights = np.asarray(forget.weights) / forget.weights.sum()
    terms = [
        Term(away, forget, weights, scale=gamma, cost=cost),
        retain_term(loss, adapter, data.after, training, alpha, retain),
    ]
    return descend(terms, adapter, training)


def _positive(beta: float) -> jax.Array:
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    return jnp.asarray(beta)
