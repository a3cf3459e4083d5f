"""L-BFGS on a whole objective, with optax's zoom line search; it uses gradients only."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unlearn_jax import tree
from unlearn_jax.arrays import Params

PATIENCE = 10  # steps


class Minimum(NamedTuple):
    """The result of `lbfgs`."""

    params: Params
    values: np.ndarray  # float [steps], before each step
    value: float  # at params
    gradient: float  # norm of the gradient at params
    evaluations: int  # of the value and its gradient
    ends: tuple[Params, Params]  # gradients at the start and at params


class Known(NamedTuple):
    """Curvature that is known before the first step."""

    origin: Params  # a point other than the start
    gradient: Params  # of the value at the origin
    pairs: list[tuple[Params, Params]]  # (v, value'' v); pairs without positive curvature are not used


def lbfgs(
    value: Callable[[Params], jax.Array],
    start: Params,
    *,
    tolerance: float,
    max_evaluations: float = float("inf"),
    max_steps: float = float("inf"),
    memory: int = 20,
    known: Known | None = None,
    resolution: float = 0.0,
    log: Callable[[int, float, float], None] = lambda step, value, norm: None,
) -> Minimum:
    """Descends `value` from `start` (Liu and Nocedal 1989).

    It stops when the gradient's norm reaches the tolerance, when the line search finds no decrease, or before a step that would
    exceed a limit. With `known` the first step has the length of a Newton step instead of that of the gradient.

    Args:
        value: params -> []; a pytree (a `jax.tree_util.Partial`), so that one compiled step serves all of its arrays.
        start: a pytree of parameters.
        tolerance: of the gradient's norm.
        max_evaluations: of the value and its gradient, at most.
        max_steps: the most steps.
        memory: pairs of steps and changes of the gradient that are kept.
        known: curvature that is known before the first step.
        resolution: differences of the value below it are rounding error.
        log: `log(step, value, norm of the gradient)`, called in every step.
    """
    params, state, values, evaluations, norm = start, _start(memory, start), [], 1, jnp.inf
    if known is not None:
        state = (_seeded(state[0], known, memory), *state[1:])
    ends, value_there, norms = None, None, []
    while len(values) < max_steps and (evaluations < max_evaluations or not values):
        before, norm, moved, stepped, after = _step(memory, value, params, state)
        values.append(float(before))
        log(len(values), values[-1], float(norm))
        spent = evaluations + int(after[-1].info.num_linesearch_steps)
        if known is not None and len(values) == 1 and norm > tolerance and not after[-1].value < before:
            # The known pairs give no descent direction: the curvature between origin and start was negative, or a pair is wrong.
            state, known, values, evaluations = _start(memory, start), None, [], spent + 1
            continue
        if ends is None:
            ends, value_there = (after[0].updates, after[0].updates), before
        if norm <= tolerance or not moved > 0 or spent > max_evaluations:
            break
        params, state, evaluations, norm = stepped, after, spent, _norm(after[-1].grad)
        ends, value_there = (ends[0], after[-1].grad), after[-1].value
        norms.append(float(norm))
        if norm <= tolerance or _stands_still(values, norms, resolution):
            break
    assert ends is not None and value_there is not None  # there was a step
    return Minimum(params, np.array(values), float(value_there), float(norm), evaluations, ends)


_norm = jax.jit(tree.norm)


def _stands_still(values: list[float], norms: list[float], resolution: float) -> bool:
    """Whether in `PATIENCE` steps the value fell by no more than rounding and the gradient was not halved."""
    if not resolution or len(values) <= PATIENCE:
        return False
    return values[-PATIENCE] - values[-1] <= resolution and min(norms[-PATIENCE:]) > 0.5 * min(norms[:-PATIENCE])


def _seeded(state: Any, known: Known, memory: int) -> Any:
    """The state of optax's L-BFGS after steps along the known pairs; its next pair is that from the origin to the start."""
    bends = [float(tree.vdot(s, y)) for s, y in known.pairs]
    positive = [(s, y, 1 / bend) for (s, y), bend in zip(known.pairs, bends, strict=True) if bend > 0][: memory - 1]
    steps, changes, weights = state.diff_params_memory, state.diff_updates_memory, state.weights_memory

    def put(stack, i, x):
        return jax.tree.map(lambda stack, x: stack.at[i].set(x.astype(stack.dtype)), stack, x)

    for i, (s, y, weight) in enumerate(positive):
        steps, changes, weights = put(steps, i, s), put(changes, i, y), weights.at[i].set(weight)
    return state._replace(
        count=jnp.asarray(len(positive) + 1, state.count.dtype),
        params=tree.cast_like(known.origin, state.params),
        updates=tree.cast_like(known.gradient, state.updates),
        diff_params_memory=steps,
        diff_updates_memory=changes,
        weights_memory=weights,
    )


@functools.partial(jax.jit, static_argnums=0, keep_unused=True)
def _start(memory, params):
    """Bound to a device or a mesh where `params` are (hence `keep_unused`); otherwise a step would be compiled twice."""
    import optax  # here, so that `import unlearn_jax` needs jax and numpy only

    return _strong(optax.lbfgs(memory_size=memory).init(params))


@functools.partial(jax.jit, static_argnums=0)
def _step(memory, value_of, params, state):
    import optax

    value, gradient = optax.value_and_grad_from_state(value_of)(params, state=state)
    updates, state = optax.lbfgs(memory_size=memory).update(
        gradient, state, params, value=value, grad=gradient, value_fn=value_of
    )
    norm, moved = tree.norm(gradient), tree.norm(updates)
    return value, norm, moved, optax.apply_updates(params, updates), _strong(state)


def _strong(tree: Any) -> Any:
    """The tree without weakly typed arrays, for which the same step would be compiled a second time."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.asarray(x).dtype), tree)
