"""The stages that a batch of an evaluation goes through, and the value that each hands to the next.

    QuestionBatch -> answer -> Answered -> judge -> Judged -> record -> records

Each stage is a function `stage(context, value)`; `EvaluationStages` names them, so that any can be replaced.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from pixel_jax.data.example import Example
from pixel_jax.data.prompt_shapes import Assignment
from pixel_jax.dialog.grammar import Language
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.dialog.unrecognised import unrecognised_turns
from pixel_jax.evaluation import transcript
from pixel_jax.evaluation.config import BenchmarkConfig, ModeName
from pixel_jax.evaluation.evidence import looked_at
from pixel_jax.evaluation.modes import MODES, USED, Mode
from pixel_jax.models.model import Model
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.materialize import VisualRecord, materialize_on_host
from pixel_jax.rollouts.prompts import Query, build_prompts
from pixel_jax.rollouts.rollout import rollout
from pixel_jax.rollouts.trajectory import (
    STOP_REASONS,
    UNREADABLE,
    Tables,
    Trajectories,
    answered_calls,
    executed_calls,
    failed_calls,
    take_rows,
    to_host,
)
from pixel_jax.tools.tool import Tool
from pixel_jax.training.answers import given_answer
from pixel_jax.training.scorers import Reference, Scorer, ScorerConfig


class Policy(NamedTuple):
    """The model that is asked, with its vocabulary."""

    model: Model
    vocabulary: Vocabulary
    tables: Tables  # the same object for every call, because compiled programs are cached by it


@dataclasses.dataclass(frozen=True)
class Exam:
    """The settings with which the questions of a benchmark are asked, and the number of transcripts that are kept."""

    benchmark: BenchmarkConfig
    rollout: RolloutConfig
    mode: ModeName = USED
    batch: int = 64  # questions answered together
    traced: int = 0  # questions whose first answers are kept as traces, `traces/NUMBER.json`
    seed: int = 0  # of the answers, and of which questions are traced
    assistant_prefix: str = ""  # `EvalConfig.assistant_prefix`

    @property
    def limits(self) -> RolloutConfig:
        """The rollout's limits in this mode."""
        return self.way.limits(dataclasses.replace(self.rollout, max_side=self.benchmark.max_side))

    @property
    def prefix(self) -> str:
        """What an answer begins with in this mode."""
        return self.assistant_prefix if self.way.guidelines == "notool" else ""

    @property
    def guidelines(self) -> str:
        """The guidelines of the prompt in this mode."""
        return "vcot" if self.prefix else self.way.guidelines

    @property
    def way(self) -> Mode:
        """The mode as a value."""
        return MODES[self.mode]


class EvaluationContext:
    """The context in which the stages work."""

    def __init__(
        self, policy: Policy, exam: Exam, directory: pathlib.Path, count: int, scorer: Callable[..., Any] | None = None
    ):
        """Prepares the scorers and draws the questions whose transcripts are kept.

        Args:
            policy: the model that answers.
            exam: the settings.
            directory: the directory of the results.
            count: the number of all questions.
            scorer: the scorer of the `score`, by default that of the benchmark; `accuracy` always uses the released scorer.
        """
        self.policy, self.exam, self.directory = policy, exam, directory
        self.limits = exam.limits
        self.scorers = {
            "score": scorer or Scorer(exam.benchmark.scorer),
            "accuracy": Scorer(ScorerConfig(("released",))),
        }
        self.drawn = set(np.random.default_rng(exam.seed).permutation(count)[: exam.traced].tolist())


class QuestionBatch(NamedTuple):
    """Questions of one shape that are answered together, with their pixels."""

    numbers: Sequence[int]  # among all questions
    questions: Sequence[Example]
    queries: Sequence[Query]
    places: Sequence[Assignment]


class Answered(NamedTuple):
    """The answers to a batch: `group_size` rows for each question, on the host."""

    asked: QuestionBatch
    trajectories: Trajectories[VisualRecord]
    images: np.ndarray  # `Images` of each question
    texts: Sequence[str]  # all that the model wrote in each row


class Judged(NamedTuple):
    """Answers with their scores."""

    answered: Answered
    scores: Mapping[str, Sequence[float | None]]  # "score" and "accuracy" of each row; None: it holds no answer


Record = dict[str, Any]


def answer(
    context: EvaluationContext, asked: QuestionBatch, *, roll: Callable[..., Trajectories] | None = None
) -> Answered:
    """Asks the questions. An answer depends on the question's number, the seed and the limits, not on other questions.

    Args:
        context: the context with the policy.
        asked: the questions.
        roll: a function in place of `rollout`; `functools.partial(answer, roll=...)` is a stage, too.
    """
    exam, (model, vocabulary, tables) = context.exam, context.policy
    shape, spare = asked.places[0].shape, exam.batch - len(asked.numbers)  # repeats of the last keep the shape

    def padded(items: Sequence[Any]) -> list[Any]:
        return [*items, *[items[-1]] * spare]

    prompts = build_prompts(
        padded(asked.queries),
        vocabulary,
        tables,
        context.limits,
        shape=shape,
        uids=padded(asked.numbers),
        guidelines=exam.guidelines,
    )
    begun = {"assistant_prefix": vocabulary.encode(exam.prefix)} if exam.prefix else {}
    trajectories = to_host((roll or rollout)(model, prompts, jax.random.key(exam.seed), context.limits, **begun))
    t = take_rows(trajectories, slice(len(asked.numbers) * context.limits.group_size))
    texts = [
        exam.prefix + vocabulary.to_bytes(ids[mask]).decode("utf-8", "replace")
        for ids, mask in zip(t.tokens, t.loss_mask, strict=True)
    ]
    return Answered(asked, t, prompts.images, texts)


def judge(context: EvaluationContext, answered: Answered) -> Judged:
    """Scores each answer."""
    n = context.limits.group_size
    references = [Reference(x.answer, x.question) for x in answered.asked.questions for _ in range(n)]
    return Judged(answered, {name: score(answered.texts, references) for name, score in context.scorers.items()})


def record(context: EvaluationContext, judged: Judged) -> list[Record]:
    """The record of each question; some transcripts are saved, too."""
    asked, n = judged.answered.asked, context.limits.group_size
    records = []
    for at, (number, question) in enumerate(zip(asked.numbers, asked.questions, strict=True)):
        entry = record_of(number, question, judged, slice(at * n, (at + 1) * n), context.policy.tables.parser.language)
        rows = slice(at * n, (at + 1) * n)
        records.append(
            {**entry, **evidence_of(judged.answered, at, rows), "shrunk": asked.places[at].prompt.scale < 1.0}
        )
        if number in context.drawn:
            draw(context, judged, at, entry)
    return records


@dataclasses.dataclass(frozen=True)
class EvaluationStages:
    """The functions that a batch goes through."""

    answer: Callable[[EvaluationContext, QuestionBatch], Answered] = answer
    judge: Callable[[EvaluationContext, Answered], Judged] = judge
    record: Callable[[EvaluationContext, Judged], list[Record]] = record


USUAL = EvaluationStages()


# ---- records


def about(index: int, question: Example) -> Record:
    """The part of a record that describes the question."""
    known = {"index": index, "id": question.id, "category": question.category, "answers": list(question.answer)}
    known |= {"question": question.question}
    return known | ({"fields": dict(question.fields)} if question.fields else {})


def unanswered(index: int, question: Example, why: str, answers: int) -> Record:
    """The record of a question that could not be asked: it is wrong, and counts in no rate of operations."""
    nothing = dict.fromkeys(
        ("operations", "executed", "failed", "calls", "tools", "unrecognised", "tokens", "stop", "responses"), []
    )
    wrong = {"given": [None] * answers, "score": [0.0] * answers, "accuracy": [0.0] * answers}
    return {**about(index, question), **wrong, **nothing, "shrunk": False, "unanswered": why}


def record_of(index: int, question: Example, judged: Judged, rows: slice, language: Language) -> Record:
    """The record of a question: lists have an entry for each answer."""
    t, texts = take_rows(judged.answered.trajectories, rows), judged.answered.texts[rows]
    return {
        **about(index, question),
        "given": [given_answer(text) for text in texts],
        **{name: [value or 0.0 for value in values[rows]] for name, values in judged.scores.items()},
        "operations": executed_calls(t).tolist(),
        "executed": answered_calls(t).tolist(),
        "failed": failed_calls(t).tolist(),
        "calls": t.num_calls.tolist(),
        "tools": [called_tools(t, row, language.tools) for row in range(len(texts))],
        "unrecognised": [len(unrecognised_turns(text, language)) for text in texts],
        "tokens": np.sum(t.loss_mask, axis=1).tolist(),
        "stop": [STOP_REASONS[int(x)] for x in t.stop],
        "responses": texts,
    }


def called_tools(t: Trajectories, row: int, tools: Sequence[Tool]) -> list[str]:
    """The names of the tools that the calls of a row named, in order; "" of a call in which none could be read."""
    names = [tool.name for tool in tools]
    return ["" if tool == UNREADABLE else names[tool] for tool in t.calls.tool[row, : t.num_calls[row]].tolist()]


def evidence_of(answered: Answered, at: int, rows: slice) -> Record:
    """The part of a record about the evidence of the question at index `at` of its batch (`evidence.looked_at`)."""
    question, query = answered.asked.questions[at], answered.asked.queries[at]
    if question.video or len(query.images) != 1 or not question.fields:
        return {}
    (whole,) = question.outline().images
    calls = take_rows(answered.trajectories, rows).calls
    each = [jax.tree.map(lambda x: x[row], calls) for row in range(len(calls.status))]  # noqa: B023
    return looked_at(question, (whole.shape[:2], query.images[0].shape[:2]), each)


def draw(context: EvaluationContext, judged: Judged, at: int, entry: Record) -> None:
    """Saves the transcript of the first answer to the question at index `at` of its batch."""
    asked = judged.answered.asked
    question = asked.questions[at]
    first = take_rows(judged.answered.trajectories, [at * context.limits.group_size])
    tools, query = context.policy.tables.tools, asked.queries[at]
    conversation = transcript.make_transcript(
        materialize_on_host(first, judged.answered.images[[at]], tools, context.limits),
        0,
        query,
        context.policy.vocabulary,
        tools=tools,
        answer=entry["given"][0],
        reference=" / ".join(question.answer),
        correct=entry["score"][0] >= 0.5,
        title=f"{question.id}: {question.category}" if question.category else question.id,
        category=question.category,
    )
    transcript.save(context.directory / "traces" / f"{asked.numbers[at]}.json", [conversation])
