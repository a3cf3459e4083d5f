"""The training loop of SFT and RL: steps, checkpoints, metrics, and exact resumption of a stopped run."""

import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from jax.sharding import Mesh

from pixel_jax.identity import RunError, settle
from pixel_jax.parallel.processes import is_main_process, say
from pixel_jax.terminal import Waiting, warn
from pixel_jax.training.checkpoint import CheckpointError, Checkpoints, Restored, fingerprint
from pixel_jax.training.preemption import NOTICE, Preempted
from pixel_jax.training.progress import ProgressLine
from pixel_jax.training.state import TrainState
from pixel_jax.training.writers import Writer, WriterName, open_writers

EARLY = "early_checkpoints"  # in the directory of a phase


class Stateful(Protocol):
    """An object on the host whose state changes during a run, such as a data iterator (like Grain's) or a generator."""

    def get_state(self) -> Any:
        """Returns the state. It must not change afterwards, because it is written while the run goes on."""

    def set_state(self, state: Any) -> None:
        """Restores a state of `get_state`."""


class Local(Protocol):
    """A `Stateful` object that differs between processes."""

    def get_state(self) -> Any:
        """Returns the state of this process."""

    def set_state(self, *states: Any) -> None:
        """Restores the states of all processes that saved; the number of processes may have changed."""


class Observer(Protocol):
    """A callable that the loop calls before the first step and after each; it must not change the run."""

    def __call__(self, state: TrainState, done: int, log: Writer | None) -> None:
        """Observes the state after `done` steps. `log` takes metrics; it is None in processes that write nothing."""


class Timer:
    """Measures the seconds of a step: the metrics `seconds_NAME` for each of its sections, and `seconds` for all."""

    def __init__(self):
        self.began = self.last = time.monotonic()
        self.metrics: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Ends a section, and adds the time since the section before it to that of `name`."""
        now = time.monotonic()
        key = f"seconds_{name}"
        self.metrics[key] = self.metrics.get(key, 0.0) + now - self.last
        self.metrics["seconds"], self.last = now - self.began, now


@dataclasses.dataclass(frozen=True)
class RunSteps:
    """The steps of a run.

    A step may depend only on the state, on its number and on the objects in `host` and `local`, whose states are saved. Then a
    killed run that is started again ends with the same bits.
    """

    label: str
    steps: int
    step: Callable[[TrainState, int], tuple[TrainState, Mapping[str, float]]]
    host: Mapping[str, Stateful]  # the same in every process
    local: Mapping[str, Local] = dataclasses.field(default_factory=dict)  # different in each process
    shown: tuple[str, ...] = ("loss", "seconds")  # metrics that the terminal shows
    # Makes the remark on the progress line from the metrics of a step.
    remark: Callable[[Mapping[str, float]], str] = lambda metrics: ""


@dataclasses.dataclass(frozen=True)
class Identity:
    """The identity of a run: a directory that holds a different run is refused (`pixel_jax.identity`)."""

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the run, and digests of data and model
    resume_changed: bool = False  # whether the settings may change from here on, which the run's history then records

    def with_settings(self, **settings: Any) -> "Identity":
        """The same run with further settings."""
        return dataclasses.replace(self, settings={**self.settings, **settings})


ANYTHING = Identity()  # without settings, so that no run is refused


@dataclasses.dataclass(frozen=True)
class Keeping:
    """The directory of a run, its checkpoints and its writers."""

    directory: str | os.PathLike | None = None  # None: nothing is written
    identity: Identity = ANYTHING
    save_every: int = 1  # steps between two checkpoints
    keep: int = 2  # the number of newest checkpoints that are kept
    # The last step of which a checkpoint is kept for good in `EARLY`, from step 0 on, so that a replay can begin there. 0: none.
    early: int = 0
    writers: tuple[WriterName, ...] = ()  # of metrics, besides `metrics.jsonl`
    mesh: Mesh | None = None  # of restored arrays; None: one device


class Loop:
    """The loop of one run: `restore`, then `step` and `save` until `done` equals `work.steps`; `run` does all of it.

        with Loop(work, state, Keeping(directory)) as loop:
            loop.restore()
            while loop.done < work.steps:
                metrics = loop.step()
                loop.save()

    With several processes, all take the same steps; the main process writes the metrics.
    """

    def __init__(
        self, work: RunSteps, state: TrainState, keeping: Keeping | None = None, watch: Observer | None = None
    ):
        self.work, self.state, self.watch = work, state, watch
        self.keeping = keeping = keeping or Keeping()
        self.directory = None if keeping.directory is None else pathlib.Path(keeping.directory)
        self.done, self.stepped = 0, False
        self.stopped = False  # whether the current step was abandoned because the run is to stop
        self.before: dict[str, Any] = {}  # the states of `work.host` before the current step
        self.progress = ProgressLine(work.label, work.steps) if is_main_process() else None
        self.log: Writer | None = None
        self.checkpoints: Checkpoints | None = None
        self.early: Checkpoints | None = None
        self.base: dict[str, str] = {}
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> "Loop":
        return self

    def __exit__(self, *error) -> None:
        self._closing.__exit__(*error)

    def run(self) -> TrainState:
        """Takes all steps, from the newest checkpoint in the directory if there is one, and returns the last state.

        Raises:
            Preempted: the run was asked to stop (`NOTICE`); the steps that are done are saved.
            RunError: the directory holds another run.
        """
        with self:
            self.restore()
            while self.done < self.work.steps:
                self.step()
                self.save()
        return self.state

    def restore(self) -> None:
        """Opens the directory, and restores its newest checkpoint, if there is one."""
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            # Frozen weights are not saved; a checkpoint only has their fingerprint.
            self.base = fingerprint(self.state.rest)
            self.checkpoints = Checkpoints(self.directory / "checkpoints", keep=self.keeping.keep)
            self._closing.enter_context(self.checkpoints)
            latest = self.checkpoints.latest
            self._settle(self.directory, latest)
            if latest is not None:
                self._go_back(self.checkpoints)
            if self.keeping.early:
                self.early = Checkpoints(self.directory / EARLY, keep=None)
                self._closing.enter_context(self.early)
                self._save_early()
            if is_main_process():
                self.log = open_writers(self.directory, self.done, self.keeping.writers, self.work.label)
                self._closing.callback(self.log.close)
        if self.watch is not None:
            self.watch(self.state, self.done, self.log)

    def step(self) -> Mapping[str, float]:
        """Takes the next step, and returns its metrics.

        If the run is to stop, a step may be abandoned as long as it has changed nothing but `work.host` (`NOTICE.check`,
        `NOTICE.next`). It then has no metrics, and the state before it is saved.
        """
        self.before = _states(self.work.host)
        first = self.progress is not None and not self.stepped
        try:
            with Waiting(f"{self.work.label}: the first step", shown=first):
                self.state, metrics = self.work.step(self.state, self.done)
                self.stepped = True
        except Preempted:
            if self.checkpoints is None:
                raise
            self.stopped = True
            return {}
        self.done, self.before = self.done + 1, {}
        if self.log is not None:
            self.log.write(self.done - 1, metrics)
        if self.progress is not None:
            shown = {name: metrics[name] for name in self.work.shown if name in metrics}
            self.progress.update(self.done, shown, self.work.remark(metrics))
        if self.watch is not None:
            self.watch(self.state, self.done, self.log)
        return metrics

    def save(self) -> None:
        """Saves a checkpoint if one is due: every `save_every` steps, after the last step, and if the run is to stop.

        Raises:
            Preempted: the run is to stop, and there are steps left; everything is on the disk.
        """
        if self.checkpoints is None:
            return
        stop = self.stopped or NOTICE.reached()
        due = self.done % self.keeping.save_every == 0 or self.done == self.work.steps or stop
        if due and self.checkpoints.latest != self.done:
            host = self.before or _states(self.work.host)
            state = self.state._replace(rest=())
            self.checkpoints.save(self.done, state, host, _states(self.work.local), base=self.base)
        if due and not self.stopped:
            self._save_early()
        if stop and self.done < self.work.steps:
            self.checkpoints.finish()
            if self.early is not None:
                self.early.finish()
            self._say(
                f"asked to stop; {self.done} of {self.work.steps} steps are done and saved. Started again, the run goes on."
            )
            raise Preempted
        self.checkpoints.poll()
        if self.early is not None:
            self.early.poll()

    def _save_early(self) -> None:
        """Saves a checkpoint of the first steps for good, unless it exists: an earlier start saved the same bits."""
        if self.early is None or self.done > self.keeping.early or self.done in self.early.steps:
            return
        state = self.state._replace(rest=())
        self.early.save(self.done, state, _states(self.work.host), _states(self.work.local), base=self.base)

    def _say(self, text: str) -> None:
        say(f"{self.work.label}: {text}")

    def _settle(self, directory: pathlib.Path, latest: int | None) -> None:
        """Checks that the directory holds this run, or writes the run's identity to a new directory."""
        if latest is not None and latest > self.work.steps:
            raise RunError(
                f"{directory}: {latest} steps are done, the configuration says {self.work.steps}: a run does not go "
                "back; choose another directory"
            )
        if is_main_process():
            identity = self.keeping.identity
            settle(
                directory,
                identity.settings,
                done=latest,
                of=self.work.steps,
                resume_changed=identity.resume_changed,
            )

    def _go_back(self, checkpoints: Checkpoints) -> None:
        """Restores the newest checkpoint that is whole."""
        try:
            restored = checkpoints.restore(self.state._replace(rest=()), mesh=self.keeping.mesh, base=self.base)
        except FileNotFoundError:
            warn(f"{self.work.label}: no checkpoint is left, the run begins anew")
            return
        self.state, self.done = restored.state._replace(rest=self.state.rest), restored.step
        _restore_objects(restored, self.work, checkpoints.directory.parent)
        if self.done == self.work.steps:
            self._say(f"already finished, all {self.done} steps")
        else:
            self._say(f"going on from step {self.done} of {self.work.steps}")


def _states(items: Mapping[str, Stateful] | Mapping[str, Local]) -> dict[str, Any]:
    return {name: item.get_state() for name, item in items.items()}


def _restore_objects(found: Restored, work: RunSteps, directory: pathlib.Path) -> None:
    """Restores the objects on the host. CheckpointError: they cannot resume from what the checkpoint holds."""
    here, there = ({*work.host, *work.local}, {*found.host, *found.local[0]})
    if missing := sorted(here ^ there):
        raise CheckpointError(
            f"{directory}: of checkpoint {found.step} and this run, one has no state of {', '.join(missing)}: the run was begun "
            "with another rollout_budget or staleness; go on with that, or choose another directory"
        )
    try:
        for name, item in work.host.items():
            item.set_state(found.host[name])
        for name, item in work.local.items():
            item.set_state(*[states[name] for states in found.local])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory}: checkpoint {found.step} cannot be gone on from: {error}") from error
