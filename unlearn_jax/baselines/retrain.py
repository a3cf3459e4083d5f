"""Training on the data as it should have been: from scratch, from the trained adapter, or for as long as one can afford."""

from collections.abc import Callable, Sequence
from typing import Any

from jax.tree_util import Partial

from unlearn_jax import tree
from unlearn_jax.baselines.training import Trained, Training, descend, retained
from unlearn_jax.dataset import Dataset
from unlearn_jax.edits import Edit, apply
from unlearn_jax.lbfgs import lbfgs
from unlearn_jax.loss import Params
from unlearn_jax.objective import Objective


def retrain(loss: Callable, start: Params, dataset: Any, edits: Sequence[Edit], training: Training) -> Trained:
    """Mini-batch descent of the edited objective.

    From a fresh adapter it is retraining, from the trained one a warm restart; at the price of an edit it is fine-tuning on
    the edited data, the baseline that costs no thought.
    """
    after = apply(Dataset.of(dataset), edits, loss)
    return descend([retained(loss, start, after, training)], start, training)


def converge(
    objective: Objective,
    start: Params,
    *,
    tolerance: float = 1e-5,
    max_steps: int = 1000,
    budget: float = float("inf"),
    log: Callable[[int, float, float], None] = lambda step, value, norm: None,
) -> tuple[Trained, float]:
    """(minimiser from `start`, norm of the gradient there), by `lbfgs` within a budget of example-gradients."""
    value, evaluations = Partial(Objective.value, objective), budget / objective.count
    found = lbfgs(value, start, tolerance=tolerance, max_evaluations=evaluations, max_steps=max_steps, log=log)
    norm = float(tree.norm(objective.gradient(found.params)))
    return Trained(found.params, float(found.evaluations * objective.count), found.values), norm
