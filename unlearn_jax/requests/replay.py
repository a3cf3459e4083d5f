"""Training in mini-batches that can be repeated exactly: the same start, order and steps, some examples at weight zero.

Until a training first uses an example, it is bit-equal to a training without that example. Checkpoints of the first epoch are
therefore kept, and a replay begins at the last one before any edited example was used.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file, save

from pixel_jax.files import write_file
from unlearn_jax import tree
from unlearn_jax.arrays import Example, Params
from unlearn_jax.dataset import Dataset
from unlearn_jax.objective import Objective, element_counts, on_device

NOBODY = -1  # in an order: no example, which fills an epoch's last batch


@dataclasses.dataclass(frozen=True)
class TrainingRecipe:
    """AdamW in mini-batches. Every epoch uses every example once, in its own order."""

    epochs: int = 50  # passes over the examples
    batch: int = 20  # examples of a step
    learning_rate: float = 3e-3  # constant
    decay: float = 0.01  # AdamW's
    checkpoint_every: int = 5  # steps, in the first epoch
    seed: int = 0  # of the order

    def order(self, count: int) -> np.ndarray:
        """The examples of each step, int [steps, batch]; an epoch's last batch is filled up with `NOBODY`."""
        random = np.random.default_rng(self.seed)
        filler = np.full(-count % self.batch, NOBODY)
        epochs = [np.concatenate([random.permutation(count), filler]) for _ in range(self.epochs)]
        return np.concatenate(epochs).reshape(-1, self.batch)

    def steps_of_an_epoch(self, count: int) -> int:
        """The number of batches of an epoch of `count` examples."""
        return -(-count // self.batch)

    def stops(self, count: int, last: int) -> list[int]:
        """The steps after which a training saves or logs, up to `last`; they are the same for every replay."""
        epoch = self.steps_of_an_epoch(count)
        within = [*range(self.checkpoint_every, epoch, self.checkpoint_every)]
        ends = [*within, *range(epoch, last, epoch)]
        return [*(end for end in ends if end < last), last]

    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer of the training."""
        return optax.adamw(self.learning_rate, weight_decay=self.decay)


class TrainingPoint(NamedTuple):
    """The state of a training after a step."""

    step: int
    adapter: Params
    state: Any  # of the optimizer


def train(
    recipe: TrainingRecipe,
    loss: Callable,
    begin: TrainingPoint,
    examples: Example,
    weights: np.ndarray,
    *,
    checkpoints: pathlib.Path | None = None,
    steps: int | None = None,
    log: Callable[[int, float], None] = lambda step, value: None,
) -> Params:
    """Trains from `begin` to the end.

    Args:
        recipe: the optimizer, the batches and their order.
        loss: as in `erase`; an example's loss is the mean over its elements, a batch's the mean over its examples.
        begin: the start (`beginning`) or a checkpoint.
        examples: fields [n, ...].
        weights: [n], zero for examples that do not count, otherwise one. A batch in which none counts has a gradient of zero.
        checkpoints: directory for the checkpoints of the first epoch; None: they are not saved.
        steps: the last step, if it comes before that of the recipe.
        log: called after each of `recipe.stops` with the number of steps done and the loss of the last batch.

    Returns:
        The trained adapter.
    """
    order, weights = recipe.order(len(weights)), np.asarray(weights)
    data = on_device(Objective.of(loss, examples, np.ones(len(weights))))
    counts = element_counts(loss, begin.adapter, Dataset.of(examples))
    counted = (order != NOBODY) & (weights[order] > 0)
    # An example that does not count is replaced by one that does, so that it is never read.
    rows = np.where(counted, order, int(np.argmax(weights)))
    shares = counted / np.maximum(counted.sum(axis=1, keepdims=True), 1) / counts[rows]
    point, last = begin, len(order) if steps is None else steps
    for end in recipe.stops(len(weights), last):
        if end <= begin.step:
            continue
        if checkpoints is not None and point.step < recipe.steps_of_an_epoch(len(weights)):
            _save(checkpoints, point)
        steps_now = slice(point.step, end)
        adapter, state, value = _steps(recipe, data, point.adapter, point.state, rows[steps_now], shares[steps_now])
        point = TrainingPoint(end, adapter, state)
        log(end, float(value))
    return point.adapter


def beginning(recipe: TrainingRecipe, start: Params) -> TrainingPoint:
    """The start of a training."""
    return TrainingPoint(0, start, recipe.optimizer().init(start))


def last_before(
    recipe: TrainingRecipe, count: int, edited: np.ndarray, start: Params, checkpoints: pathlib.Path
) -> TrainingPoint:
    """Reads the last checkpoint before any of the edited examples was used; the beginning if there is none.

    Args:
        recipe: of the training.
        count: number of its examples.
        edited: int [k], positions of examples.
        start: the adapter before training.
        checkpoints: directory that `train` has written.
    """
    uses = np.flatnonzero(np.isin(recipe.order(count), edited).any(axis=1))
    first_use, begin = int(uses[0]) if uses.size else recipe.order(count).shape[0], beginning(recipe, start)
    steps = [int(path.stem.removeprefix("step-")) for path in checkpoints.glob("step-*.safetensors")]
    usable = [step for step in steps if step <= first_use]
    return _load(checkpoints, max(usable), begin) if usable else begin


@functools.partial(jax.jit, static_argnames="recipe")
def _steps(
    recipe: TrainingRecipe, data: Objective, adapter: Params, state: Any, rows: jax.Array, shares: jax.Array
) -> tuple[Params, Any, jax.Array]:
    """Takes a step for each batch of `rows` and `shares` [steps, batch]; returns the loss of the last batch, too."""
    examples = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), data.examples)

    def step(carry, batch):
        adapter, state = carry
        objective = Objective.of(data.loss, jax.tree.map(lambda x: x[batch[0]], examples), batch[1])
        value, gradient = objective.value_and_gradient(adapter)
        updates, state = recipe.optimizer().update(gradient, state, adapter)
        return (tree.cast_like(tree.add(adapter, updates), adapter), state), value

    (adapter, state), values = jax.lax.scan(step, (adapter, state), (rows, shares))
    return adapter, state, values[-1]


def _file(directory: pathlib.Path, step: int) -> pathlib.Path:
    return directory / f"step-{step:06d}.safetensors"


def _save(directory: pathlib.Path, point: TrainingPoint) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    leaves = {f"{i:04d}": np.asarray(x) for i, x in enumerate(jax.tree.leaves((point.adapter, point.state)))}
    write_file(_file(directory, point.step), save(leaves))


def _load(directory: pathlib.Path, step: int, like: TrainingPoint) -> TrainingPoint:
    structure = jax.tree.structure((like.adapter, like.state))
    leaves = load_file(_file(directory, step))
    adapter, state = jax.tree.unflatten(structure, [jnp.asarray(leaves[name]) for name in sorted(leaves)])
    return TrainingPoint(step, adapter, state)
