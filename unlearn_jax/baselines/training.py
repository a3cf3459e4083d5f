"""First-order training within a budget: every baseline minimises a sum of terms over examples in mini-batches.

The unit of the budget is an example-gradient, one example forward and backward. A forward pass alone, such as that of a
reference model, is a third of one.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unlearn_jax import tree
from unlearn_jax.arrays import Params
from unlearn_jax.dataset import Dataset
from unlearn_jax.edits import Edit, affected, apply
from unlearn_jax.loss import Loss, has_field
from unlearn_jax.objective import Objective, Reduction, coefficients

if TYPE_CHECKING:
    import optax


@dataclasses.dataclass(frozen=True)
class Training:
    """The settings of a baseline's training, and those of the adapter's (`reduction`, `weight_decay`: see `Objective`)."""

    optimizer: "optax.GradientTransformation"
    budget: float  # example-gradients
    batch: int = 32  # examples of each term and step; a term with fewer takes all of them
    micro_batch: int | None = None  # examples that are computed at a time; None: the whole batch
    seed: int = 0
    reduction: Reduction = "per_example"
    weight_decay: float = 0.0

    def __post_init__(self):
        if self.batch < 1 or not self.budget > 0:
            raise ValueError(f"batch {self.batch} and budget {self.budget} must be positive")


class Trained(NamedTuple):
    """The result of a training."""

    adapter: Params
    gradients: float  # example-gradients spent
    values: np.ndarray  # float [steps], the minimised value before each step, on that step's batch


@dataclasses.dataclass(frozen=True)
class LossTerm:
    """`scale * sum_i coefficient_i * loss(params, example_i)` over a dataset, plus scale * weight_decay / 2 |params|^2.

    With `extra` (arrays [n, ...]) the loss sees pairs (example, extra).
    """

    loss: Callable
    dataset: Dataset
    coefficients: np.ndarray  # float64 [n]
    scale: float = 1.0
    cost: float = 1.0  # example-gradients of one evaluation
    weight_decay: float = 0.0
    extra: Any = None

    def objective(self, positions: np.ndarray, micro_batch: int | None) -> Objective:
        """An unbiased estimate of the term from some of its examples, without the scale."""
        examples = self.dataset.take(positions)
        if self.extra is not None:
            examples = (examples, jax.tree.map(lambda x: x[positions], self.extra))
        share = self.coefficients[positions] * len(self.dataset) / len(positions)
        return Objective.of(self.loss, examples, share, weight_decay=self.weight_decay, micro_batch=micro_batch)


def descend(terms: Sequence[LossTerm], start: Params, training: Training, *, proximal: float = 0.0) -> Trained:
    """Minimises the sum of the terms and proximal / 2 |params - start|^2 in mini-batches until the budget is spent.

    Args:
        terms: the summands.
        start: a pytree of parameters.
        training: the optimizer, the budget and the sizes of batches.
        proximal: weight of the distance from `start`.

    Returns:
        The last parameters, the cost and the values.

    Raises:
        ValueError: the budget is less than a step costs.
        FloatingPointError: a value or a parameter is not finite.
    """
    sizes = [min(training.batch, len(term.dataset)) for term in terms]
    cost = sum(size * term.cost for size, term in zip(sizes, terms, strict=True))
    steps = int(training.budget / cost + 1e-6)
    if not steps:
        raise ValueError(f"one step costs {cost:g} example-gradients, the budget is {training.budget:g}")
    streams = [
        batches(len(term.dataset), size, np.random.default_rng((training.seed, number)))
        for number, (term, size) in enumerate(zip(terms, sizes, strict=True))
    ]
    scales = jnp.array([term.scale for term in terms])
    params, state, values = start, training.optimizer.init(start), []
    for _ in range(steps):
        objectives = [t.objective(next(s), training.micro_batch) for t, s in zip(terms, streams, strict=True)]
        value, gradient = _combined(objectives, scales, proximal, start, params)
        params, state = _updated(training.optimizer, params, state, gradient)
        values.append(value)
    values = np.array([float(value) for value in values])
    broken = np.flatnonzero(~np.isfinite(values))
    if broken.size or not all(np.isfinite(x).all() for x in jax.tree.leaves(params)):
        step = broken[0] if broken.size else steps
        raise FloatingPointError(f"not finite after {step} of {steps} steps: the learning rate is too large")
    return Trained(params, steps * cost, values)


@functools.partial(jax.jit, static_argnums=0)
def _updated(optimizer: Any, params: Params, state: Any, gradient: Params) -> tuple[Params, Any]:
    """A step of an optimizer, which is compiled once for each optimizer (a value) and shape."""
    updates, state = optimizer.update(gradient, state, params)
    return tree.cast_like(tree.add(params, updates), params), state


@jax.jit
def _combined(objectives, scales, proximal, start, params):
    total = 0.0
    gradient = jax.tree.map(lambda p, s: proximal * (p - s), params, start)
    value = 0.5 * proximal * tree.squared_norm(jax.tree.map(jnp.subtract, params, start))
    for objective, scale in zip(objectives, scales, strict=True):
        part, slope = objective.value_and_gradient(params)
        total += scale * part
        gradient = jax.tree.map(lambda g, s, w=scale: (g + w * s).astype(g.dtype), gradient, slope)
    return total + value, gradient


def batches(count: int, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yields positions int [size] endlessly, from one shuffled pass over `count` examples after the other."""
    queue = np.arange(0)
    while True:
        while len(queue) < size:
            queue = np.concatenate([queue, rng.permutation(count)])
        yield np.sort(queue[:size])
        queue = queue[size:]


class Split(NamedTuple):
    """A dataset before and after edits, and the examples that are to be forgotten."""

    before: Dataset
    after: Dataset  # the edited data, which baselines retain
    forget: Dataset  # the removed examples and the old forms of replaced ones


def split(loss: Callable, dataset: Any, edits: Sequence[Edit]) -> Split:
    """Finds what the edits make a model forget: removed examples, and the old forms of replaced ones.

    Of an example of which only the loss mask changes, the masked elements alone are forgotten.
    """
    before = Dataset.of(dataset)
    after = apply(before, edits, loss)
    gone, new, _ = affected(before, after)
    new_position = dict(zip(after.rows[new].tolist(), new.tolist(), strict=True))
    masked = {}
    for position in gone.tolist():
        row = int(before.rows[position])
        if row in new_position and isinstance(loss, Loss):
            old, now = before.example(position), after.example(new_position[row])
            if loss.mask is not None and has_field(old, loss.mask) and _differ(old, now) == [loss.mask]:
                masked[row] = {
                    **old,
                    loss.mask: np.where(now[loss.mask] != 0, np.zeros_like(old[loss.mask]), old[loss.mask]),
                }
    forget = before.select(gone)
    normalizers = {row: count for row, count in forget.normalizers.items() if row not in masked}
    return Split(
        before,
        after,
        dataclasses.replace(forget, replaced={**forget.replaced, **masked}, normalizers=normalizers),
    )


def _differ(old: dict, new: dict) -> list[str]:
    """The fields of two examples whose arrays differ."""

    def same(a, b):
        return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

    return [name for name in old if not same(old[name], new[name])]


def retained(loss: Callable, params: Params, data: Dataset, training: Training, *, scale: float = 1.0) -> LossTerm:
    """The training's objective over `data`, as a term."""
    weights = coefficients(loss, params, data, training.reduction)
    return LossTerm(loss, data, weights, scale=scale, weight_decay=training.weight_decay)


def forgotten(data: Dataset, edits: Sequence[Edit]) -> Dataset:
    """Returns `data`, or raises ValueError if it is empty."""
    if not len(data):
        raise ValueError(f"there is nothing to forget: the edits {list(edits)} change no example")
    return data
