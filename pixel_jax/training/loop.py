"""The loop both phases share: steps, checkpoints, metrics, and an exact return to where a run was stopped."""

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
from pixel_jax.terminal import warn
from pixel_jax.training.checkpoint import CheckpointError, Checkpoints, Restored, fingerprint
from pixel_jax.training.preemption import NOTICE, Preempted
from pixel_jax.training.progress import Progress
from pixel_jax.training.state import TrainState
from pixel_jax.training.writers import Writer, WriterName, open_writers


class Stateful(Protocol):
    """Something on the host that moves on with the run: a data iterator (Grain's fit), a generator. A state that was given
    is not changed afterwards: it is written while the run goes on.
    """

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


class Local(Protocol):
    """As `Stateful`, for what differs between processes: it is given back the states of all that were saved."""

    def get_state(self) -> Any: ...

    def set_state(self, *states: Any) -> None: ...


class Watch(Protocol):
    """Looks at a run as it goes, and changes nothing of it."""

    def __call__(self, state: TrainState, done: int, log: Writer | None) -> None:
        """`done` steps are behind `state`; `log` takes metrics, and is None where nothing is written."""


class Timer:
    """Where the time of a step goes: `seconds_NAME` for each lap, and `seconds` for all."""

    def __init__(self):
        self.began = self.last = time.monotonic()
        self.metrics: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """What has passed since the last lap ended was spent on `name`."""
        now = time.monotonic()
        key = f"seconds_{name}"
        self.metrics[key] = self.metrics.get(key, 0.0) + now - self.last
        self.metrics["seconds"], self.last = now - self.began, now


@dataclasses.dataclass(frozen=True)
class Work:
    """What a run does.

    What a step does may depend on the state, its number and the objects in `host` and `local`, whose states are saved with
    it, and on nothing else: then a killed run that is started again ends with the same bits.
    """

    label: str
    steps: int
    step: Callable[[TrainState, int], tuple[TrainState, Mapping[str, float]]]
    host: Mapping[str, Stateful]  # the same in each process
    local: Mapping[str, Local] = dataclasses.field(default_factory=dict)  # each process has its own
    shown: tuple[str, ...] = ("loss", "seconds")  # metrics that the terminal shows
    # What a person should read of a step beside its metrics.
    remark: Callable[[Mapping[str, float]], str] = lambda metrics: ""


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a run is besides its work: a directory that holds another one is refused (`pixel_jax.identity`)."""

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the run, and digests of data and model
    resume_changed: bool = False  # the experiment may change from here on, which the run's history says

    def with_settings(self, **settings: Any) -> "Identity":
        return dataclasses.replace(self, settings={**self.settings, **settings})


ANYTHING = Identity()  # nothing is known


@dataclasses.dataclass(frozen=True)
class Keeping:
    """Where a run is kept, and what of it."""

    directory: str | os.PathLike | None = None  # None: nothing is written
    identity: Identity = ANYTHING
    save_every: int = 1  # steps: a checkpoint
    keep: int = 2  # checkpoints, the newest
    writers: tuple[WriterName, ...] = ()  # of metrics, besides `metrics.jsonl`
    mesh: Mesh | None = None  # where restored arrays lie


class Loop:
    """One run: `restore`, then `step` and `save` until `done` steps of `work.steps` are behind `state`; `run` does that.

        with Loop(work, state, Keeping(directory)) as loop:
            loop.restore()
            while loop.done < work.steps:
                metrics = loop.step()
                loop.save()

    With several processes, all take the same steps; the first one writes the metrics.
    """

    def __init__(self, work: Work, state: TrainState, keeping: Keeping | None = None, watch: Watch | None = None):
        self.work, self.state, self.watch = work, state, watch
        self.keeping = keeping = keeping or Keeping()
        self.directory = None if keeping.directory is None else pathlib.Path(keeping.directory)
        self.done = 0
        self.told = False  # to go, in the step that was under way
        self.before: dict[str, Any] = {}  # the states of `work.host` before it
        self.progress = Progress(work.label, work.steps) if is_main_process() else None
        self.log: Writer | None = None
        self.checkpoints: Checkpoints | None = None
        self.base: dict[str, str] = {}
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> "Loop":
        return self

    def __exit__(self, *error) -> None:
        self._closing.__exit__(*error)

    def run(self) -> TrainState:
        """The state after all steps, from the newest checkpoint in the directory if there is one.

        Raises:
            Preempted: the run was told to go (`NOTICE`); what it has done is saved.
            RunError: the directory holds another run.
        """
        with self:
            self.restore()
            while self.done < self.work.steps:
                self.step()
                self.save()
        return self.state

    def restore(self) -> None:
        """Opens the directory, and goes back to its newest checkpoint, if there is one."""
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            # Weights that are not trained are where they came from; the checkpoint only says which they were.
            self.base = fingerprint(self.state.rest)
            self.checkpoints = Checkpoints(self.directory / "checkpoints", keep=self.keeping.keep)
            self._closing.enter_context(self.checkpoints)
            latest = self.checkpoints.latest
            self._settle(latest)
            if latest is not None:
                self._go_back()
            if is_main_process():
                self.log = open_writers(self.directory, self.done, self.keeping.writers, self.work.label)
                self._closing.callback(self.log.close)
        if self.watch is not None:
            self.watch(self.state, self.done, self.log)

    def step(self) -> Mapping[str, float]:
        """Takes the next step; its metrics.

        A step that is told to go, and gives itself up as long as it has changed nothing but what is in `host`
        (`NOTICE.check`, `NOTICE.next`), has none: what was before it is to be saved.
        """
        self.before = _states(self.work.host)
        try:
            self.state, metrics = self.work.step(self.state, self.done)
        except Preempted:
            if self.checkpoints is None:
                raise
            self.told = True
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
        """A checkpoint if one is due: every so many steps, after the last, and where the run is told to go.

        Raises:
            Preempted: it is told to go, and there are steps left; everything is on the disk.
        """
        if self.checkpoints is None:
            return
        told = self.told or NOTICE.reached()
        due = self.done % self.keeping.save_every == 0 or self.done == self.work.steps or told
        if due and self.checkpoints.latest != self.done:
            host = self.before or _states(self.work.host)
            state = self.state._replace(rest=())
            self.checkpoints.save(self.done, state, host, _states(self.work.local), base=self.base)
        if told and self.done < self.work.steps:
            self.checkpoints.finish()
            self._say(
                f"told to go; {self.done} of {self.work.steps} steps are done and saved. Started again, the run goes on."
            )
            raise Preempted
        self.checkpoints.poll()

    def _say(self, text: str) -> None:
        say(f"{self.work.label}: {text}")

    def _settle(self, latest: int | None) -> None:
        """Holds the directory to what it was begun as."""
        if latest is not None and latest > self.work.steps:
            raise RunError(
                f"{self.directory}: {latest} steps are done, the configuration says {self.work.steps}: a run does not go "
                "back; choose another directory"
            )
        if is_main_process():
            identity = self.keeping.identity
            settle(
                self.directory,
                identity.settings,
                done=latest,
                of=self.work.steps,
                resume_changed=identity.resume_changed,
            )

    def _go_back(self) -> None:
        try:
            found = self.checkpoints.restore(self.state._replace(rest=()), mesh=self.keeping.mesh, base=self.base)
        except FileNotFoundError:
            warn(f"{self.work.label}: no checkpoint is left, the run begins anew")
            return
        self.state, self.done = found.state._replace(rest=self.state.rest), found.step
        _give_back(found, self.work, self.directory)
        if self.done == self.work.steps:
            self._say(f"already finished, all {self.done} steps")
        else:
            self._say(f"going on from step {self.done} of {self.work.steps}")


def _states(items: Mapping[str, Stateful] | Mapping[str, Local]) -> dict[str, Any]:
    return {name: item.get_state() for name, item in items.items()}


def _give_back(found: Restored, work: Work, directory: pathlib.Path) -> None:
    """What a checkpoint holds of the objects on the host. CheckpointError if that is nothing they can go on from."""
    try:
        for name, item in work.host.items():
            item.set_state(found.host[name])
        for name, item in work.local.items():
            item.set_state(*[states[name] for states in found.local])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory}: checkpoint {found.step} cannot be gone on from: {error}") from error
