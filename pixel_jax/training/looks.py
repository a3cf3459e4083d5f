"""Evaluates a model on held-out examples during a run: its answers to their questions, and its loss on their traces."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from pixel_jax.data.packed import PackedRow, Packing
from pixel_jax.data.questions import ShapedQuestion
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.evaluation.transcript import Transcript, make_transcript
from pixel_jax.parallel.processes import is_main_process
from pixel_jax.parallel.sharding import (
    WHOLE,
    ProcessShard,
    all_rows,
    local_rows,
    process_shard,
    row_shards,
    shard_batch,
)
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.limits import single_answer
from pixel_jax.rollouts.materialize import VisualRecord, materialize_on_host
from pixel_jax.rollouts.prompts import Query, build_prompts
from pixel_jax.rollouts.rollout import rollout
from pixel_jax.rollouts.trajectory import (
    STOP_ANSWER,
    Tables,
    Trajectories,
    answered_calls,
    executed_calls,
    failed_calls,
    take_rows,
)
from pixel_jax.training.answers import given_answer, references_of
from pixel_jax.training.batch import Batch
from pixel_jax.training.losses import Normalizer, sft_loss
from pixel_jax.training.scorers import Reference, Scorer, ScorerConfig
from pixel_jax.training.stages import Weighed
from pixel_jax.training.state import Resharder, TrainState
from pixel_jax.training.steps import ForwardConfig, make_score_step

SIDE = 640  # pixels, the longest side of a picture in a transcript
RIGHT = 0.5  # an answer with a higher score is right


class Sampling(NamedTuple):
    """The arguments of a rollout besides the model: vocabulary, tables, meshes and the function that rolls out."""

    vocabulary: Vocabulary
    tables: Tables
    mesh: Mesh | None = None  # of training
    rollout_mesh: Mesh | None = None  # of rollouts; None: that of training
    roll: Callable = rollout  # `HostRollouts` if tools run on the host


class Answers(NamedTuple):
    """The answers to R questions, one row for each."""

    trajectories: Trajectories[VisualRecord]
    images: np.ndarray  # `Images` [R]
    texts: list[str]
    scores: list[float | None]


class Asker:
    """Asks held-out questions: each is answered once within `limits`, at the temperature of evaluation (`single_answer`)."""

    def __init__(
        self,
        asked: Sequence[ShapedQuestion],
        by: Sampling,
        limits: RolloutConfig,
        scorer: ScorerConfig,
        *,
        batch: int,
        drawn: int,
        seed: int,
        dtype: str | None,
    ):
        """Prepares the questions.

        Args:
            asked: questions that have a reference answer.
            by: the arguments of rollouts.
            limits: of rollouts; the temperature is replaced by that of evaluation.
            scorer: of the answers.
            batch: questions answered together; rounded up to a multiple of the shards of the meshes and of the processes.
            drawn: number of conversations that are returned, about the same questions each time.
            seed: of sampling.
            dtype: of the weights while answering.
        """
        self.asked, self.by = list(asked), by
        self.limits, self.scorer = single_answer(limits), Scorer(scorer)
        self.drawn, self.key, self.dtype = drawn, jax.random.key(seed), dtype
        self.shard = process_shard(by.mesh)
        shards = max(self.shard.count, *(row_shards(x) for x in (by.mesh, by.rollout_mesh) if x is not None), 1)
        self.batch = -(-min(batch, len(self.asked)) // shards) * shards

    def __call__(self, state: TrainState) -> tuple[dict[str, float], list[Transcript]]:
        """Returns the metrics of the state's model, and some of its conversations."""
        # A new one for each look: it holds frozen weights on the other mesh, and their memory has to be free between looks.
        actor = Resharder(self.by.mesh, self.by.rollout_mesh, self.dtype)(state)
        rows, conversations = [], []
        for some in self._batches():
            own = len(some) // self.shard.count
            mine = some[self.shard.index * own : (self.shard.index + 1) * own]
            answers = self._answer(actor, mine)
            rows.append(all_rows(_numbers(mine, answers), self.shard))
            if is_main_process():
                conversations += self._draw(mine, answers, self.drawn - len(conversations))
        return _metrics(np.concatenate(rows)), conversations

    def _batches(self) -> list[list[int]]:
        """Splits the questions into batches of one shape; the last question is repeated to fill a batch."""
        batches = []
        for shape in dict.fromkeys(x.shape for x in self.asked):
            indices = [i for i, x in enumerate(self.asked) if x.shape == shape]
            for start in range(0, len(indices), self.batch):
                some = indices[start : start + self.batch]
                batches.append(some + some[-1:] * (self.batch - len(some)))
        return batches

    def _answer(self, actor, mine: Sequence[int]) -> Answers:
        shape = self.asked[mine[0]].shape
        queries = [self.asked[i].prompt.apply(self.asked[i].example.query()) for i in mine]
        prompts = build_prompts(
            queries,
            self.by.vocabulary,
            self.by.tables,
            self.limits,
            shape=shape,
            uids=mine,
        )
        t = jax.tree.map(local_rows, self.by.roll(actor, prompts, self.key, self.limits))
        texts = written(t, self.by.vocabulary)
        examples = [self.asked[i].example for i in mine]
        references = [Reference(tuple(references_of(x.answer)), x.question) for x in examples]
        return Answers(t, prompts.images, texts, self.scorer(texts, references))

    def _draw(self, mine: Sequence[int], answers: Answers, most: int) -> list[Transcript]:
        t, images, texts, scores = answers
        conversations = []
        for row, i in list(enumerate(mine))[: max(most, 0)]:
            example = self.asked[i].example
            if i in mine[:row]:  # a repetition that fills the batch
                continue
            known: dict[str, Any] = {"answer": given_answer(texts[row]), "title": example.id}
            known |= {"category": example.category, "tools": self.by.tables.tools}
            if example.answer:
                known |= {
                    "reference": " / ".join(references_of(example.answer)),
                    "correct": (scores[row] or 0.0) > RIGHT,
                }
            seen = materialize_on_host(take_rows(t, [row]), images[[row]], self.by.tables.tools, self.limits)
            query = Query(example.question, images[row].arrays, example.video)
            conversations.append(make_transcript(seen, 0, query, self.by.vocabulary, side=SIDE, **known))
        return conversations


def written(t: Trajectories, vocabulary: Vocabulary) -> list[str]:
    """Decodes the text that the policy wrote in each row."""
    rows = zip(t.tokens, t.loss_mask, strict=True)
    return [vocabulary.to_bytes(tokens[loss_mask]).decode("utf-8", "replace") for tokens, loss_mask in rows]


NUMBERS = ("index", "score", "boxed", "operations", "executed", "failed", "tokens", "finished")


def _numbers(mine: Sequence[int], answers: Answers) -> np.ndarray:
    """The numbers of each row, float64 [rows, NUMBERS]."""
    t, _, texts, scores = answers
    columns = {
        "index": mine,
        "score": [score or 0.0 for score in scores],
        "boxed": [given_answer(text) is not None for text in texts],
        "operations": executed_calls(t),
        "executed": answered_calls(t),
        "failed": failed_calls(t),
        "tokens": np.sum(t.loss_mask, axis=1),
        "finished": t.stop == STOP_ANSWER,
    }
    return np.stack([np.asarray(columns[name], np.float64) for name in NUMBERS], axis=1)


def _metrics(rows: np.ndarray) -> dict[str, float]:
    """The means of the numbers [rows, NUMBERS] over all questions, each counted once."""
    _, once = np.unique(rows[:, 0], return_index=True)
    get = dict(zip(NUMBERS, rows[once].T, strict=True))
    metrics = {
        "accuracy": np.mean(get["score"] > RIGHT),
        "score": np.mean(get["score"]),
        "rapr": np.mean(get["operations"] > 0),
        "operations": np.mean(get["operations"]),
        "call_errors": np.sum(get["failed"]) / max(np.sum(get["executed"]), 1),
        "response_tokens": np.mean(get["tokens"]),
        "finished": np.mean(get["finished"]),
        "unboxed": 1 - np.mean(get["boxed"]),
        "questions": len(once),
    }
    return {name: float(x) for name, x in metrics.items()}


class HeldOutLoss:
    """Computes the loss of SFT on held-out traces, in batches no larger than a micro-batch of training."""

    def __init__(
        self, packing: Packing, forward: ForwardConfig, normalizer: Normalizer, rows: int, mesh: Mesh | None = None
    ):
        """Compiles the step; `rows` is the number of rows of a training batch, of all processes together."""
        self.packing, self.mesh = packing, mesh
        self.normalizer: Normalizer = normalizer
        self.shard = process_shard(mesh)
        shards = 1 if mesh is None else row_shards(mesh)
        most = max(map(len, packing.order.packed(0)))
        self.rows = -(-min(rows // (forward.micro_batches or 1), most) // shards) * shards
        turns = forward.micro_batches and 1  # None stays None: it is then chosen by the memory
        self.score = make_score_step(dataclasses.replace(forward, micro_batches=turns), mesh=mesh)

    def __call__(self, state: TrainState) -> tuple[dict[str, float], list[Transcript]]:
        """Returns the loss of the state's model, and no conversations."""
        sums = np.zeros(2)
        for bucket in self.packing.order.packed(0):
            for start in range(0, len(bucket), self.rows):
                sums += self._sums(bucket[start : start + self.rows], state)
        return {"loss": float(sums[0] / sums[1])}, []

    def _sums(self, rows: list[PackedRow], state: TrainState) -> np.ndarray:
        """The total and the denominator of the loss on packed rows of one bucket, float64 [2]."""
        own = self.rows // self.shard.count
        here = np.arange(self.shard.index * own, (self.shard.index + 1) * own)
        load = (self.packing.load(rows[min(i, len(rows) - 1)]) for i in here)
        batch: Batch = self.packing.collate(load, own)
        batch = batch._replace(weight=np.where(here < len(rows), batch.weight, 0).astype(np.float32))
        on_device = batch if self.mesh is None else shard_batch(batch, self.mesh)
        logprobs, entropy = (local_rows(x) for x in self.score(state.model, on_device))
        loss = sft_loss(
            logprobs, entropy, batch.loss_mask, batch.weight, normalizer=self.normalizer, segments=batch.segments
        )
        sums = np.array([[float(loss.total), float(loss.denominator)]])
        return all_rows(sums, self.shard).sum(axis=0)


class AllLooks:
    """Makes several looks, and combines their results."""

    def __init__(self, *looks):
        self.looks = looks

    def __call__(self, state: TrainState) -> tuple[dict[str, float], list[Transcript]]:
        """Returns the metrics and conversations of all looks."""
        metrics, conversations = {}, []
        for look in self.looks:
            numbers, traces = look(state)
            metrics |= numbers
            conversations += traces
        return metrics, conversations


def draw_rollouts(
    weighed: Weighed, rows: Sequence[int], vocabulary: Vocabulary, config: RolloutConfig, shard: ProcessShard = WHOLE
) -> list[Transcript]:
    """Makes the conversations of some of this process's rows, with their rewards and advantages.

    Training keeps no pixels: those that the rows saw are computed again from the prompts' images, on the host.
    """
    scored, collected = weighed.scored, weighed.scored.collected
    questions, trajectories = collected.questions, collected.trajectories
    n, first_row = config.group_size, shard.index * len(trajectories.stop)
    images = questions.prompts.images[np.asarray(rows) // n]
    t = materialize_on_host(take_rows(trajectories, np.asarray(rows)), images, questions.prompts.tables.tools, config)
    conversations = []
    for i, (row, text) in enumerate(zip(rows, written(t, vocabulary), strict=True)):
        example, at = questions.examples[row // n], divmod(first_row + row, n)
        is_video = bool(questions.prompts.is_video[row // n])
        known = {"answer": given_answer(text), "title": getattr(example, "id", "")}
        known |= {"category": getattr(example, "category", ""), "tools": questions.prompts.tables.tools}
        known |= {"reward": float(scored.reward[at]), "advantage": float(weighed.advantage[at])}
        known["terms"] = {name: float(values[at]) for name, values in scored.terms.items()}
        if scored.correct is not None:
            known |= {
                "correct": bool(scored.correct[at] > RIGHT),
                "reference": " / ".join(Reference.of(example).answers),
            }
        query = Query(getattr(example, "question", ""), images[i].arrays, is_video)
        conversations.append(make_transcript(t, i, query, vocabulary, side=SIDE, **known))
    return conversations
