"""The five stages of an iteration of reinforcement learning, and the value that each hands to the next.

    Questions -> collect -> Collected -> score -> Scored -> advantages -> Weighed -> select -> Selected -> update -> Updated

Each stage is a function `stage(learner, state, value)`; `Stages` says which, so that one of one's own takes the place of
any. A stage that looks and changes nothing goes around another:

    def watched(learner, state, scored):
        print(scored.reward.mean())
        return advantages(learner, state, scored)
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from pixel_jax.models.inputs import Visual
from pixel_jax.parallel.sharding import all_rows, local_rows
from pixel_jax.rollouts.materialize import VisualRecord, materialize
from pixel_jax.rollouts.rollout import HostRollouts, rollout, static_shape
from pixel_jax.rollouts.shapes import BatchShape, RolloutShape
from pixel_jax.rollouts.timing import seconds_of_operations
from pixel_jax.rollouts.trajectory import STOP_ANSWER, HostPrompts, Trajectories
from pixel_jax.training.algorithms import group_advantage, nonzero_variance
from pixel_jax.training.batch import Batch, Rows, from_trajectories, pack_rows, take
from pixel_jax.training.preemption import NOTICE
from pixel_jax.training.replay import Entry
from pixel_jax.training.state import TrainState
from pixel_jax.training.steps import check_report, check_rows

if TYPE_CHECKING:
    from pixel_jax.training.rewards import Row
    from pixel_jax.training.rl import Learner


class Questions(NamedTuple):
    """What an iteration asks: this process's share of it."""

    iteration: int
    prompts: HostPrompts
    examples: Sequence[Any]  # what each prompt was made of, whatever the reward reads of it
    sizes: Sequence[Sequence[tuple[int, int]]] | None = None  # (height, width) of its images in their files, if others


class Collected(NamedTuple):
    """The rows that came of it, `group_size` of each prompt, on the host and without pixels."""

    questions: Questions
    trajectories: Trajectories[VisualRecord]  # this process's rows
    records: Trajectories[VisualRecord]  # of all processes
    shape: RolloutShape  # what is static about the rollout
    metrics: Mapping[str, float] = {}  # for the metrics

    @property
    def row_shape(self) -> BatchShape:
        """Of the rows: those of one update are of one row_shape."""
        return self.shape.prompts._replace(tokens=self.trajectories.tokens.shape[1])


class Scored(NamedTuple):
    """What the rows are worth. Arrays are of all processes, [groups, n]."""

    collected: Collected
    reward: np.ndarray  # float32, what the policy is trained on
    terms: Mapping[str, np.ndarray]  # what it is the sum of, weighted, by the names of the terms
    correct: np.ndarray | None = None  # float32, the score of each answer; None: the reward does not ask for it
    rows: Sequence["Row"] = ()  # what each of this process's rows did, as the terms saw it


class Weighed(NamedTuple):
    """How much each row is to become likelier. Arrays are of all processes."""

    scored: Scored
    advantage: np.ndarray  # float32 [groups, n]
    nonzero_variance: np.ndarray  # bool [groups], which groups teach anything


class Selected(NamedTuple):
    """The rows that updates train on, in order, `train_batch` at a time; none: there is nothing to learn from."""

    weighed: Weighed
    entries: Sequence[Entry]


class Updated(NamedTuple):
    state: TrainState
    metrics: Mapping[str, float]  # for the metrics


def collect(
    learner: "Learner", state: TrainState, questions: Questions, *, roll: Callable[..., Trajectories] | None = None
) -> Collected:
    """The policy answers. Keys follow from the seed, the iteration and the place in the whole batch, whoever has it.

    Args:
      roll: takes the place of `rollout`, with its arguments: `functools.partial(collect, roll=...)` is a stage, too.

    Raises:
      Preempted: the run is to stop here; a rollout may last longer than there is time.
    """
    config, shard, count = learner.config, learner.shard, len(questions.examples)
    key = jax.random.fold_in(jax.random.key(config.seed), questions.iteration)
    prompts = questions.prompts._replace(uid=shard.index * count + np.arange(count, dtype=np.int32))
    actor = learner.policy(state)  # where it is a copy, updates need its memory: it goes when this returns
    trajectories = jax.tree.map(local_rows, (roll or rollout)(actor, prompts, key, config.rollout))
    learner.timer.lap("rollout")
    NOTICE.check()
    metrics = {}
    if config.time_operations and questions.iteration % config.time_operations == 0:
        metrics["seconds_operations"] = seconds_of_operations(actor, prompts, trajectories, config.rollout)
        learner.timer.lap("timing")
    return Collected(
        questions._replace(prompts=prompts),
        trajectories,
        all_rows(trajectories, shard),
        static_shape(prompts, config.rollout, learner.mesh),
        metrics,
    )


def collect_on_host(rollouts: HostRollouts, learner: "Learner", state: TrainState, questions: Questions) -> Collected:
    """`collect` where tools run on the host, with their counts among the metrics. A run need not be the same again."""
    collected = collect(learner, state, questions, roll=rollouts)
    return collected._replace(metrics={**collected.metrics, **rollouts.metrics()})


def advantages(learner: "Learner", state: TrainState, scored: Scored) -> Weighed:
    """Each row's reward against its group's, as `config` says."""
    config = learner.config
    return Weighed(
        scored,
        group_advantage(scored.reward, baseline=config.baseline, scale_by_std=config.scale_by_std),
        nonzero_variance(scored.reward, threshold=config.replay.threshold),
    )


def select(learner: "Learner", state: TrainState, weighed: Weighed) -> Selected:
    """The rows of groups that teach something, and what `config.replay` fills the other places with."""
    rows = training_rows(learner, state, weighed)
    keep = np.repeat(weighed.nonzero_variance, learner.config.rollout.group_size)
    return Selected(weighed, learner.replay.select(rows, keep, weighed.scored.collected.row_shape) or [])


def update(learner: "Learner", state: TrainState, selected: Selected) -> Updated:
    """As many updates as the rows fill train batches. The metrics are their means."""
    config, collected = learner.config, selected.weighed.scored.collected
    updates, reports = len(selected.entries) // config.train_batch, []
    for u in range(updates):
        entries = selected.entries[u * config.train_batch : (u + 1) * config.train_batch]
        rows = with_pixels(learner, learner.replay.batch(entries), collected)
        if config.packing:
            rows = pack_rows(jax.tree.map(local_rows, rows), config.packing)
        learner.throughput.count(rows)
        state, report = learner.update(state, learner.place(rows))
        reports.append(check_report(report, collected.questions.iteration * config.updates + u))
    means = {name: float(np.mean([report[name] for report in reports])) for name in (reports[0] if reports else ())}
    return Updated(state, {"updates": updates, **means})


Stage = Callable[["Learner", TrainState, Any], Any]


@dataclasses.dataclass(frozen=True)
class Stages:
    """Which functions an iteration goes through. A reward needs a tokenizer, so there is no usual one:
    `Stages(Rewards.of(config.reward, decode))` (`pixel_jax.training.rewards`).
    """

    score: Stage
    collect: Stage = collect
    advantages: Stage = advantages
    select: Stage = select
    update: Stage = update


# ---- what stages are made of


def training_rows(learner: "Learner", state: TrainState, weighed: Weighed) -> Rows:
    """This process's rows as they are trained on, with their advantages.

    The trainer's own log-probabilities are worked out, unless the sampler's are to serve or no row will be trained on.

    Raises:
      Preempted: the run is to stop here.
    """
    config, collected = learner.config, weighed.scored.collected
    trajectories, prompts = collected.trajectories, collected.questions.prompts
    own = slice(learner.shard.index * len(trajectories.stop), (learner.shard.index + 1) * len(trajectories.stop))
    images = np.repeat(prompts.images, config.rollout.group_size)
    batch = from_trajectories(trajectories, weighed.advantage.reshape(-1)[own])
    if config.mask_unfinished:
        batch = mask_unfinished(batch, trajectories.stop)
    learner.timer.lap("scoring")
    if config.old_logprobs == "recomputed" and (weighed.nonzero_variance.any() or config.replay.kind == "none"):
        batch = batch._replace(old_logprobs=old_logprobs(learner, state, Rows(batch, images), collected))
        check_rows(batch.old_logprobs, f"iteration {collected.questions.iteration}: the log-probabilities")
    NOTICE.check()
    learner.timer.lap("old_logprobs")
    return Rows(batch, images)


def old_logprobs(learner: "Learner", state: TrainState, rows: Rows, collected: Collected) -> np.ndarray:
    """Log-probabilities of the rows under the policy that is about to be trained, float32 [R, L]."""
    model, found = state.model, []
    size = learner.config.train_batch // learner.shard.count
    for start in range(0, len(rows.images), size):
        NOTICE.check()
        batch = with_pixels(learner, take(rows, slice(start, start + size)), collected)
        found.append(local_rows(learner.logprobs(model, learner.place(batch))[0]))
    return np.concatenate(found)


def with_pixels(learner: "Learner", rows: Rows, collected: Collected) -> Batch[Visual]:
    """The rows with what they saw, cut again from the images of their prompts."""
    batch, images = rows
    visual = materialize(batch.visual, images, collected.shape, learner.config.rollout, learner.mesh)
    return batch._replace(visual=visual)


def mask_unfinished(batch: Batch, stop: np.ndarray) -> Batch:
    """The rows that did not end in an answer (`stop` int32 [R]) without tokens that carry loss, and never replayed."""
    finished = stop == STOP_ANSWER
    return batch._replace(
        loss_mask=batch.loss_mask & finished[:, None],
        advantage=np.where(finished, batch.advantage, 0).astype(np.float32),
    )
