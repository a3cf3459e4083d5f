"""A study: its rows and its model, training, and the scores of adapters."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
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
from unlearn_jax.loss import Loss
from unlearn_jax.recommendation.config import RecommendationConfig
from unlearn_jax.recommendation.corruption import EDITS, Corruption, corrupt
from unlearn_jax.recommendation.forms import FORMS, PromptForm
from unlearn_jax.recommendation.generation import ReadQuestions
from unlearn_jax.recommendation.ratings import Ratings, Row, draw_rows, split_users
from unlearn_jax.recommendation.readers import READERS
from unlearn_jax.recommendation.recommender import BLOCK, Encoded, Recommender, examples
from unlearn_jax.recommendation.report import REPORT
from unlearn_jax.studies.commands import StudyCommands
from unlearn_jax.studies.installed import located
from unlearn_jax.studies.study import REMOVE, Arrays, Case, Study


@dataclasses.dataclass(frozen=True, eq=False)
class RecommendationStudy(Study[RecommendationConfig]):
    """The data, the prompt form and the model, which all cells share."""

    config: RecommendationConfig
    ratings: Ratings
    form: PromptForm
    recommender: Recommender
    users: list[str]  # to train on
    tested: list[Row]  # rows of the other users
    log: Callable[[str], None] = say

    @classmethod
    def of(cls, config: RecommendationConfig, model: Any = None, tokenizer: Any = None) -> "RecommendationStudy":
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

    @property
    def loss(self) -> Loss:
        """See `Study.loss`."""
        return self.recommender.loss

    @property
    def digest(self) -> str:
        """See `Study.digest`."""
        return self.recommender.digest

    @property
    def examples(self) -> int:
        """See `Study.examples`."""
        return self.config.data.examples

    @property
    def tests(self) -> int:
        """See `Study.tests`."""
        return len(self.tested)

    @property
    def metrics(self) -> tuple[str, ...]:
        """See `Study.metrics`."""
        return self.form.metrics

    def fresh(self, seed: int) -> Params:
        """See `Study.fresh`."""
        return self.recommender.fresh(seed)

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
        """See `Study.unseen`: the first `config.rows` test rows."""
        first = Encoded(*(x[: self.config.rows] for x in self._tests))
        return examples(first, self.questions.hidden[: self.config.rows])

    def unseen_like(self, edit: str) -> Arrays:
        """See `Study.unseen_like`. Rows that cannot be corrupted are left out."""
        if edit == REMOVE:
            return self.unseen
        random = np.random.default_rng((self.config.data.seed, 3))
        corruption = Corruption(self.ratings, self.form, self.config.data.history, random)
        corrupted = [EDITS[edit](corruption, row) for row in self.tested[: self.config.rows]]
        return self.arrays([row for row in corrupted if row is not None])

    def case(self, edit: str, share: float, seed: int) -> Case:
        """Makes the case of an edit of a share of a seed's rows."""
        rows = self.rows(seed)
        corrupted, touched = corrupt(
            edit, rows, share, self.ratings, self.form, history=self.config.data.history, seed=seed
        )
        return Case(self, edit, share, seed, [row.name for row in rows], rows, corrupted, touched)

    def scores(self, stacked: Params) -> dict[str, float]:
        """Scores the mean of the probabilities of adapters [adapters, ...] on the test rows."""
        return self.form.score(StudySpeaker(self, stacked), self.tested, self.ratings.titles)

    def _size(self, text: str) -> int:
        return len(self.recommender.ids(text))


@dataclasses.dataclass(frozen=True, eq=False)
class StudySpeaker:
    """A `Speaker` that has read the test questions."""

    study: RecommendationStudy
    stacked: Params  # adapters [adapters, ...]

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


COMMANDS = StudyCommands(RecommendationStudy.of, REPORT.columns)
