"""A model answers a benchmark: batches of static shape, answers scored, a record a question."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from pixel_jax.data.digests import Digests, digest_rows, digest_sources
from pixel_jax.data.images import ImageError
from pixel_jax.data.rooms import Measured, Place, places, prompt_shape
from pixel_jax.data.shapes import BatchShape, training_work
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.evaluation import trace as traces
from pixel_jax.evaluation.config import BenchmarkConfig, Bucket, Mode
from pixel_jax.evaluation.questions import Question
from pixel_jax.evaluation.results import Results, read_records
from pixel_jax.identity import RunError, settle
from pixel_jax.models.config import Qwen2_5_VLConfig
from pixel_jax.models.qwen2_5_vl import Qwen2_5_VL
from pixel_jax.parallel.memory import PICTURES, device_memory
from pixel_jax.rollout.config import RolloutConfig
from pixel_jax.rollout.prompts import Query, build_prompts
from pixel_jax.rollout.rollout import rollout
from pixel_jax.rollout.trajectory import STOP_REASONS, Tables, Trajectories, executed_calls, to_host
from pixel_jax.training.answers import given_answer
from pixel_jax.training.progress import Progress
from pixel_jax.training.scorers import Reference, Scorer, ScorerConfig

LOADERS = 8  # threads that decode images


def rollout_config(config: RolloutConfig, mode: Mode, max_side: int) -> RolloutConfig:
    """The rollout of a mode. Without operations nothing is executed, also if the model calls out of habit."""
    config = dataclasses.replace(config, max_side=max_side)
    if mode == "none":
        return dataclasses.replace(config, max_calls=0)
    return dataclasses.replace(config, blank=True) if mode == "blank" else config


def guidelines(mode: Mode) -> str:
    return "notool" if mode == "none" else "vcot"


def outline(question: Question) -> Query:
    """`question` with pictures of the right sizes and no pixels."""
    pictures = [np.broadcast_to(np.uint8(0), (*size, 3)) for size in question.sizes()]
    return Query(question.question, pictures, question.is_video, question.seconds or 1.0)


def shapes_of(
    buckets: Sequence[Bucket] | None, config: RolloutConfig, network: Qwen2_5_VLConfig, batch: int
) -> Sequence[BatchShape] | Measured:
    """The shapes of prompts that buckets are, for pictures and for videos; or by what they are worked out."""
    if buckets is None:
        return Measured(training_work(network), batch, device_memory() // PICTURES)
    return [prompt_shape(*bucket, config, video=video) for bucket in buckets for video in (False, True)]


def about(index: int, question: Question) -> dict[str, Any]:
    return {"index": index, "id": question.id, "category": question.category, "answers": list(question.answers)}


def unanswered(index: int, question: Question, why: str, answers: int) -> dict[str, Any]:
    """What is kept of a question that could not be asked: it is wrong, and did nothing that a rate could be made of."""
    nothing = dict.fromkeys(("operations", "executed", "failed", "calls", "tokens", "stop", "responses"), [])
    wrong = {"given": [None] * answers, "score": [0.0] * answers, "accuracy": [0.0] * answers}
    return {**about(index, question), **wrong, **nothing, "shrunk": False, "unanswered": why}


def record(
    index: int,
    question: Question,
    t: Trajectories,
    rows: range,
    texts: list[str],
    scores: dict[str, list[float | None]],
) -> dict[str, Any]:
    """What is kept of a question: lists have an entry an answer."""
    observation = t.calls.observation[rows.start : rows.stop]
    return {
        **about(index, question),
        "given": [given_answer(text) for text in texts],
        **{name: [value or 0.0 for value in found] for name, found in scores.items()},
        "operations": executed_calls(t)[rows.start : rows.stop].tolist(),
        "executed": np.sum(observation >= 0, axis=1).tolist(),
        "failed": np.sum(observation > 1, axis=1).tolist(),
        "calls": t.num_calls[rows.start : rows.stop].tolist(),
        "tokens": np.sum(t.chosen[rows.start : rows.stop], axis=1).tolist(),
        "stop": [STOP_REASONS[int(x)] for x in t.stop[rows.start : rows.stop]],
        "responses": texts,
    }


def drawn(count: int, traces: int, seed: int) -> set[int]:
    """The questions that are drawn in the report."""
    return set(np.random.default_rng(seed).permutation(count)[:traces].tolist())


def evaluate(
    model: Qwen2_5_VL,
    vocabulary: Vocabulary,
    token_tables: Tables,
    questions: Sequence[Question],
    benchmark: BenchmarkConfig,
    config: RolloutConfig,
    directory: str | os.PathLike,
    *,
    mode: Mode = "operations",
    facts: dict[str, Any] | None = None,
    batch: int = 64,
    traced: int = 0,
    seed: int = 0,
    process: int = 0,
    processes: int = 1,
    digests: Digests | None = None,
    scorer: Scorer | None = None,
    label: str = "eval",
    stream=None,
) -> None:
    """Answer this process's share of `questions` that is not yet answered in `directory` (`results.py`).

    An answer depends on the question's number, the seed and the config, not on which process or batch it came in. A
    question whose pictures cannot be read, or that no bucket holds, ends nothing: it is recorded as wrong, with the reason,
    and is tried again when the run is started again.

    Args:
      token_tables: `pixel_jax.rollout.prompts.tables` of the vocabulary, the same for every call: they are part of the
        compiled program's identity.
      facts: further settings that a run in this directory is held to: the model, the split.
      traced: so many questions' first answers are kept as traces, `directory/traces/NUMBER.json`.
      process, processes: the share: every `processes`-th question from `process` on.
      digests: of the pictures, by which they are known; by default kept in `directory`.
      scorer: by default that of `benchmark.scorer`.
    """
    directory = pathlib.Path(directory)
    limits = rollout_config(config, mode, benchmark.max_side)
    settings = {
        **(facts or {}),
        "mode": mode,
        "seed": seed,
        "format": benchmark.format,
        "questions": digest_rows(questions, None),
        "scorer": dataclasses.asdict(benchmark.scorer),
        "buckets": benchmark.buckets,
        "rollout": dataclasses.asdict(limits),
    }
    directory.mkdir(parents=True, exist_ok=True)
    kept = {entry["index"]: entry for entry in read_records(directory) if "unanswered" not in entry}
    if process == 0:
        settle(directory, settings, done=len(kept) or None, of=len(questions))
    mine = range(process, len(questions), processes)
    with digests or Digests(directory / f"digests-{process}.json") as digests:
        pictures = dict(zip(mine, digest_sources([questions[i].images for i in mine], digests), strict=True))
    for i in mine:
        if i in kept and kept[i].get("pictures", pictures[i]) != pictures[i]:
            raise RunError(
                f"{directory}: question {questions[i].id!r} was answered about other pictures than {questions[i].images[0]} "
                "now holds: choose another directory"
            )
    results = Results(directory, process)
    todo = [i for i in mine if i not in kept]
    if not todo:
        return
    scorer = scorer or Scorer(benchmark.scorer)
    plain = Scorer(ScorerConfig(("released",)))  # `accuracy` is the released scorer's, whatever the benchmark's own
    keep = drawn(len(questions), traced, seed)
    (directory / "traces").mkdir(exist_ok=True)
    n = limits.group_size

    with ThreadPoolExecutor(LOADERS) as pool:
        shapes = shapes_of(benchmark.buckets, limits, model.config, batch)
        # Shapes that are worked out follow from all questions, so that a run that goes on has those that it had.
        wanted = range(len(questions)) if isinstance(shapes, Measured) else todo
        asked = [functools.partial(outline, questions[i]) for i in wanted]
        found = dict(zip(wanted, places(asked, shapes, vocabulary, limits, guidelines(mode)), strict=True))
        found = {i: found[i] for i in todo}
        placed = {i: x for i, x in found.items() if isinstance(x, Place)}
        keep_records = lambda records: results.append({**x, "pictures": pictures[x["index"]]} for x in records)
        keep_records(unanswered(i, questions[i], str(x), n) for i, x in found.items() if i not in placed)
        batches = [
            some[start : start + batch]
            for shape in dict.fromkeys(x.shape for x in placed.values())
            for some in [[i for i in todo if i in placed and placed[i].shape == shape]]
            for start in range(0, len(some), batch)
        ]

        def load(i: int) -> Query | ImageError:
            try:
                return placed[i].fit.apply(questions[i].query())
            except ImageError as error:
                return error

        def answer(queries: dict[int, Query]) -> list[dict[str, Any]]:
            some, shown = list(queries), list(queries.values())
            shape = placed[some[0]].shape
            spare = batch - len(some)  # repeats of the last question keep the shape
            prompts = build_prompts(
                shown + shown[-1:] * spare,
                vocabulary,
                token_tables,
                limits,
                width=shape.tokens,
                canvas=(shape.images, shape.height, shape.width),
                uids=some + some[-1:] * spare,
                guidelines=guidelines(mode),
            )
            t = to_host(rollout(model, prompts, jax.random.key(seed), limits))
            texts = [
                vocabulary.to_bytes(t.tokens[row][t.chosen[row]]).decode("utf-8", "replace")
                for row in range(len(some) * n)
            ]
            references = [Reference(questions[i].answers, questions[i].question) for i in some for _ in range(n)]
            scores = {"score": scorer(texts, references), "accuracy": plain(texts, references)}
            found = []
            for at, i in enumerate(some):
                rows = range(at * n, (at + 1) * n)
                mine = {name: values[rows.start : rows.stop] for name, values in scores.items()}
                entry = record(i, questions[i], t, rows, texts[rows.start : rows.stop], mine)
                found.append({**entry, "shrunk": placed[i].fit.scale < 1.0})
                if i in keep:
                    made = traces.make_trace(
                        t,
                        rows.start,
                        shown[at],
                        vocabulary,
                        answer=entry["given"][0],
                        reference=" / ".join(questions[i].answers),
                        correct=entry["score"][0] >= 0.5,
                        title=f"{questions[i].id}: {questions[i].category}"
                        if questions[i].category
                        else questions[i].id,
                    )
                    traces.save(directory / "traces" / f"{i}.json", [made])
            return found

        progress, finished = Progress(label, len(todo), stream=stream), len(todo) - len(placed)
        # Of all questions so far, those that an earlier start answered and those that could not be asked among them.
        scores = [float(np.mean(kept[i]["score"])) for i in mine if i in kept] + [0.0] * finished
        read = lambda number: [pool.submit(load, i) for i in batches[number]] if number < len(batches) else []
        ahead = read(0)
        for number, some in enumerate(batches):
            loaded = {i: future.result() for i, future in zip(some, ahead, strict=True)}
            ahead = read(number + 1)  # while this one is answered
            queries = {i: x for i, x in loaded.items() if isinstance(x, Query)}
            found = [unanswered(i, questions[i], str(x), n) for i, x in loaded.items() if i not in queries]
            if queries:
                found += answer(queries)
            keep_records(found)
            finished += len(some)
            scores += [float(np.mean(entry["score"])) for entry in found]
            progress.update(finished, {"score": float(np.mean(scores))})
