"""Methods that raise the loss of forgotten examples (ascent, negative preference, misdirection), with a retain term."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from unlearn_jax.arrays import Example, Params
from unlearn_jax.baselines.pbrf import divergence
from unlearn_jax.baselines.training import LossTerm, Trained, Training, descend, forgotten, retained, split
from unlearn_jax.edits import Edit
from unlearn_jax.loss import Loss, require_parts, sum_and_weight
from unlearn_jax.objective import FORWARD, coefficients


def gradient_ascent(
    loss: Callable, adapter: Params, dataset: Any, edits: Sequence[Edit], training: Training
) -> Trained:
    """Ascends the mean loss of the forgotten examples. It has no minimum; only the budget stops it."""
    forget = forgotten(split(loss, dataset, edits).forget, edits)
    term = LossTerm(loss, forget, coefficients(loss, adapter, forget, training.reduction), scale=-1.0)
    return descend([term], adapter, training)


def grad_diff(
    loss: Callable,
    adapter: Params,
    dataset: Any,
    edits: Sequence[Edit],
    training: Training,
    *,
    gamma: float = 1.0,
    alpha: float = 1.0,
    retain: Literal["loss", "kl"] = "loss",
) -> Trained:
    """Minimises gamma * (-mean loss of the forgotten) + alpha * retain term.

    The retain term is the edited objective ("loss": GradDiff) or the divergence from the trained model on its examples ("kl":
    TOFU's KL).
    """
    data = split(loss, dataset, edits)
    forget = forgotten(data.forget, edits)
    away = LossTerm(loss, forget, coefficients(loss, adapter, forget, training.reduction), scale=-gamma)
    return descend([away, retain_term(loss, adapter, data.after, training, alpha, retain)], adapter, training)


def retain_term(loss, adapter, after, training, alpha, retain) -> LossTerm:
    """The term for the kept examples: the loss of the training, or the divergence from the trained model."""
    term = retained(loss, adapter, after, training, scale=alpha)
    if retain == "loss":
        return term
    if retain != "kl":
        raise ValueError(f"retain must be 'loss' or 'kl', got {retain!r}")
    kl = Partial(divergence, require_parts(loss, "retaining by divergence"), adapter)
    return LossTerm(kl, after, term.coefficients, scale=alpha, cost=1 + FORWARD)


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

    Its term is gamma * mean -(2 / beta) log sigmoid(beta (L - L_ref)) over the forgotten, with L the summed loss of an answer. As
    beta goes to zero its gradient becomes that of gradient ascent on L.
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
    """NPO without a reference model (Fan et al. 2024, arXiv:2410.07163): the mean loss of an answer less `delta`."""
    away = Partial(simnpo_loss, loss, _positive(beta), jnp.asarray(delta))
    return _prefer(away, 1.0, loss, adapter, dataset, edits, training, gamma, alpha, retain)


def npo_loss(loss: Callable, reference: Params, beta: jax.Array, params: Params, example: Example) -> jax.Array:
    """The loss of one example under NPO, []."""
    total, _ = sum_and_weight(loss, params, example)
    before, _ = sum_and_weight(loss, reference, example)
    return -2 / beta * jax.nn.log_sigmoid(beta * (total - jax.lax.stop_gradient(before)))


def simnpo_loss(loss: Callable, beta: jax.Array, delta: jax.Array, params: Params, example: Example) -> jax.Array:
    """The loss of one example under SimNPO, []."""
    total, weight = sum_and_weight(loss, params, example)
    return -2 / beta * jax.nn.log_sigmoid(beta * (total / weight - delta))


def _prefer(away, cost, loss, adapter, dataset, edits, training, gamma, alpha, retain):
    data = split(loss, dataset, edits)
    forget = forgotten(data.forget, edits)
    weights = np.asarray(forget.weights) / forget.weights.sum()
    terms = [
        LossTerm(away, forget, weights, scale=gamma, cost=cost),
        retain_term(loss, adapter, data.after, training, alpha, retain),
    ]
    return descend(terms, adapter, training)


def _positive(beta: float) -> jax.Array:
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    return jnp.asarray(beta)


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
    """Minimises gamma |h - c u|^2 on the forgotten + alpha |h - h_ref|^2 on the rest, means over elements and width.

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
        LossTerm(Partial(misdirected, loss, activations, target), forget, even(forget), scale=gamma),
        LossTerm(
            Partial(kept, loss, activations, adapter), data.after, even(data.after), scale=alpha, cost=1 + FORWARD
        ),
    ]
    return descend(terms, adapter, training)


def misdirected(
    loss: Callable, activations: Callable, target: jax.Array, params: Params, example: Example
) -> jax.Array:
    """Squared distance [] of an example's activations from the target."""
    return _mean_square(loss, example, activations(params, example) - target)


def kept(loss: Callable, activations: Callable, reference: Params, params: Params, example: Example) -> jax.Array:
    """Squared distance [] of an example's activations from those of the reference."""
    fixed = jax.lax.stop_gradient(activations(reference, example))
    return _mean_square(loss, example, activations(params, example) - fixed)


def _mean_square(loss, example, difference):
    square = jnp.square(difference).mean(axis=-1)
    mask = loss.element_mask(example) if isinstance(loss, Loss) else None
    return square.mean() if mask is None else jnp.sum(jnp.where(mask != 0, mask * square, 0)) / mask.sum()
