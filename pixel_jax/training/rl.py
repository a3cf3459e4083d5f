"""Reinforcement learning with the curiosity reward: roll out, score, weigh, replay, update (Pixel Reasoner §4.2)."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from pixel_jax.config import positive
from pixel_jax.parallel.sharding import all_rows, local_rows, shard_batch, share
from pixel_jax.rollout.config import RolloutConfig
from pixel_jax.rollout.rollout import HostRollouts, rollout, static_shape
from pixel_jax.rollout.timing import seconds_of_operations
from pixel_jax.rollout.trajectory import (
    STOP_ANSWER,
    CallStatus,
    Prompts,
    Trajectories,
    answered_calls,
    executed_calls,
    failed_calls,
)
from pixel_jax.training import rewards
from pixel_jax.training.advantages import group_advantage, informative
from pixel_jax.training.batch import Batch, from_trajectories, take, with_patches
from pixel_jax.training.layouts import Resharder
from pixel_jax.training.loop import Laps, run
from pixel_jax.training.losses import PolicyLossConfig
from pixel_jax.training.optimizer import OptimizerConfig, make_optimizer
from pixel_jax.training.origins import RowShape, origins, see
from pixel_jax.training.packing import PackingConfig, pack_rows
from pixel_jax.training.preemption import NOTICE
from pixel_jax.training.replay import Replay, ReplayConfig
from pixel_jax.training.rewards import RewardConfig, RewardParts
from pixel_jax.training.scorers import Reference, Scorer
from pixel_jax.training.state import TrainState, init_state
from pixel_jax.training.steps import ForwardConfig, check_report, check_rows, make_rl_step, make_score_step
from pixel_jax.training.throughput import Throughput
from pixel_jax.training.writers import WriterName

T = TypeVar("T")
Score = Callable[[Trajectories, Sequence[Any]], np.ndarray]  # (R rows on the host, an answer a row) -> correct [R]


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """Defaults are the paper's, and the released code's where the paper is silent; the switches are in the parts."""

    iterations: int  # rollouts; an iteration makes as many updates as its rows fill train batches
    prompts: int = 512  # an iteration
    train_batch: int = 256  # rows an update
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    baseline: Literal["mean", "leave_one_out"] = "mean"  # of a group's rewards; RLOO leaves the row itself out
    scale_by_std: bool = False  # GRPO as published divides by the group's deviation, the released code does not
    # Rows that ran out of calls, images or tokens before they answered carry no loss, good or bad (Mini-o3's over-turn
    # masking, arXiv:2509.07969; DAPO's overlong filtering). Their rewards still count in their group's mean, and they in the
    # loss's denominator, unless `loss.masked_traces` says otherwise.
    mask_unfinished: bool = False
    replay: ReplayConfig = ReplayConfig()
    loss: PolicyLossConfig = PolicyLossConfig()
    # The ratio's denominator: recomputed by the trainer before the updates, or as the sampler recorded it (one forward less).
    old_logprobs: Literal["recomputed", "sampler"] = "recomputed"
    trainable: str = ".*"  # the vision tower is trained, too
    optimizer: OptimizerConfig = OptimizerConfig()
    packing: PackingConfig | None = None  # of an update's rows; None: each keeps a row, as long as the longest may be
    forward: ForwardConfig = ForwardConfig()
    seed: int = 0  # of sampling and of the replay
    # Every so many iterations the rows' operations are carried out again, alone, to say how long they take
    # (`seconds_operations`, part of `seconds_rollout`): inside the rollout's program nothing can be timed. 0: never.
    time_operations: int = 0
    save_every: int = 1  # iterations: a checkpoint
    keep: int = 2  # checkpoints, the newest
    writers: tuple[WriterName, ...] = ()  # of metrics, besides JSON lines

    def __post_init__(self):
        positive(self, "iterations", "prompts", "train_batch", "save_every", "keep")
        if self.time_operations < 0:
            raise ValueError(f"time_operations must not be negative: {self.time_operations}")
        if self.rows % self.train_batch:
            raise ValueError(
                f"{self.prompts} prompts x {self.rollout.group_size} rollouts = {self.rows} rows are no multiple of "
                f"train_batch {self.train_batch}"
            )
        if self.rollout.temperature <= 0:
            raise ValueError("greedy rollouts (temperature 0) are all alike: nothing can be learned from them")
        if self.loss.importance_cap is not None and self.old_logprobs == "sampler":
            raise ValueError("importance_cap weighs the trainer against the sampler: old_logprobs must be 'recomputed'")
        if self.loss.kl and "lora_" not in self.trainable:
            raise ValueError(
                f"kl {self.loss.kl}: the reference is the model without adapters, so these alone may be trained "
                f"(trainable '.*lora_', not {self.trainable!r})"
            )
        if self.replay.kind == "dynamic" and self.replay.capacity < self.rows:
            raise ValueError(f"{self.rows} rows can never be collected in a buffer of capacity {self.replay.capacity}")

    @property
    def rows(self) -> int:
        return self.prompts * self.rollout.group_size

    @property
    def updates(self) -> int:
        """In one iteration."""
        return self.rows // self.train_batch


def text_score(decode: Callable[[Sequence[int]], str], config: RewardConfig) -> Score:
    """Scores what the policy wrote, as text, by the rules of `config.scorer`; `decode` turns token ids into text.

    The answer of a row is a `Reference`, or whatever `Reference.of` makes one of.
    """
    scorer = Scorer(config.scorer)

    def score(trajectories: Trajectories, answers: Sequence[Any]) -> np.ndarray:
        texts = [decode(row[chosen]) for row, chosen in zip(trajectories.tokens, trajectories.chosen, strict=True)]
        found = scorer(texts, [Reference.of(answer) for answer in answers])
        return np.array([config.unparsable if x is None else x for x in found], np.float32)

    return score


def shaped_rewards(
    trajectories: Trajectories, correct: np.ndarray, is_video: np.ndarray, n: int, config: RewardConfig
) -> RewardParts:
    """The shaped reward of host trajectories, [groups, n]; `correct` [R], `is_video` [groups]."""
    status = trajectories.calls.status
    ops = executed_calls(trajectories) if config.count == "executed" else trajectories.num_calls
    answered = answered_calls(trajectories)
    last = np.take_along_axis(status, np.maximum(answered - 1, 0)[:, None], axis=1)[:, 0]
    failed_last = (answered > 0) & (last == CallStatus.FAILED)
    lengths = np.sum(trajectories.chosen, axis=1)
    correct, ops, failed_last, lengths = (x.reshape(-1, n) for x in (correct, ops, failed_last, lengths))
    return rewards.shape(correct, ops, failed_last, is_video, lengths, config)


def rollout_metrics(
    trajectories: Trajectories, correct: np.ndarray, parts: RewardParts, teaching: np.ndarray
) -> dict[str, float]:
    """What the rows of an iteration did, as plain numbers."""
    ops, calls = executed_calls(trajectories), trajectories.num_calls
    lengths = np.sum(trajectories.chosen, axis=1)
    facts = {
        "accuracy": np.mean(correct > 0.5),
        "rapr": np.mean(ops > 0),  # rate of pixel-space reasoning
        "reward": np.mean(parts.total),
        **{f"reward_{name}": np.mean(part) for name, part in parts._asdict().items()},
        "group_variance": np.mean(np.var(parts.total, axis=1)),
        "operations": np.mean(ops),
        "calls": np.mean(calls),
        "call_errors": np.sum(failed_calls(trajectories)) / max(np.sum(answered_calls(trajectories)), 1),
        "informative": np.mean(teaching),  # share of groups
        "response_tokens": np.mean(lengths),
        "response_tokens_max": np.max(lengths),
        "row_tokens": np.mean(np.sum(trajectories.valid, axis=1)),  # prompt and what was shown included
        "finished": np.mean(trajectories.stop == STOP_ANSWER),
    }
    return {name: float(x) for name, x in facts.items()}


def mask_unfinished(batch: Batch, stop: np.ndarray) -> Batch:
    """The rows that did not end in an answer (`stop` int32 [R]) without tokens that carry loss, and never replayed."""
    finished = stop == STOP_ANSWER
    return batch._replace(
        chosen=batch.chosen & finished[:, None], advantage=np.where(finished, batch.advantage, 0).astype(np.float32)
    )


def rl(
    model: T,
    data: Iterator[tuple[Prompts, Sequence[Any]]],
    score: Score,
    config: RLConfig,
    *,
    directory: str | os.PathLike | None = None,
    facts: Mapping[str, Any] | None = None,
    resume_changed: bool = False,
    mesh: Mesh | None = None,
    rollout_mesh: Mesh | None = None,
    rollouts: HostRollouts | None = None,
    label: str = "rl",
    stream=None,
) -> T:
    """The model after `config.iterations` rounds of rollout and updates.

    `data` yields prompts and one reference answer (whatever `score` understands) for each; it has `get_state` and
    `set_state`. Every key and every order follows from `config.seed` and the iteration, so a resumed run is the same run.
    An iteration that is told to go before its updates is given up: it may last longer than there is time. `directory`,
    `facts` and `resume_changed` as in `sft`.

    Rollouts may lie otherwise than training: on `rollout_mesh`, of the same devices. With several processes `data` yields
    this one's `share` of the prompts (the same on both meshes), `score` sees the rows that came of them, and only their
    rewards and records are gathered. Pixels are not kept: what a row saw is cut again from its prompt's images, where and when
    it is scored or trained on. `rollouts`: where tools run on the host; a run with them need not be the same when it is resumed.
    """
    optimizer = make_optimizer(config.optimizer, config.iterations * config.updates)
    temperatures = {
        "temperature": config.rollout.temperature,
        "later_temperature": config.rollout.later_temperature,
    }
    update = make_rl_step(config.forward, config.loss, optimizer, mesh=mesh, **temperatures)
    scorer = make_score_step(config.forward, mesh=mesh, **temperatures)
    part = share(mesh)
    policy = Resharder(mesh, rollout_mesh, config.forward.compute_dtype)
    replay = Replay(config.replay, config.seed, part)
    throughput = Throughput(model, config.trainable, mesh)
    place = (lambda batch: batch) if mesh is None else (lambda batch: shard_batch(batch, mesh))
    roll = rollout if rollouts is None else rollouts
    n, share_of_update = config.rollout.group_size, config.train_batch // part.count

    def old_logprobs(state: TrainState, batch: Batch, seen: Callable[[Batch], Batch]) -> np.ndarray:
        model, rows = state.model, batch.tokens.shape[0]
        found = []
        for start in range(0, rows, share_of_update):
            NOTICE.obey()
            part = seen(take(batch, slice(start, start + share_of_update)))
            found.append(local_rows(scorer(model, place(part))[0]))
        return np.concatenate(found)

    def step(state: TrainState, i: int):
        laps = Laps()
        prompts, answers = NOTICE.next(data)
        if len(answers) * part.count != config.prompts:
            raise ValueError(f"{len(answers) * part.count} prompts, the configuration says {config.prompts}")
        laps.lap("input")
        key = jax.random.fold_in(jax.random.key(config.seed), i)
        # Keys follow from the place in the whole batch, whoever has it.
        prompts = prompts._replace(uid=part.index * len(answers) + np.arange(len(answers), dtype=np.int32))
        actor = policy(state)
        trajectories = jax.tree.map(local_rows, roll(actor, prompts, key, config.rollout, pixels=False))
        laps.lap("rollout")
        NOTICE.obey()
        timed = {}
        if config.time_operations and i % config.time_operations == 0:
            timed["seconds_operations"] = seconds_of_operations(actor, prompts, trajectories, config.rollout)
            laps.lap("timing")
        del actor  # where it is a copy, the updates need its memory
        correct = np.asarray(score(trajectories, [answer for answer in answers for _ in range(n)]), np.float32)
        correct = all_rows(correct, part)
        check_rows(correct, f"iteration {i}: the correctness")
        records = all_rows(trajectories._replace(visual=None), part)  # of all rows, in all processes
        is_video = all_rows(np.asarray(prompts.is_video), part)
        parts = shaped_rewards(records, correct, is_video, n, config.reward)
        shaped = parts.total
        check_rows(shaped.reshape(-1), f"iteration {i}: the reward")
        teaching = informative(shaped, threshold=config.replay.threshold)
        facts = rollout_metrics(records, correct, parts, teaching)
        facts |= rollouts.facts() if rollouts is not None else {}
        advantage = group_advantage(shaped, baseline=config.baseline, scale_by_std=config.scale_by_std).reshape(-1)
        own = slice(part.index * len(trajectories.stop), (part.index + 1) * len(trajectories.stop))
        batch = from_trajectories(trajectories, advantage[own])
        shape = static_shape(prompts, config.rollout, mesh)
        room = RowShape(batch.tokens.shape[1], *prompts.canvases.shape[1:4], shape.views, shape.patches)
        batch = with_patches(batch, origins(prompts, trajectories.calls, config.rollout, shape))
        del prompts  # its images, without the room around them, are all that is needed from here on

        def seen(rows: Batch) -> Batch:
            return with_patches(rows, see(rows, room, config.rollout, shape, mesh))

        if config.mask_unfinished:
            batch = mask_unfinished(batch, trajectories.stop)
        laps.lap("scoring")
        if config.old_logprobs == "recomputed" and (teaching.any() or config.replay.kind == "none"):
            batch = batch._replace(old_logprobs=old_logprobs(state, batch, seen))
            check_rows(batch.old_logprobs, f"iteration {i}: the log-probabilities")
        NOTICE.obey()
        laps.lap("old_logprobs")
        selected = replay.select(batch, np.repeat(teaching, n), room)
        facts["updates"] = 0 if selected is None else config.updates
        reports = []
        for u in range(facts["updates"]):
            rows = seen(replay.batch(selected[u * config.train_batch : (u + 1) * config.train_batch]))
            if config.packing:
                rows = pack_rows(jax.tree.map(local_rows, rows), config.packing)
            throughput.count(rows)
            state, report = update(state, place(rows))
            reports.append(check_report(report, i * config.updates + u))
        facts |= {
            name: float(np.mean([report[name] for report in reports])) for name in (reports[0] if reports else ())
        }
        laps.lap("update")
        if reports:
            facts |= throughput.facts(laps.facts["seconds_update"])
        return state, facts | laps.facts | timed

    return run(
        label,
        init_state(model, optimizer, trainable=config.trainable, mesh=mesh),
        step,
        steps=config.iterations,
        host={"data": data},
        local={"replay": replay},
        directory=directory,
        facts={**(facts or {}), "rl": dataclasses.asdict(config)},
        resume_changed=resume_changed,
        save_every=config.save_every,
        keep=config.keep,
        mesh=mesh,
        shown=("accuracy", "rapr", "reward", "loss"),
        writers=config.writers,
        stream=stream,
    ).model
