"""A study of wrong answers: its questions, its model, and the scores of adapters."""

import dataclasses
import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from pixel_jax.cli import UserError
from pixel_jax.config import ConfigError
from pixel_jax.data.example import ReadReport
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.models.io import from_pretrained
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.limits import read_limits
from pixel_jax.terminal import say
from unlearn_jax.arrays import Params
from unlearn_jax.baselines import ensemble
from unlearn_jax.loss import Loss
from unlearn_jax.noisy_responses.answerer import Answerer, QuestionWriter, first_logits
from unlearn_jax.noisy_responses.base import base_model
from unlearn_jax.noisy_responses.config import NoisyResponsesConfig
from unlearn_jax.noisy_responses.questions import ChoiceQuestion, draw, split_pictures
from unlearn_jax.noisy_responses.readers import READERS
from unlearn_jax.noisy_responses.report import REPORT
from unlearn_jax.studies.commands import StudyCommands
from unlearn_jax.studies.study import RESPONSE, Arrays, Case, Study, fresh_adapter


@dataclasses.dataclass(frozen=True, eq=False)
class NoisyResponsesStudy(Study[NoisyResponsesConfig]):
    """The questions and the model, which all cells share."""

    config: NoisyResponsesConfig
    answerer: Answerer
    learned: list[ChoiceQuestion]  # about the pictures to train on
    tested: list[ChoiceQuestion]  # about the other pictures

    @classmethod
    def of(cls, config: NoisyResponsesConfig) -> "NoisyResponsesStudy":
        """Reads or makes the questions and the model.

        Raises:
            ConfigError: an unknown name of a reader or an edit; too few questions.
            ExampleError: the released files cannot be used.
            UserError: the model cannot be used.
        """
        data = config.data
        if data.reader not in READERS:
            raise ConfigError(f"config.data.reader must be of {', '.join(READERS)}, not {data.reader!r}")
        if unknown := [x for x in config.edits if x != RESPONSE]:
            raise ConfigError(f"config.edits must be of {RESPONSE}, not {unknown[0]!r}")
        report = ReadReport(data.path or data.reader, drop=data.bad_rows == "drop")
        questions = READERS[data.reader](data, report)
        if str(report):
            say(str(report))
        learned, held = split_pictures(questions, data.test_share, data.seed)
        tested = draw(held, data.tests, data.seed, "config.data.tests")
        config.directory.mkdir(parents=True, exist_ok=True)
        directory = config.model or base_model(config.base, config.directory / "base")
        model, processor = from_pretrained(directory)
        if processor is None:
            raise UserError(f"{directory} has no tokenizer")
        limits = (read_limits(directory) or RolloutConfig()).for_model(model.config)
        if data.max_pixels is not None:
            least = min(limits.min_pixels, data.max_pixels)
            limits = dataclasses.replace(limits, min_pixels=least, max_pixels=data.max_pixels)
        writer = QuestionWriter(Vocabulary.of(processor.tokenizer), limits, data.length, data.answer)
        return cls(config, Answerer.of(model, writer, config.adapter, remat=config.remat), learned, tested)

    @property
    def loss(self) -> Loss:
        """See `Study.loss`."""
        return self.answerer.loss

    @property
    def digest(self) -> str:
        """See `Study.digest`."""
        return self.answerer.digest

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
        return ("accuracy", "accuracy_of_categories", "worst_category", "f1")

    @functools.cached_property
    def unseen(self) -> Arrays:
        """See `Study.unseen`."""
        return self.arrays(self.tested)

    @functools.cached_property
    def _misanswered(self) -> Arrays:
        random = np.random.default_rng((self.config.data.seed, 3))
        return self.arrays([question.wrong(random) for question in self.tested])

    def unseen_like(self, edit: str) -> Arrays:
        """See `Study.unseen_like`: with wrong answers."""
        return self._misanswered

    def fresh(self, seed: int) -> Params:
        """See `Study.fresh`."""
        return fresh_adapter(self.answerer.shape, seed)

    def arrays(self, rows: Sequence[ChoiceQuestion]) -> Arrays:
        """See `Study.arrays`."""
        return self.answerer.arrays(rows)

    def case(self, edit: str, share: float, seed: int) -> Case:
        """See `Study.case`: a share of the questions, drawn at random, has one of its wrong answers."""
        rows = draw(self.learned, self.config.data.examples, seed, "config.data.examples")
        random = np.random.default_rng((seed, 2))
        touched = np.sort(random.permutation(len(rows))[: max(1, round(share * len(rows)))])
        corrupted = list(rows)
        for i in touched:
            corrupted[i] = rows[i].wrong(random)
        return Case(self, edit, share, seed, [row.name for row in rows], rows, corrupted, touched)

    @functools.cached_property
    def _choices(self) -> jnp.ndarray:
        return jnp.asarray(self.answerer.choices(self.tested))

    def scores(self, stacked: Params) -> dict[str, float]:
        """See `Study.scores`: of the likeliest of the possible answers, by its first token."""
        logits = first_logits(ensemble(self.loss), stacked, self.unseen, self._choices)
        return choice_scores(self.tested, np.asarray(logits).argmax(axis=1))


def choice_scores(questions: Sequence[ChoiceQuestion], chosen: np.ndarray) -> dict[str, float]:
    """Scores the answers to questions.

    Args:
        questions: n questions; a category may name several types, joined by " + ".
        chosen: int [n], the index of the chosen answer.

    Returns:
        `accuracy`, its binomial standard error, its mean and its least value over the types of questions, that of each type; and
        `f1` of the answer Yes where all questions are answered by Yes or No.
    """
    answers = [question.choices[i] for question, i in zip(questions, chosen, strict=True)]
    right = np.array([question.answer == x for question, x in zip(questions, answers, strict=True)])
    accuracy = float(right.mean())
    types: dict[str, list[bool]] = {}
    for question, hit in zip(questions, right, strict=True):
        for name in question.example.category.split(" + "):
            types.setdefault(name, []).append(bool(hit))
    shares = {name: float(np.mean(hits)) for name, hits in sorted(types.items())}
    scores = {
        "accuracy": accuracy,
        "accuracy_error": float(np.sqrt(accuracy * (1 - accuracy) / len(right))),
        "accuracy_of_categories": float(np.mean(list(shares.values()))),
        "worst_category": min(shares.values()),
    }
    if all(set(question.choices) == {"Yes", "No"} for question in questions):
        said, meant = (np.array([x == "Yes" for x in y]) for y in (answers, [x.answer for x in questions]))
        both = int((said & meant).sum())
        scores["f1"] = 2 * both / max(1, int(said.sum() + meant.sum()))
    return {**scores, **{f"accuracy: {name}": share for name, share in shares.items()}}


COMMANDS = StudyCommands(NoisyResponsesStudy.of, REPORT.columns)
