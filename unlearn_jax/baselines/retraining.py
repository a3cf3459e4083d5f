"""Training on the data as it should have been: from scratch, from the trained adapter, or in shards (SISA)."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from unlearn_jax import tree
from unlearn_jax.arrays import Example, Params
from unlearn_jax.baselines.training import Trained, Training, descend, retained
from unlearn_jax.dataset import Dataset
from unlearn_jax.edits import Edit, affected, apply
from unlearn_jax.lbfgs import lbfgs
from unlearn_jax.loss import Loss, require_parts
from unlearn_jax.objective import Objective


def retrain(loss: Callable, start: Params, dataset: Any, edits: Sequence[Edit], training: Training) -> Trained:
    """Minimises the edited objective in mini-batches.

    From a fresh adapter this is retraining, from the trained one a warm restart; with the budget of an edit it is fine-tuning on
    the edited data, the simplest baseline.
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
    """Minimises an objective by L-BFGS.

    Args:
        objective: to be minimised.
        start: a pytree of parameters.
        tolerance: of the gradient's norm.
        max_steps: the most steps.
        budget: example-gradients, at most.
        log: called in every step with its number, the value and the gradient's norm.

    Returns:
        The minimum that was found, and the norm of the gradient there.
    """
    value, evaluations = Partial(Objective.value, objective), budget / objective.count
    minimum = lbfgs(value, start, tolerance=tolerance, max_evaluations=evaluations, max_steps=max_steps, log=log)
    norm = float(tree.norm(objective.gradient(minimum.params)))
    return Trained(minimum.params, float(minimum.evaluations * objective.count), minimum.values), norm


@dataclasses.dataclass(frozen=True, eq=False)
class Sisa:
    """One adapter for each shard of a dataset."""

    loss: Callable
    start: Params
    training: Training  # of each shard; the budget is divided among shards by their numbers of examples
    dataset: Dataset
    shards: np.ndarray  # int [rows of the source], the shard of each
    adapters: tuple[Params, ...]
    gradients: float  # example-gradients spent by the last training or edit
    retrained: tuple[int, ...]  # the shards that the last training or edit trained

    @classmethod
    def train(cls, loss: Callable, start: Params, dataset: Any, training: Training, *, shards: int = 4) -> "Sisa":
        """Assigns the examples to shards at random, and trains an adapter from `start` on each shard."""
        dataset = Dataset.of(dataset)
        if not 1 <= shards <= len(dataset):
            raise ValueError(f"{len(dataset)} examples cannot make {shards} shards")
        shard_of_row = np.full(dataset.rows.max() + 1, -1)
        shard_of_row[dataset.rows] = np.random.default_rng(training.seed).permutation(len(dataset)) % shards
        empty = cls(loss, start, training, dataset, shard_of_row, (start,) * shards, 0.0, ())
        return empty._fit(dataset, tuple(range(shards)))

    def edit(self, edits: Sequence[Edit]) -> "Sisa":
        """Retrains the shards with edited examples from the start; the others keep their adapters."""
        after = apply(self.dataset, edits, self.loss)
        gone, new, _ = affected(self.dataset, after)
        rows = np.union1d(self.dataset.rows[gone], after.rows[new])
        return self._fit(after, tuple(np.unique(self.shards[rows]).tolist()))

    def stacked(self) -> Params:
        """The adapters as one pytree with a leading axis of shards, which `ensemble` takes."""
        return jax.tree.map(lambda *x: jnp.stack(x), *self.adapters)

    def _fit(self, dataset: Dataset, touched: tuple[int, ...]) -> "Sisa":
        adapters, spent = list(self.adapters), 0.0
        for shard in touched:
            examples = dataset.select(np.flatnonzero(self.shards[dataset.rows] == shard))
            if not len(examples):
                raise ValueError(f"the edits leave nothing of shard {shard} of {len(adapters)}: use fewer shards")
            trained = self._train_shard(examples, shard, len(examples) / len(self.dataset))
            adapters[shard], spent = trained.adapter, spent + trained.gradients
        return dataclasses.replace(self, dataset=dataset, adapters=tuple(adapters), gradients=spent, retrained=touched)

    def _seed(self, shard: int) -> int:
        return int(np.random.SeedSequence((self.training.seed, shard)).generate_state(1)[0])

    def _train_shard(self, mine: Dataset, shard: int, share: float) -> Trained:
        training = dataclasses.replace(self.training, seed=self._seed(shard), budget=self.training.budget * share)
        return descend([retained(self.loss, self.start, mine, training)], self.start, training)


def ensemble(loss: Loss) -> Loss:
    """A loss on stacked adapters: the logits are logarithms of the mean of the shards' probabilities."""
    parts = require_parts(loss, "an ensemble")
    return Loss(Partial(_mixture, parts.outputs), parts.criterion, parts.mask)


def _mixture(outputs: Callable, stacked: Params, example: Example) -> jax.Array:
    logp = jax.nn.log_softmax(jax.vmap(lambda params: outputs(params, example))(stacked), axis=-1)
    return jax.nn.logsumexp(logp, axis=0) - jnp.log(logp.shape[0])
