"""The five stages of an iteration of reinforcement learning, and the value that each hands to the next.

    Questions -> collect -> Collected -> score -> Scored -> advantages -> Weighed -> select -> Selected -> update -> Updated

Each stage is a function `stage(learner, state, value)`; `Stages` names them, so that users can replace any of them. Instead of
the state, `collect` gets the model that rolls out. (With a `rollout_budget`, `pixel_jax.training.sources` collects without that
stage.) A stage that only observes wraps another:

    def watched(learner, state, scored):
        print(scored.reward.mean())
        return advantages(learner, state, scored)
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from pixel_jax.arrays import AnyArray
from pixel_jax.models.inputs import Visual
from pixel_jax.models.model import Model
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
    """This process's shard of the questions of an iteration."""

    iteration: int
    prompts: HostPrompts
    examples: Sequence[Any]  # the example of each prompt, which the reward reads
    # (height, width) of the images of each prompt in their files; None: those of the prompts.
    sizes: Sequence[Sequence[tuple[int, int]]] | None = None


class Collected(NamedTuple):
    """The rows of the rollout, `group_size` of each prompt, on the host and without pixels."""

    questions: Questions
    trajectories: Trajectories[VisualRecord]  # this process's rows
    records: Trajectories[VisualRecord]  # the rows of all processes
    shape: RolloutShape  # the static sizes of the rollout
    metrics: Mapping[str, float] = {}  # further metrics of the iteration

    @property
    def row_shape(self) -> BatchShape:
        """The shape of the rows, which all rows of an update share."""
        return self.shape.prompts._replace(tokens=self.trajectories.tokens.shape[1])


class Scored(NamedTuple):
    """The rewards of the rows. Arrays are of all processes, [groups, n]."""

    collected: Collected
    reward: np.ndarray  # float32, the reward of each row
    terms: Mapping[str, np.ndarray]  # the weighted terms whose sum is the reward, by name
    correct: np.ndarray | None = None  # float32, the score of each answer; None: the reward has no term "answer"
    rows: Sequence["Row"] = ()  # this process's rows as the terms read them


class Weighed(NamedTuple):
    """The advantages of the rows. Arrays are of all processes."""

    scored: Scored
    advantage: np.ndarray  # float32 [groups, n]
    nonzero_variance: np.ndarray  # bool [groups], whether the rewards of a group differ


class Selected(NamedTuple):
    """The rows that updates train on, in order, `train_batch` at a time. If nothing can be learned, there are none."""

    weighed: Weighed
    entries: Sequence[Entry]


class Updated(NamedTuple):
    """The state after the updates."""

    state: TrainState
    metrics: Mapping[str, float]  # of the updates


def concatenated(parts: Sequence[Questions]) -> Questions:
    """Returns the questions of all `parts`, which have one shape, with the iteration of the first."""
    first = parts[0]
    arrays = [part.prompts._replace(tables=()) for part in parts]
    prompts = jax.tree.map(lambda *xs: np.concatenate(xs), *arrays)._replace(tables=first.prompts.tables)
    examples = [example for part in parts for example in part.examples]
    sizes = None if first.sizes is None else [size for part in parts for size in part.sizes or ()]
    return Questions(first.iteration, prompts, examples, sizes)


def collect(
    learner: "Learner", actor: Model, questions: Questions, *, roll: Callable[..., Trajectories] | None = None
) -> Collected:
    """Rolls the policy out. Keys follow from the seed, the iteration and the position in the whole batch, on any process.

    Args:
      learner: of the run.
      actor: the policy.
      questions: of this process.
      roll: is called instead of `rollout`, with its arguments: `functools.partial(collect, roll=...)` is a stage, too.

    Raises:
      Preempted: the run is to stop; the iteration is abandoned.
    """
    config, shard, count = learner.config, learner.shard, len(questions.examples)
    key = jax.random.fold_in(jax.random.key(config.seed), questions.iteration)
    prompts = questions.prompts._replace(uid=shard.index * count + np.arange(count, dtype=np.int32))
    trajectories = jax.tree.map(local_rows, (roll or rollout)(actor, prompts, key, config.rollout))
    learner.timer.lap("rollout")
    learner.notice.check()
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


def collect_on_host(rollouts: HostRollouts, learner: "Learner", actor: Model, questions: Questions) -> Collected:
    """Collects with tools on the host, and adds their counts to the metrics. Such a run may not be reproducible."""
    collected = collect(learner, actor, questions, roll=rollouts)
    return collected._replace(metrics={**collected.metrics, **rollouts.metrics()})


def advantages(learner: "Learner", state: TrainState, scored: Scored) -> Weighed:
    """Computes each row's advantage in its group, with the settings of the run."""
    config = learner.config
    return Weighed(
        scored,
        group_advantage(scored.reward, baseline=config.baseline, scale_by_std=config.scale_by_std),
        nonzero_variance(scored.reward, threshold=config.replay.threshold),
    )


def select(learner: "Learner", state: TrainState, weighed: Weighed) -> Selected:
    """Selects the rows of groups whose rewards differ, and the replacements of the others by `config.replay`."""
    rows = training_rows(learner, state, weighed)
    keep = np.repeat(weighed.nonzero_variance, learner.config.rollout.group_size)
    return Selected(weighed, learner.replay.select(rows, keep, weighed.scored.collected.row_shape) or [])


def update(learner: "Learner", state: TrainState, selected: Selected) -> Updated:
    """Makes an update for every `train_batch` selected rows. The metrics are means over the updates."""
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
Collect = Callable[["Learner", Model, Questions], Collected]


@dataclasses.dataclass(frozen=True)
class Stages:
    """The functions that an iteration goes through.

    A reward needs a tokenizer, so `score` has no default: `Stages(Rewards.of(config.reward, decode))`
    (`pixel_jax.training.rewards`).
    """

    score: Stage
    collect: Collect = collect
    advantages: Stage = advantages
    select: Stage = select
    update: Stage = update


# ---- parts of stages


def training_rows(learner: "Learner", state: TrainState, weighed: Weighed) -> Rows:
    """Makes the batch of this process's rows, with their advantages and old log-probabilities.

    The latter are recomputed by the trainer, unless the config takes the sampler's or no row will be trained on.

    Raises:
      Preempted: the run is to stop; the iteration is abandoned.
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
    """Computes log-probabilities of the rows under the policy before its updates, float32 [R, L]."""
    model, logprobs = state.model, []
    size = learner.config.train_batch // learner.shard.count
    for start in range(0, len(rows.images), size):
        NOTICE.check()
        batch = with_pixels(learner, take(rows, slice(start, start + size)), collected)
        logprobs.append(local_rows(learner.logprobs(model, learner.place(batch))[0]))
    return np.concatenate(logprobs)


def with_pixels(learner: "Learner", rows: Rows, collected: Collected) -> Batch[Visual]:
    """Returns the rows with their pixels, which are computed from the images of their prompts."""
    batch, images = rows
    assert batch.visual is not None
    visual = materialize(batch.visual, images, collected.shape, learner.config.rollout, learner.mesh)
    fields = {**batch._asdict(), "visual": visual}
    return Batch(**fields)


def mask_unfinished(batch: Batch[VisualRecord], stop: AnyArray) -> Batch[VisualRecord]:
    """Clears the loss mask and advantage of rows without an answer (`stop` int32 [R]), so that they are not replayed either."""
    finished = stop == STOP_ANSWER
    return batch._replace(
        loss_mask=batch.loss_mask & finished[:, None],
        advantage=np.where(finished, batch.advantage, 0).astype(np.float32),
    )
