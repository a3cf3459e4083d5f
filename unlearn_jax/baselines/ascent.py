"""Gradient ascent on what should be forgotten, alone and against descent on the rest (open-unlearning's definitions)."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from jax.tree_util import Partial

from unlearn_jax.baselines.divergence import divergence
from unlearn_jax.baselines.training import Term, Trained, Training, descend, forgotten, retained, split
from unlearn_jax.edits import Edit
from unlearn_jax.loss import Params, require_parts
from unlearn_jax.objective import FORWARD, coefficients


def gradient_ascent(
    loss: Callable, adapter: Params, dataset: Any, edits: Sequence[Edit], training: Training
) -> Trained:
    """Ascends the mean loss of the forgotten examples. It has no minimum; only the budget stops it."""
    forget = forgotten(split(loss, dataset, edits).forget, edits)
    term = Term(loss, forget, coefficients(loss, adapter, forget, training.reduction), scale=-1.0)
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
    """gamma * (-mean loss of the forgotten) + alpha * retain term.

    retain: the edited objective itself (GradDiff), or the divergence from the trained model on its examples (TOFU's KL).
    """
    data = split(loss, dataset, edits)
    forget = forgotten(data.forget, edits)
    away = Term(loss, forget, coefficients(loss, adapter, forget, training.reduction), scale=-gamma)
    return descend([away, retain_term(loss, adapter, data.after, training, alpha, retain)], adapter, training)


def retain_term(loss, adapter, after, training, alpha, retain) -> Term:
    term = retained(loss, adapter, after, training, scale=alpha)
    if retain == "loss":
        return term
    if retain != "kl":
        raise ValueError(f"retain must be 'loss' or 'kl', got {retain!r}")
    kl = Partial(divergence, require_parts(loss, "retaining by divergence"), adapter)
    return Term(kl, after, term.coefficients, scale=alpha, cost=1 + FORWARD)
