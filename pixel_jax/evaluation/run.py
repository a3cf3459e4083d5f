"""Evaluates a model on a benchmark: batches of static shape, scored answers, and a record for each question."""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pixel_jax.data.batches import read_ahead
from pixel_jax.data.digests import Digests, digest_rows, digest_sources
from pixel_jax.data.example import Example
from pixel_jax.data.images import ImageError
from pixel_jax.data.prompt_shapes import Assignment, ShapeFinder
from pixel_jax.data.shapes import AutoShapes, training_work
from pixel_jax.evaluation.config import Bucket
from pixel_jax.evaluation.modes import Mode
from pixel_jax.evaluation.results import Results, read_records
from pixel_jax.evaluation.stages import (
    USUAL,
    EvaluationContext,
    EvaluationStages,
    Exam,
    Policy,
    QuestionBatch,
    Record,
    unanswered,
)
from pixel_jax.identity import RunError, settle
from pixel_jax.models.config import ModelConfig
from pixel_jax.parallel.memory import PICTURES_DIVISOR, device_memory
from pixel_jax.parallel.processes import waiting
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.prompts import Query
from pixel_jax.rollouts.shapes import BatchShape, prompt_shape
from pixel_jax.training.progress import ProgressLine

LOADERS = 8  # threads that decode images


def shapes_of(
    buckets: Sequence[Bucket] | None, config: RolloutConfig, network: ModelConfig, batch: int
) -> Sequence[BatchShape] | AutoShapes:
    """The batch shapes of prompts: those of the buckets, for pictures and for videos, or how they are worked out."""
    if buckets is None:
        return AutoShapes(training_work(network), batch, device_memory() // PICTURES_DIVISOR // batch)
    return [prompt_shape(*bucket, config, video=video) for bucket in buckets for video in (False, True)]


def evaluate(
    policy: Policy,
    questions: Sequence[Example],
    exam: Exam,
    directory: str | os.PathLike,
    *,
    settings: Mapping[str, Any] | None = None,
    shard: tuple[int, int] = (0, 1),
    digests: Digests | None = None,
    scorer: Callable[..., Any] | None = None,
    stages: EvaluationStages = USUAL,
    label: str = "eval",
) -> None:
    """Answers this process's share of the questions that are not yet answered in `directory` (`results.py`).

    An answer depends on the question's number, the seed and the config, not on the process or the batch. A question whose
    images cannot be read, or that no bucket holds, is recorded as wrong with the reason; the next start tries it again.

    Args:
      policy: the model, its vocabulary and tables.
      questions: the questions of the benchmark.
      exam: the settings of the benchmark and of the rollout.
      directory: the directory of the results; an interrupted run goes on there.
      settings: further settings that identify the run: the model, the split.
      shard: (process, processes): the share is every `processes`-th question from `process` on.
      digests: the cache of digests of the images; by default a file in `directory`.
      scorer: the scorer; by default that of `exam.benchmark.scorer`.
      stages: the functions that a batch goes through.
      label: the label of the progress line.
    """
    directory, (process, processes) = pathlib.Path(directory), shard
    (directory / "traces").mkdir(parents=True, exist_ok=True)
    answered = restore(directory, settings_of(policy, questions, exam, settings), process, len(questions))
    indices = range(process, len(questions), processes)
    reading = waiting("making digests of the pictures")
    with reading, digests or Digests(directory / f"digests-{process}.json") as digests:
        pictures = dict(zip(indices, digest_sources([questions[i].images for i in indices], digests), strict=True))
    check_pictures(directory, questions, answered, pictures)
    results, todo = Results(directory, process), [i for i in indices if i not in answered]
    if not todo:
        return
    context = EvaluationContext(policy, exam, directory, len(questions), scorer)

    def keep(records: Iterable[Record]) -> None:
        results.append({**x, "pictures": pictures[x["index"]]} for x in records)

    with waiting("writing the questions as tokens"):
        assigned = find_shapes(policy, questions, exam, todo)
    runnable = {i: x for i, x in assigned.items() if isinstance(x, Assignment)}
    n = context.limits.group_size
    keep(unanswered(i, questions[i], str(x), n) for i, x in assigned.items() if i not in runnable)
    progress, finished = ProgressLine(label, len(todo)), len(todo) - len(runnable)
    # The scores of all questions so far, with those that an earlier start answered and those that could not be asked.
    scores = [float(np.mean(answered[i]["score"])) for i in indices if i in answered] + [0.0] * finished
    with waiting(f"{label}: the first of {len(runnable)} questions") as first:
        for loaded in load_batches(questions, runnable, exam.batch, exam.way):
            records = answer_batch(context, stages, questions, runnable, loaded)
            first.end()
            keep(records)
            finished += len(loaded)
            scores += [float(np.mean(x["score"])) for x in records]
            progress.update(finished, {"score": float(np.mean(scores))})


def settings_of(
    policy: Policy, questions: Sequence[Example], exam: Exam, more: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The settings that identify a run, with `more` of the caller."""
    return {
        **(more or {}),
        "mode": exam.mode,
        "seed": exam.seed,
        "format": exam.benchmark.format,
        "questions": digest_rows(questions, None),
        "scorer": dataclasses.asdict(exam.benchmark.scorer),
        "buckets": exam.benchmark.buckets,
        "rollout": dataclasses.asdict(exam.limits),
        "tools": [tool.name for tool in policy.tables.tools],
        **({"assistant_prefix": exam.prefix} if exam.prefix else {}),
    }


def restore(directory: pathlib.Path, settings: Mapping[str, Any], process: int, count: int) -> dict[int, Record]:
    """The records of an earlier start, by the numbers of the questions, of which there are `count`.

    Raises:
        RunError: the directory holds another run.
    """
    records = {entry["index"]: entry for entry in read_records(directory) if "unanswered" not in entry}
    if process == 0:
        settle(directory, settings, done=len(records) or None, of=count)
    return records


def check_pictures(
    directory: pathlib.Path, questions: Sequence[Example], records: Mapping[int, Record], pictures: Mapping[int, Any]
) -> None:
    """Checks that questions were answered about the images that they have now.

    Raises:
        RunError: an image has changed.
    """
    for i, digest in pictures.items():
        if i in records and records[i].get("pictures", digest) != digest:
            raise RunError(
                f"{directory}: question {questions[i].id!r} was answered about other pictures than {questions[i].images[0]} "
                "now holds: choose another directory"
            )


def find_shapes(
    policy: Policy, questions: Sequence[Example], exam: Exam, todo: Sequence[int]
) -> dict[int, Assignment | ValueError]:
    """The batch shape of each of the questions `todo`, or the error that says why it has none."""
    limits = exam.limits
    shapes = shapes_of(exam.benchmark.buckets, limits, policy.model.config, exam.batch)
    # Shapes that are worked out follow from all questions, so that a run that goes on has those that it had.
    wanted = range(len(questions)) if isinstance(shapes, AutoShapes) else todo
    outlines = [functools.partial(_shown, exam.way, questions[i], questions[i].outline) for i in wanted]
    finder = ShapeFinder(policy.vocabulary, limits, exam.guidelines, policy.tables.tools)
    assigned = dict(zip(wanted, finder.assign_all(outlines, shapes), strict=True))
    return {i: assigned[i] for i in todo}


def _shown(way: Mode, question: Example, read: Callable[[], Query]) -> Query:
    return way.show(question, read())


def load_batches(
    questions: Sequence[Example], assigned: Mapping[int, Assignment], batch: int, way: Mode
) -> Iterator[dict[int, Query | ImageError]]:
    """Batches of one shape with their pixels, or the reason why they cannot be read; the next batch is read ahead."""
    by_shape: dict[BatchShape, list[int]] = {}
    for i, assignment in assigned.items():
        by_shape.setdefault(assignment.shape, []).append(i)
    batches = [some[at : at + batch] for some in by_shape.values() for at in range(0, len(some), batch)]
    load = functools.partial(load_query, questions, assigned, way)
    queries = read_ahead([i for some in batches for i in some], load, threads=LOADERS, ahead=batch)
    with contextlib.closing(queries):
        for some in batches:
            yield dict(zip(some, queries, strict=False))


def load_query(
    questions: Sequence[Example], assigned: Mapping[int, Assignment], way: Mode, i: int
) -> Query | ImageError:
    """The query of question `i` with the pixels that are shown, or the reason why they cannot be read."""
    try:
        return assigned[i].prompt.apply(way.show(questions[i], questions[i].query()))
    except ImageError as error:
        return error


def answer_batch(
    context: EvaluationContext,
    stages: EvaluationStages,
    questions: Sequence[Example],
    assigned: Mapping[int, Assignment],
    loaded: Mapping[int, Query | ImageError],
) -> list[Record]:
    """The records of a batch after all stages; a question that could not be read is recorded as wrong."""
    n = context.limits.group_size
    queries = {i: x for i, x in loaded.items() if isinstance(x, Query)}
    records = [unanswered(i, questions[i], str(x), n) for i, x in loaded.items() if i not in queries]
    if queries:
        batch = QuestionBatch(
            list(queries), [questions[i] for i in queries], list(queries.values()), [assigned[i] for i in queries]
        )
        records += stages.record(context, stages.judge(context, stages.answer(context, batch)))
    return records
