"""Training on the data as it should have been: from scratch, from the trained adapter, or for as long as one can afford."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unlearn_jax.baselines.training import Trained, Training, descend, retained
from unlearn_jax.dataset import Dataset
from unlearn_jax.edits import Edit, apply
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
    memory: int = 20,
    log: Callable[[int, float, float], None] = lambda step, value, norm: None,
) -> tuple[Trained, float]:
    """(minimiser from `start`, norm of the gradient there), by L-BFGS on the whole objective: the reference to compare with.

    `log(step, value, norm)` is called after every step. Stops at the tolerance on the gradient's norm, where the line search
    finds no way down any more, or when the budget of example-gradients is spent.
    """
    params, state, values, evaluations = start, _lbfgs_start(memory, start), [], 1
    for step in range(max_steps):
        value, norm, moved, found, after = _lbfgs_step(memory, objective, params, state)
        values.append(float(value))
        log(step + 1, values[-1], float(norm))
        if norm <= tolerance or not moved > 0:
            break
        evaluations += int(after[-1].info.num_linesearch_steps)
        if evaluations * objective.count > budget:
            evaluations -= int(after[-1].info.num_linesearch_steps)
            break
        params, state = found, after
    norm = float(optax.tree.norm(objective.gradient(params)))
    return Trained(params, float(evaluations * objective.count), np.array(values)), norm


@functools.partial(jax.jit, static_argnums=0, keep_unused=True)
def _lbfgs_start(memory, params):
    """Bound to a device or a mesh where `params` are (hence `keep_unused`); otherwise a step would be compiled twice."""
    return strong(optax.lbfgs(memory_size=memory).init(params))


@functools.partial(jax.jit, static_argnums=0)
def _lbfgs_step(memory, objective, params, state):
    value, gradient = optax.value_and_grad_from_state(objective.value)(params, state=state)
    updates, state = optax.lbfgs(memory_size=memory).update(
        gradient, state, params, value=value, grad=gradient, value_fn=objective.value
    )
    norm, moved = optax.tree.norm(gradient), optax.tree.norm(updates)
    return value, norm, moved, optax.apply_updates(params, updates), strong(state)


def strong(tree: Any) -> Any:
    """With no weakly typed arrays, which would make a second program of the same step."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.asarray(x).dtype), tree)
