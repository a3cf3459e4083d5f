"""Reinforcement learning with the curiosity reward: roll out, score, weigh, replay, update (Pixel Reasoner §4.2)."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from pixel_jax.config import positive
from pixel_jax.dialog.unrecognised import unrecognised_rate
from pixel_jax.models.model import Model
from pixel_jax.parallel.processes import all_gather, among, barrier
from pixel_jax.parallel.sharding import NONE, WHOLE, ProcessShard, process_shard, shard_batch
from pixel_jax.rollouts.config import RolloutBudget, RolloutConfig
from pixel_jax.rollouts.trajectory import STOP_ANSWER, HostPrompts, answered_calls, executed_calls, failed_calls
from pixel_jax.training.batch import Batch, PackingConfig
from pixel_jax.training.cost import Throughput
from pixel_jax.training.diagnosis import Diagnosis, outcome_metrics
from pixel_jax.training.loop import ANYTHING, Identity, Keeping, Loop, Observer, RunSteps, Timer
from pixel_jax.training.losses import PolicyLossConfig
from pixel_jax.training.optimizer import OptimizerConfig, make_optimizer
from pixel_jax.training.preemption import NOTICE, Preempted
from pixel_jax.training.replay import Replay, ReplayConfig
from pixel_jax.training.rewards import RewardConfig
from pixel_jax.training.sources import source_of, token_ages
from pixel_jax.training.stages import Collected, Questions, Stages, Weighed
from pixel_jax.training.state import Pools, Resharder, TrainState, init_state
from pixel_jax.training.steps import ForwardConfig, make_rl_step, make_score_step
from pixel_jax.training.writers import WriterName


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """The settings of RL: the paper's, and the released code's where the paper gives none."""

    iterations: int  # rollouts; each is followed by one update for every `train_batch` rows
    prompts: int = 512  # of an iteration
    train_batch: int = 256  # rows of an update
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    baseline: Literal["mean", "leave_one_out"] = "mean"  # of a group's rewards; RLOO leaves the row itself out
    scale_by_std: bool = False  # GRPO as published divides by the group's deviation, the released code does not
    # Whether rows that ran out of calls, images or tokens before they answered carry no loss (Mini-o3's over-turn masking,
    # arXiv:2509.07969; DAPO's overlong filtering). Their rewards still count in the mean of their group, and the rows in the
    # loss's denominator, unless `loss.masked_traces` leaves them out.
    mask_unfinished: bool = False
    replay: ReplayConfig = ReplayConfig()
    loss: PolicyLossConfig = PolicyLossConfig()
    # The ratio's denominator: recomputed by the trainer before the updates, or the sampler's, which saves a forward pass.
    old_logprobs: Literal["recomputed", "sampler"] = "recomputed"
    trainable: str = (
        ".*"  # regular expression of the paths of trained weights; by default all, the vision tower included
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    packing: PackingConfig | None = None  # of an update's rows; None: rows are not packed, and have the greatest length
    forward: ForwardConfig = ForwardConfig()
    seed: int = 0  # of sampling and of the replay
    # Every so many iterations the rows' operations are repeated on their own to measure their time (`seconds_operations`, which
    # is part of `seconds_rollout`), because nothing can be timed inside the rollout's program. 0: never.
    time_operations: int = 0
    # Ends a rollout before all its rows are done; the others carry over to the next (`pixel_jax.training.sources`).
    rollout_budget: RolloutBudget = RolloutBudget()
    # How many iterations old the policy is that writes the rows: while one iteration is trained on, the rows of later ones are
    # written by devices of their own (`rollout_mesh`). 0: rollouts and training take turns.
    staleness: int = 0
    save_every: int = 1  # iterations between two checkpoints
    keep: int = 2  # the number of newest checkpoints that are kept
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
        if type(self.staleness) is not int or not 0 <= self.staleness <= max(0, self.iterations - 1):
            raise ValueError(
                f"staleness {self.staleness!r} in a run of {self.iterations} iterations: give a whole number from 0 to "
                f"{self.iterations - 1}"
            )
        older = [f"staleness {self.staleness}"] * bool(self.staleness) + [
            "a rollout_budget"
        ] * self.rollout_budget.limits
        if older and self.loss.importance_cap is None and self.old_logprobs == "recomputed":
            raise ValueError(
                f"with {' and '.join(older)} rows are written by older policies than are trained: set loss.importance_cap, for "
                "example to 2.0 (truncated importance sampling), or old_logprobs to 'sampler'"
            )
        if self.replay.kind == "dynamic" and self.replay.capacity < self.rows:
            raise ValueError(f"{self.rows} rows can never be collected in a buffer of capacity {self.replay.capacity}")

    @property
    def rows(self) -> int:
        """Rows of an iteration."""
        return self.prompts * self.rollout.group_size

    @property
    def updates(self) -> int:
        """Updates of an iteration."""
        return self.rows // self.train_batch


class Learner:
    """The objects that the stages of an iteration use: compiled steps, the replay, and the meshes.

    `shard` is the part of the rows that this process has: in the stages those that it trains on, in a rollout those that it
    writes.
    """

    def __init__(
        self,
        model,
        data: Iterator[tuple],
        stages: Stages,
        config: RLConfig,
        *,
        mesh: Mesh | None = None,
        rollout_mesh: Mesh | None = None,
    ):
        self.data: Any = data
        self.stages, self.config, self.mesh, self.rollout_mesh = stages, config, mesh, rollout_mesh
        self.notice = NOTICE
        self.pools = pools = Pools.of(mesh, rollout_mesh)
        if config.staleness and not pools.apart:
            raise ValueError(
                f"staleness {config.staleness}: rows are written ahead only by devices of their own; give `rollout_mesh` other "
                "devices than `mesh`"
            )
        if pools.across and not config.staleness:
            raise ValueError(
                f"rollouts have the processes {list(pools.writers)} and training has {list(pools.trainers)}: one would wait "
                "for the other; set a `staleness`, or give both devices of the same processes"
            )
        self.trains = process_shard(mesh) if pools.trains else NONE  # the part of the rows that this process trains on
        self.shard = self.trains
        # The part of the questions that this process reads.
        self.reads = questions_shard(config, mesh)
        rolled = process_shard(rollout_mesh) if pools.apart and pools.rolls else self.trains
        if pools.apart and not config.staleness and rolled[:2] != self.trains[:2]:
            raise ValueError(
                f"a process has the shard {self.trains[:2]} of a batch in training and {rolled[:2]} in rollouts"
            )
        for shard in (self.trains, rolled):
            if config.prompts % shard.count:
                raise ValueError(f"{config.prompts} prompts cannot be divided among {shard.count} processes")
        self.optimizer = make_optimizer(config.optimizer, config.iterations * config.updates)
        temperatures = {
            "temperature": config.rollout.temperature,
            "later_temperature": config.rollout.later_temperature,
        }
        self.update = make_rl_step(config.forward, config.loss, self.optimizer, mesh=mesh, **temperatures)
        self.logprobs = make_score_step(config.forward, mesh=mesh, **temperatures)
        self.policy = Resharder(mesh, rollout_mesh, config.forward.compute_dtype)
        self.replay = Replay(config.replay, config.seed, self.trains)
        self.throughput = Throughput(model, config.trainable, mesh)
        self.timer = Timer()  # of the current iteration
        self.source = source_of(self)

    def begin(self, model: Model) -> TrainState:
        """Makes the state before the first iteration."""
        return init_state(model, self.optimizer, trainable=self.config.trainable, mesh=self.mesh)

    def place(self, rows: Batch) -> Batch:
        """Moves host rows to the devices."""
        return rows if self.mesh is None else shard_batch(rows, self.mesh)

    def ask(self, i: int) -> Questions:
        """Reads the questions of iteration `i`. ValueError: their number is not that of the configuration."""
        questions = Questions(i, *self.notice.next(self.data))
        if (count := len(questions.examples) * self.reads.count) != self.config.prompts:
            raise ValueError(f"{count} prompts, the configuration says {self.config.prompts}")
        return questions

    def step(self, state: TrainState, i: int) -> tuple[TrainState, dict[str, float]]:
        """Runs iteration `i`. It is abandoned if the run is to stop before its updates."""
        self.timer = Timer()
        collected = self.source.take(state, i)
        self.timer.lap("waiting" if self.config.staleness else "rollout")
        if not self.pools.across:
            with among(self.mesh if self.config.staleness else None):
                state, metrics = self.train(state, collected, i)
        else:
            state, metrics = self._together(state, collected, i)
        self.source.done()
        return state, {**metrics, **self.timer.metrics, **token_ages(collected.records, i), **collected.metrics}

    def train(self, state: TrainState, collected: Collected, i: int) -> tuple[TrainState, dict[str, float]]:
        """Scores the rows of iteration `i` and trains on them."""
        stages = self.stages
        self.notice.check()
        scored = stages.score(self, state, collected)
        weighed = stages.advantages(self, state, scored)
        self.timer.lap("scoring")
        selected = stages.select(self, state, weighed)
        updated = stages.update(self, state, selected)
        self.timer.lap("update")
        metrics = rollout_metrics(weighed) | outcome_metrics(scored, self.shard) | updated.metrics
        if metrics.get("updates"):
            metrics |= self.throughput.metrics(self.timer.metrics["seconds_update"])
        return updated.state, metrics

    def _together(self, state: TrainState, collected: Collected, i: int) -> tuple[TrainState, dict[str, float]]:
        """Trains in the processes of training, while the others roll out; they meet at the end, and abandon it together.

        Raises:
          Preempted: it was abandoned.
        """
        metrics: dict[str, float] = {}
        abandoned = False
        if self.pools.trains:
            try:
                with among(self.mesh):
                    state, metrics = self.train(state, collected, i)
            except Preempted:
                abandoned = True
        else:
            self.source.wait()
        barrier(f"end of iteration {i}")
        if all_gather(abandoned).any():
            raise Preempted
        self.timer.lap("waiting")
        return state, metrics

    def observe(self, watch: Observer | None) -> Observer | None:
        """Makes an observer that the processes of training call, and no others."""
        if watch is None or not self.pools.across:
            return watch

        def observed(state: TrainState, done: int, log: Any) -> None:
            if self.pools.trains:
                with among(self.mesh):
                    watch(state, done, log)
            barrier(f"watched {done}")

        return observed


def questions_shard(config: RLConfig, mesh: Mesh | None) -> ProcessShard:
    """Returns the part of the questions that this process reads: all of them if rows carry over or are written ahead."""
    return WHOLE if config.staleness or config.rollout_budget.limits else process_shard(mesh)


def rollout_metrics(weighed: Weighed) -> dict[str, float]:
    """Computes the metrics of an iteration's rows."""
    scored, t = weighed.scored, weighed.scored.collected.records
    ops = executed_calls(t)
    lengths = np.sum(t.loss_mask, axis=1)
    metrics = {
        "accuracy": None if scored.correct is None else np.mean(scored.correct > 0.5),
        "rapr": np.mean(ops > 0),  # rate of pixel-space reasoning
        "reward": np.mean(scored.reward),
        **{f"reward_{name}": np.mean(values) for name, values in scored.terms.items()},
        "group_variance": np.mean(np.var(scored.reward, axis=1)),
        "operations": np.mean(ops),
        "calls": np.mean(t.num_calls),
        "call_errors": np.sum(failed_calls(t)) / max(np.sum(answered_calls(t)), 1),
        "nonzero_variance": np.mean(weighed.nonzero_variance),  # share of groups
        "response_tokens": np.mean(lengths),
        "response_tokens_max": np.max(lengths),
        "row_tokens": np.mean(np.sum(t.valid, axis=1)),  # prompt and observations included
        "finished": np.mean(t.stop == STOP_ANSWER),
        # Share of this process's rows with a turn that looks like a call but is not one in the call format.
        "unrecognised_calls": unrecognised_rate(
            [row.response for row in scored.rows], scored.collected.questions.prompts.tables.parser.language
        ),
    }
    return {name: float(x) for name, x in metrics.items() if x is not None}


def rl(
    model: Model,
    data: Iterator[tuple[HostPrompts, Sequence[Any]]],
    stages: Stages,
    config: RLConfig,
    *,
    directory: str | os.PathLike | None = None,
    identity: Identity = ANYTHING,
    mesh: Mesh | None = None,
    rollout_mesh: Mesh | None = None,
    label: str = "rl",
    watch: Observer | None = None,
) -> Model:
    """Trains a model by reinforcement learning: `config.iterations` iterations through `stages`, each with several updates.

    Every key and every order follows from `config.seed` and the iteration, so that a resumed run has the same result. If the run
    is to stop before the updates of an iteration, the iteration is abandoned, because it may last too long. With several
    processes each has its shard of the prompts, the same on both meshes, and only rewards and records of its rows are gathered.
    Pixels are not kept: they are computed again from the prompts' images where a row is scored or trained on.

    Args:
      model: the model to train; it stays usable.
      data: yields the fields of `stages.Questions` after `iteration`: prompts, an example for each (which the reward reads), and
        the sizes of their images in the files if the prompts have smaller ones; it has `get_state` and `set_state`.
      stages: the functions of an iteration.
      config: of the run.
      directory: as in `sft`.
      identity: as in `sft`.
      mesh: of training; None: one device.
      rollout_mesh: of rollouts, of the same devices, or, with `config.staleness`, of others; None: as `mesh`.
      label: what the terminal calls the run.
      watch: as in `sft`.

    Returns:
      The trained model.
    """
    learner = Learner(model, data, stages, config, mesh=mesh, rollout_mesh=rollout_mesh)
    work = RunSteps(
        label,
        config.iterations,
        learner.step,
        host=learner.source.host,
        local={"replay": learner.replay, **learner.source.local},
        shown=("accuracy", "rapr", "reward", "loss", "updates", "response_tokens", "seconds"),
        remark=Diagnosis(config.rollout.group_size, config.rollout.temperature),
    )
    keeping = Keeping(
        directory,
        identity.with_settings(rl=dataclasses.asdict(config)),
        save_every=config.save_every,
        keep=config.keep,
        writers=config.writers,
        mesh=mesh,
    )
    with contextlib.closing(learner.source):
        return Loop(work, learner.begin(model), keeping, learner.observe(watch)).run().model
