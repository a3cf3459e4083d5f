"""L-BFGS on a whole objective, with optax's zoom line search: from any start to a minimum, gradients only."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unlearn_jax.loss import Params


class Minimum(NamedTuple):
    """What `lbfgs` returns."""

    params: Params
    values: np.ndarray  # float [steps], before each step
    gradient: float  # norm, of the last step
    evaluations: int  # of the value and its gradient


def lbfgs(
    value: Callable[[Params], jax.Array],
    start: Params,
    *,
    tolerance: float,
    max_evaluations: float = float("inf"),
    max_steps: float = float("inf"),
    memory: int = 20,
    log: Callable[[int, float, float], None] = lambda step, value, norm: None,
) -> Minimum:
    """Descends `value` from `start` (Liu and Nocedal 1989).

    value:  params -> []; a pytree (a `jax.tree_util.Partial`), so that one compiled step serves all of its arrays
    log:    `log(step, value, norm of the gradient)`, called in every step

    Stops at the tolerance on the gradient's norm, where the line search finds no way down any more, or before a step that
    would exceed a limit.
    """
    params, state, values, evaluations, norm = start, _start(memory, start), [], 1, jnp.inf
    while len(values) < max_steps:
        before, norm, moved, found, after = _step(memory, value, params, state)
        values.append(float(before))
        log(len(values), values[-1], float(norm))
        spent = evaluations + int(after[-1].info.num_linesearch_steps)
        if norm <= tolerance or not moved > 0 or spent > max_evaluations:
            break
        params, state, evaluations = found, after, spent
    return Minimum(params, np.array(values), float(norm), evaluations)


@functools.partial(jax.jit, static_argnums=0, keep_unused=True)
def _start(memory, params):
    """Bound to a device or a mesh where `params` are (hence `keep_unused`); otherwise a step would be compiled twice."""
    return _strong(optax.lbfgs(memory_size=memory).init(params))


@functools.partial(jax.jit, static_argnums=0)
def _step(memory, value_of, params, state):
    value, gradient = optax.value_and_grad_from_state(value_of)(params, state=state)
    updates, state = optax.lbfgs(memory_size=memory).update(
        gradient, state, params, value=value, grad=gradient, value_fn=value_of
    )
    norm, moved = optax.tree.norm(gradient), optax.tree.norm(updates)
    return value, norm, moved, optax.apply_updates(params, updates), _strong(state)


def _strong(tree: Any) -> Any:
    """With no weakly typed arrays, which would make a second program of the same step."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.asarray(x).dtype), tree)
