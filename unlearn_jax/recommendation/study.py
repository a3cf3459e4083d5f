"""A study: its rows and its model, training, and the scores of adapters."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save

from pixel_jax.cli import UserError
from pixel_jax.config import ConfigError
from pixel_jax.files import write_file
from pixel_jax.terminal import say
from pixel_jax.training.progress import ProgressLine
from unlearn_jax.arrays import Params
from unlearn_jax.baselines import ensemble
from unlearn_jax.dataset import ID
from unlearn_jax.edits import CorrectResponse, Edit, ModifyQuery, Remove
from unlearn_jax.metrics import answers, membership, tokens
from unlearn_jax.recommendation.config import RecommendationConfig
from unlearn_jax.recommendation.corruption import EDITS, REMOVE, corrupt
from unlearn_jax.recommendation.forms import FORMS, PromptForm
from unlearn_jax.recommendation.generation import ReadQuestions
from unlearn_jax.recommendation.ratings import Ratings, Row, draw_rows, located, split_users
from unlearn_jax.recommendation.readers import READERS
from unlearn_jax.recommendation.recommender import BLOCK, Encoded, Recommender, examples
from unlearn_jax.requests.replay import TrainingRecipe, beginning, train

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """The data, the prompt form and the model, which all cells share."""

    config: RecommendationConfig
    ratings: Ratings
    form: PromptForm
    recommender: Recommender
    users: list[str]  # to train on
    tested: list[Row]  # rows of the other users
    log: Callable[[str], None] = say

    @classmethod
    def of(cls, config: RecommendationConfig, model: Any = None, tokenizer: Any = None) -> "Study":
        """Reads the data, and the model unless it is given.

        Raises:
            ConfigError: an unknown name of a reader, a form or an edit.
            UserError: the model cannot be used.
        """
        data = config.data
        for name, names, known in (
            ("data.reader", [data.reader], READERS),
            ("form", [config.form], FORMS),
            ("edits", config.edits, EDITS),
        ):
            if unknown := [x for x in names if x not in known]:
                raise ConfigError(f"config.{name} must be of {', '.join(known)}, not {unknown[0]!r}")
        ratings = READERS[data.reader](located(data.path))
        if model is None:
            from pixel_jax.models.io import from_pretrained

            model, processor = from_pretrained(located(config.model), dtype=jnp.float32)
            if processor is None:
                raise UserError(f"{config.model} has no tokenizer")
            tokenizer = processor.tokenizer
        recommender = Recommender.of(
            model, tokenizer, **dataclasses.asdict(config.adapter), key=jax.random.key(data.seed)
        )
        if (most := data.title) is not None:
            every, ratings = ratings, ratings.with_titles(lambda title: len(recommender.ids(title)) <= most)
            say(f"{len(every.titles) - len(ratings.titles)} of {len(every.titles)} films have longer titles: left out")
        users, test_users = split_users(ratings, data.test_share, data.seed)
        draw = {"history": data.history, "candidates": data.candidates, "seed": data.seed}
        tested = draw_rows(ratings, test_users, data.test_rows or len(test_users), **draw)
        config.directory.mkdir(parents=True, exist_ok=True)
        return cls(config, ratings, FORMS[config.form], recommender, users, tested)

    def rows(self, seed: int) -> list[Row]:
        """Draws the training rows of a seed in their right form."""
        data = self.config.data
        return draw_rows(
            self.ratings, self.users, data.examples, history=data.history, candidates=data.candidates, seed=seed
        )

    def fitted(self, row: Row) -> Row:
        """Removes the oldest films of a row's history until its text fits."""
        while len(row.history) > 1 and sum(map(self._size, self.texts(row))) > self.config.data.length:
            row = row._replace(history=row.history[1:])
        return row

    def texts(self, row: Row) -> tuple[str, str]:
        """The question and the answer of a row."""
        return self.form.prompt(row, self.ratings.titles), self.form.answer(row, self.ratings.titles)

    def encode(self, rows: Sequence[Row]) -> Encoded:
        """Encodes rows, with histories shortened until they fit."""
        fitted = [self.fitted(row) for row in rows]
        if short := sum(len(a.history) < len(b.history) for a, b in zip(fitted, rows, strict=True)):
            self.log(f"{short} of {len(rows)} histories are too long for {self.config.data.length} tokens: shortened")
        return self.recommender.encode(
            [self.texts(row) for row in fitted], self.config.data.length, self.config.data.answer
        )

    def arrays(self, rows: Sequence[Row]) -> Arrays:
        """Converts rows to examples of the loss."""
        encoded = self.encode(rows)
        return examples(encoded, self.hidden(encoded.tokens))

    def hidden(self, tokens: np.ndarray) -> np.ndarray:
        """Computes hidden states float32 [n, T, D] of tokens int32 [n, T] after the lower layers; cached in a file a text."""
        names = [hashlib.sha256(row.tobytes()).hexdigest()[:32] for row in tokens]
        directory = self.config.directory / self.recommender.digest
        directory.mkdir(exist_ok=True)
        paths = [directory / f"{name}.safetensors" for name in names]
        missing = [i for i, path in enumerate(paths) if not path.exists() and path not in paths[:i]]
        progress = ProgressLine("texts read by the lower layers", len(missing))
        for at in range(0, len(missing), BLOCK):
            block = missing[at : at + BLOCK]
            for i, x in zip(block, self.recommender.hidden(tokens[block]), strict=True):
                write_file(paths[i], save({"hidden": x}))
            progress.update(min(at + BLOCK, len(missing)), {})
        return np.stack([load_file(path)["hidden"] for path in paths])

    @functools.cached_property
    def questions(self) -> ReadQuestions:
        """The test questions."""
        encoded = self._tests
        return ReadQuestions(self.recommender, encoded.tokens, encoded.lengths, self.hidden(encoded.tokens))

    @functools.cached_property
    def _tests(self) -> Encoded:
        return self.encode(self.tested)

    @functools.cached_property
    def unseen(self) -> Arrays:
        """The first `config.rows` test rows as examples, with which membership is attacked."""
        return _take(examples(self._tests, self.questions.hidden), np.arange(min(self.config.rows, len(self.tested))))

    def case(self, edit: str, share: float, seed: int) -> "Case":
        """Makes the case of an edit of a share of a seed's rows."""
        rows = self.rows(seed)
        spoilt, touched = corrupt(
            edit, rows, share, self.ratings, self.form, history=self.config.data.history, seed=seed
        )
        return Case(self, edit, share, seed, rows, spoilt, touched)

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
        begin: Params = self.recommender.fresh(seed) if start is None else start
        recipe = dataclasses.replace(self.config.training, seed=1000 * order + seed)
        spent = float(recipe.epochs * np.count_nonzero(weights))
        path = self.config.directory / f"{_digest(self.recommender.digest, recipe, rows, weights, begin)}.safetensors"
        if path.exists():
            return {name: jnp.asarray(x) for name, x in load_file(path).items()}, spent
        progress = ProgressLine("training, steps", len(recipe.order(len(weights))))
        log = lambda step, value: progress.update(step, {"loss": value})
        adapter = train(recipe, self.recommender.loss, beginning(recipe, begin), rows, weights, log=log)
        write_file(path, save({name: np.asarray(x) for name, x in adapter.items()}))
        return adapter, spent

    def scores(self, stacked: Params) -> dict[str, float]:
        """Scores the mean of the probabilities of adapters [adapters, ...] on the test rows."""
        return self.form.score(TestSpeaker(self, stacked), self.tested, self.ratings.titles)

    def _size(self, text: str) -> int:
        return len(self.recommender.ids(text))


@dataclasses.dataclass(frozen=True, eq=False)
class TestSpeaker:
    """A `Speaker` that has read the test questions."""

    study: Study
    stacked: Params
    __test__ = False  # for pytest

    def token(self, text: str) -> int:
        """See `Speaker.token`."""
        return self.study.recommender.ids(text)[0]

    def first_logits(self) -> np.ndarray:
        """See `Speaker.first_logits`."""
        return self.study.questions.first_logits(self.stacked)

    def answers(self) -> list[str]:
        """See `Speaker.answers`."""
        recommender = self.study.recommender
        stop = {recommender.ids("\n")[0], recommender.tokenizer.eos_token_id} - {None}
        return self.study.questions.answers(self.stacked, self.study.config.data.answer, sorted(stop))


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """An edit of some rows of a seed."""

    study: Study
    edit: str
    share: float
    seed: int
    rows: list[Row]  # as they should be
    spoilt: list[Row]  # as they were trained on
    touched: np.ndarray  # int [k], positions of the rows that the edit is about

    @functools.cached_property
    def before(self) -> Arrays:
        """The examples that were trained on."""
        return self.study.arrays(self.spoilt)

    @functools.cached_property
    def after(self) -> Arrays:
        """The examples that should have been trained on; removed rows are among them, and have weight zero."""
        return self.before if self.edit == REMOVE else self.study.arrays(self.rows)

    @property
    def dataset(self) -> dict[str, Any]:
        """The examples that were trained on, with ids."""
        return {ID: np.array([row.name for row in self.rows]), **self.before}

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
        ids = [self.rows[i].name for i in self.touched]
        if self.edit == REMOVE:
            return [Remove(ids)]
        new = {name: x[self.touched] for name, x in self.after.items()}
        return [CorrectResponse(ids, new) if self.edit == "response" else ModifyQuery(ids, new)]

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
        `auc_member` is the AUC of an attack by the loss, on forgotten rows against test rows.
        """
        unedited = np.setdiff1d(np.arange(len(self.rows)), self.touched)[: self.study.config.rows]
        sets = {"forget": _take(self.before, self.touched), "kept": _take(self.before, unedited)}
        if self.edit != REMOVE:
            sets["right"] = _take(self.after, self.touched)
        loss, metrics = ensemble(self.study.recommender.loss), {}
        nll = {}
        scored = {"test": tokens.score(loss, stacked, self.study.unseen)}
        for name, rows in sets.items():
            scored[name], kl = tokens.compare(loss, stacked, self.reference, rows)
            metrics[f"kl_{name}"] = float(kl.mean())
        for name, statistics in scored.items():
            nll[name] = answers.mean_nll(statistics.logprob, statistics.mask)
            metrics[f"loss_{name}"] = float(nll[name].mean())
        return {**metrics, "auc_member": membership.auc(nll["forget"], nll["test"])}


def alone(adapter: Params) -> Params:
    """Adds a leading axis: a stack of one adapter."""
    return jax.tree.map(lambda x: x[None], adapter)


def _take(rows: Arrays, positions: np.ndarray) -> Arrays:
    return {name: x[positions] for name, x in rows.items()}


def _digest(model: str, recipe: TrainingRecipe, rows: Arrays, weights: np.ndarray, start: Mapping[str, Any]) -> str:
    sha = hashlib.sha256(f"{model} {recipe}".encode())
    for part in (*(rows[name] for name in sorted(rows)), weights, *(start[name] for name in sorted(start))):
        sha.update(np.ascontiguousarray(part).tobytes())
    return sha.hexdigest()[:32]
