"""Supervised tuning on traces: the warm start (Pixel Reasoner §4.1, App.)."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from pixel_jax.config import positive
from pixel_jax.data.batches import Batches
from pixel_jax.models.model import Model
from pixel_jax.parallel.sharding import process_shard, shard_batch
from pixel_jax.terminal import warn
from pixel_jax.training.batch import Batch
from pixel_jax.training.checkpoint import Checkpoints, fingerprint
from pixel_jax.training.cost import Throughput
from pixel_jax.training.loop import ANYTHING, Identity, Keeping, Loop, Observer, RunSteps, Timer
from pixel_jax.training.losses import Normalizer
from pixel_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
from pixel_jax.training.preemption import NOTICE
from pixel_jax.training.state import TrainState, init_state
from pixel_jax.training.steps import ForwardConfig, check_report, make_sft_step
from pixel_jax.training.writers import WriterName

EPOCHS = 4  # of the released warm start


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """The settings of SFT: the paper's batch, learning rate and warm-up; schedule and frozen tower of the released script."""

    steps: int | None = None  # updates; None: they follow from `epochs`
    epochs: float | None = None  # passes over the data, instead of `steps`. None, and no `steps`: the recipe's 4
    batch_size: int = 128  # rows (the released script: 16)
    trainable: str = "(?!visual)"  # paths of the weights that are trained, a regular expression
    normalizer: Normalizer = "row"  # the mean of the rows' means, or the mean of all tokens
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6, warmup=0.1, final_fraction=0.0)
    forward: ForwardConfig = ForwardConfig()
    save_every: int = 100  # steps between two checkpoints
    keep: int = 2  # the number of newest checkpoints that are kept
    # Whether the checkpoints of the start and of the first epoch are kept, too, so that `unlearn-jax erase --run` can repeat the
    # training from the last one before an example was used.
    replayable: bool = False
    writers: tuple[WriterName, ...] = ()  # of metrics, besides JSON lines

    def __post_init__(self):
        positive(self, "steps", "epochs", "batch_size", "save_every", "keep")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps {self.steps} and epochs {self.epochs} are both given: one follows from the other")

    def updates(self, epoch: float | None) -> int:
        """The number of updates of the run. `epoch` is the number of updates of a pass over the data; None: unknown."""
        if self.steps is not None:
            return self.steps
        if epoch is None:
            raise ValueError("it is not known how many steps make an epoch: give steps")
        return math.ceil(round((EPOCHS if self.epochs is None else self.epochs) * epoch, 6))


class Tuning:
    """The steps of a tuning run: each reads a batch and makes an update."""

    def __init__(self, model, data: Iterator[Batch], config: SFTConfig, *, mesh: Mesh | None, epoch: float | None):
        self.data, self.config, self.mesh, self.epoch = data, config, mesh, epoch
        self.steps = config.updates(epoch)
        self.optimizer = make_optimizer(config.optimizer, self.steps)
        self.rate = learning_rate(config.optimizer, self.steps)
        self.update = make_sft_step(config.forward, self.optimizer, normalizer=config.normalizer, mesh=mesh)
        self.throughput = Throughput(model, config.trainable, mesh)

    def work(self, label: str) -> RunSteps:
        """Makes the steps for a `Loop`."""
        shown = ("loss", "learning_rate", "epoch", "tokens_per_second", "seconds")
        host: dict[str, Any] = {"data": self.data}
        return RunSteps(label, self.steps, self.step, host=host, shown=shown)

    def begin(self, model: Model) -> TrainState:
        """Makes the state at step 0."""
        return init_state(model, self.optimizer, trainable=self.config.trainable, mesh=self.mesh)

    def step(self, state: TrainState, i: int) -> tuple[TrainState, dict[str, float]]:
        """Takes step `i`, and returns its metrics."""
        timer = Timer()
        batch = NOTICE.next(self.data)
        rows = batch.tokens.shape[0] * process_shard(self.mesh).count
        if rows != self.config.batch_size:
            raise ValueError(f"a batch of {rows} rows, the configuration says {self.config.batch_size}")
        timer.lap("input")
        self.throughput.count(batch)
        state, report = self.update(state, batch if self.mesh is None else shard_batch(batch, self.mesh))
        metrics = check_report(report, i) | {"learning_rate": float(np.asarray(self.rate(i)))}
        if self.epoch is not None:
            metrics["epoch"] = (i + 1) / self.epoch
        timer.lap("update")
        return state, metrics | timer.metrics | self.throughput.metrics(timer.metrics["seconds_update"])


def sft(
    model: Model,
    data: Iterator[Batch],
    config: SFTConfig,
    *,
    directory: str | os.PathLike | None = None,
    identity: Identity = ANYTHING,
    mesh: Mesh | None = None,
    epoch: float | None = None,
    label: str = "sft",
    watch: Observer | None = None,
) -> Model:
    """Tunes a model on traces, by `config.updates(epoch)` updates.

    With a `directory` the run can be resumed: started again with the same `config` and `identity`, it continues from its newest
    checkpoint. With several processes `data` yields this one's shard of each batch (`process_shard(mesh)`), and its state is the
    same in all.

    Args:
      model: the model to tune; it stays usable.
      data: yields batches of host arrays; it has Grain's `get_state` and `set_state`.
      config: of the run.
      directory: for checkpoints and metrics; None: nothing is written.
      identity: the identity of the run besides `config`.
      mesh: None: one device.
      epoch: number of batches in a pass over the data; with it the metrics count the passes.
      label: what the terminal calls the run.
      watch: called before the first step and after each.

    Returns:
      The tuned model.
    """
    if config.replayable and epoch is None:
        raise ValueError("replayable keeps the checkpoints of the first epoch: it is not known how many steps make one")
    tuning = Tuning(model, data, config, mesh=mesh, epoch=epoch)
    keeping = Keeping(
        directory,
        identity.with_settings(sft=dataclasses.asdict(config)),
        save_every=config.save_every,
        keep=config.keep,
        early=math.ceil(epoch) if config.replayable and epoch is not None else 0,
        writers=config.writers,
        mesh=mesh,
    )
    return Loop(tuning.work(label), tuning.begin(model), keeping, watch).run().model


class Replayed(NamedTuple):
    """The result of `replay`."""

    model: Model
    begun: int  # the step after which the replay began; 0: the start


def replay(
    model: Model,
    data: Batches,
    config: SFTConfig,
    *,
    early: pathlib.Path,
    before: int,
    mesh: Mesh | None = None,
    epoch: float | None = None,
    label: str = "replay",
) -> Replayed:
    """Repeats a run of `sft` to its end. Nothing is written.

    Args:
      model: the model with which the run began.
      data: the batches in the order of the run. Those before step `before` are the run's.
      config: of the run.
      early: directory of the checkpoints that a `replayable` run has kept. It need not exist.
      before: the replay begins at the last whole checkpoint at or before this step.
      mesh: of the run.
      epoch: as in `sft`.
      label: what the terminal calls it.
    """
    tuning = Tuning(model, data, config, mesh=mesh, epoch=epoch)
    loop = Loop(tuning.work(label), tuning.begin(model))
    if early.is_dir():
        with Checkpoints(early, keep=None) as checkpoints:
            for step in reversed([step for step in checkpoints.steps if step <= before]):
                if (reason := checkpoints.damage(step)) is not None:
                    warn(f"{early}: checkpoint {step} is damaged ({reason}); the replay begins earlier")
                    continue
                like = loop.state._replace(rest=())
                restored = checkpoints.restore(like, mesh=mesh, step=step, base=fingerprint(loop.state.rest))
                loop.state, loop.done = restored.state._replace(rest=loop.state.rest), step
                data.set_state(restored.host["data"])
                break
    begun = loop.done
    return Replayed(loop.run().model, begun)
