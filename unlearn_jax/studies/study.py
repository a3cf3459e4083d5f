"""A study: training on its examples, and the comparison of adapters with retraining."""

import abc
import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save

from pixel_jax.files import write_file
from pixel_jax.training.progress import ProgressLine
from unlearn_jax.arrays import Params
from unlearn_jax.baselines import ensemble
from unlearn_jax.dataset import ID
from unlearn_jax.edits import CorrectResponse, Edit, ModifyQuery, Remove
from unlearn_jax.loss import Loss
from unlearn_jax.metrics import answers, membership, tokens
from unlearn_jax.requests.replay import TrainingRecipe, beginning, train
from unlearn_jax.studies.config import StudyConfig

Arrays = dict[str, Any]  # fields [n, ...], or mappings of such
REMOVE = "remove"  # the edit that removes rows
RESPONSE = "response"  # the edit that corrects answers; all others correct questions
C = TypeVar("C", bound=StudyConfig)


class Study(abc.ABC, Generic[C]):
    """The data and the model, which all cells share. A row is whatever the study's `arrays` and `name` understand."""

    config: C

    @property
    @abc.abstractmethod
    def loss(self) -> Loss:
        """The loss of an example as a function of the adapter."""

    @property
    @abc.abstractmethod
    def digest(self) -> str:
        """A hash of the model's weights."""

    @property
    @abc.abstractmethod
    def examples(self) -> int:
        """The number of training rows."""

    @property
    @abc.abstractmethod
    def tests(self) -> int:
        """The number of test rows."""

    @property
    @abc.abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """The names of the scores, the most important first."""

    @functools.cached_property
    @abc.abstractmethod
    def unseen(self) -> Arrays:
        """The test rows as examples."""

    @abc.abstractmethod
    def unseen_like(self, edit: str) -> Arrays:
        """Test rows as examples, in the form in which an edit's rows are trained on: with wrong answers, for example."""

    @abc.abstractmethod
    def fresh(self, seed: int) -> Params:
        """An adapter before training."""

    @abc.abstractmethod
    def arrays(self, rows: Sequence[Any]) -> Arrays:
        """Converts rows to examples of the loss."""

    @abc.abstractmethod
    def case(self, edit: str, share: float, seed: int) -> "Case":
        """Makes the case of an edit of a share of a seed's rows."""

    @abc.abstractmethod
    def scores(self, stacked: Params) -> dict[str, float]:
        """Scores the mean of the probabilities of adapters [adapters, ...] on the test rows."""

    def trained(
        self, rows: Arrays, seed: int, *, weights: np.ndarray | None = None, start: Params | None = None, order: int = 0
    ) -> tuple[Params, float]:
        """Trains an adapter; returns it and the example-gradients spent. It is cached in a file, named by a hash of all inputs.

        Args:
            rows: the examples.
            seed: of the fresh adapter.
            weights: [n], zero for rows that do not count; None: all count.
            start: the adapter before training; None: the fresh one.
            order: number of the order of the batches.
        """
        weights = np.ones(len(rows["labels"])) if weights is None else weights
        begin: Params = self.fresh(seed) if start is None else start
        recipe = dataclasses.replace(self.config.training, seed=1000 * order + seed)
        spent = float(recipe.epochs * np.count_nonzero(weights))
        path = self.config.directory / f"{_digest(self.digest, recipe, rows, weights, begin)}.safetensors"
        if path.exists():
            return {name: jnp.asarray(x) for name, x in load_file(path).items()}, spent
        progress = ProgressLine("training, steps", len(recipe.order(len(weights))))
        log = lambda step, value: progress.update(step, {"loss": value})
        adapter = train(recipe, self.loss, beginning(recipe, begin), rows, weights, log=log)
        write_file(path, save({name: np.asarray(x) for name, x in adapter.items()}))
        return adapter, spent


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """An edit of some rows of a seed."""

    study: Study
    edit: str
    share: float
    seed: int
    names: list[str]  # ids of the rows
    rows: list[Any]  # as they should be
    corrupted: list[Any]  # as they were trained on
    touched: np.ndarray  # int [k], positions of the rows that the edit is about

    @functools.cached_property
    def before(self) -> Arrays:
        """The examples that were trained on."""
        return self.study.arrays(self.corrupted)

    @functools.cached_property
    def after(self) -> Arrays:
        """The examples that should have been trained on; removed rows are among them, and have weight zero."""
        return self.before if self.edit == REMOVE else self.study.arrays(self.rows)

    @property
    def dataset(self) -> dict[str, Any]:
        """The examples that were trained on, with ids."""
        return {ID: np.array(self.names), **self.before}

    @property
    def weights(self) -> np.ndarray:
        """The weights [n] of the rows after the edit."""
        weights = np.ones(len(self.rows))
        if self.edit == REMOVE:
            weights[self.touched] = 0
        return weights

    @property
    def edits(self) -> list[Edit]:
        """The edit, for `erase` and the baselines."""
        ids = [self.names[i] for i in self.touched]
        if self.edit == REMOVE:
            return [Remove(ids)]
        new = _take(self.after, self.touched)
        return [CorrectResponse(ids, new) if self.edit == RESPONSE else ModifyQuery(ids, new)]

    @functools.cached_property
    def trained(self) -> Params:
        """The adapter that is to be edited."""
        return self.study.trained(self.before, self.seed)[0]

    def retrained(self, *, warm: bool = False, order: int = 0) -> tuple[Params, float]:
        """Trains by the same recipe on the edited examples; with `warm` from the trained adapter."""
        start = self.trained if warm else None
        return self.study.trained(self.after, self.seed, weights=self.weights, start=start, order=order)

    @functools.cached_property
    def reference(self) -> Params:
        """The cold retrain, with which all others are compared."""
        return jax.tree.map(np.asarray, alone(self.retrained()[0]))

    def forgetting(self, stacked: Params) -> dict[str, float]:
        """Compares adapters [adapters, ...] with the cold retrain: losses, divergences and membership.

        `forget` are the edited rows as they were trained on, `kept` unedited ones, `right` the right form of replaced rows.
        `auc_member` is the AUC of an attack by the loss, on forgotten rows against test rows of the same form.
        """
        unedited = np.setdiff1d(np.arange(len(self.rows)), self.touched)[: self.study.config.rows]
        sets = {"forget": _take(self.before, self.touched), "kept": _take(self.before, unedited)}
        if self.edit != REMOVE:
            sets["right"] = _take(self.after, self.touched)
        loss, metrics = ensemble(self.study.loss), {}
        unseen = {"test": self.study.unseen, "strange": self.study.unseen_like(self.edit)}
        scored = {name: tokens.score(loss, stacked, rows) for name, rows in unseen.items()}
        for name, rows in sets.items():
            scored[name], kl = tokens.compare(loss, stacked, self.reference, rows)
            metrics[f"kl_{name}"] = float(kl.mean())
        nll = {name: answers.mean_nll(x.logprob, x.mask) for name, x in scored.items()}
        metrics |= {f"loss_{name}": float(nll[name].mean()) for name in (*sets, "test")}
        return {**metrics, "auc_member": membership.auc(nll["forget"], nll["strange"])}


def alone(adapter: Params) -> Params:
    """Adds a leading axis: a stack of one adapter."""
    return jax.tree.map(lambda x: x[None], adapter)


def fresh_adapter(shape: Mapping[str, jax.Array], seed: int) -> dict[str, jax.Array]:
    """Makes an adapter before training as PEFT does: A uniform, B zero.

    Args:
        shape: an adapter, of which names, shapes and dtypes are used.
        seed: of A.
    """
    adapter = {}
    for number, (name, x) in enumerate(sorted(shape.items())):
        if name.endswith("lora_b"):
            adapter[name] = jnp.zeros_like(x)
        else:
            bound = x.shape[-1] ** -0.5
            key = jax.random.fold_in(jax.random.key(seed), number)
            adapter[name] = jax.random.uniform(key, x.shape, x.dtype, -bound, bound)
    return adapter


def digest_of(*trees: Any) -> str:
    """A hash of the shapes, dtypes and numbers of pytrees of arrays."""
    sha = hashlib.sha256()
    for x in jax.tree.leaves(trees):
        sha.update(repr((x.shape, str(x.dtype))).encode())
        sha.update(np.ascontiguousarray(x).tobytes())
    return sha.hexdigest()[:32]


def _take(rows: Arrays, positions: np.ndarray) -> Arrays:
    return jax.tree.map(lambda x: x[positions], rows)


def _digest(model: str, recipe: TrainingRecipe, rows: Arrays, weights: np.ndarray, start: Mapping[str, Any]) -> str:
    sha = hashlib.sha256(f"{model} {recipe}".encode())
    for part in (*jax.tree.leaves(rows), weights, *jax.tree.leaves(start)):
        sha.update(np.ascontiguousarray(part).tobytes())
    return sha.hexdigest()[:32]
