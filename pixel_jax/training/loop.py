"""The loop both phases share: steps, checkpoints, metrics, and an exact return to where a run was stopped."""

import contextlib
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from jax.sharding import Mesh

from pixel_jax.identity import RunError, settle
from pixel_jax.parallel.processes import first, say
from pixel_jax.terminal import warn
from pixel_jax.training.checkpoint import CheckpointError, Checkpoints, Restored, fingerprint
from pixel_jax.training.preemption import NOTICE, Preempted
from pixel_jax.training.progress import Progress
from pixel_jax.training.state import TrainState
from pixel_jax.training.watch import Watch
from pixel_jax.training.writers import WriterName, open_writers


class Stateful(Protocol):
    """Something on the host that moves on with the run: a data iterator (Grain's fit), a generator. A state that was given
    is not changed afterwards: it is written while the run goes on."""

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


class Local(Protocol):
    """As `Stateful`, for what differs between processes: it is given back the states of all that were saved."""

    def get_state(self) -> Any: ...

    def set_state(self, *states: Any) -> None: ...


class Laps:
    """Where the time of a step goes: `seconds_NAME` for each lap, and `seconds` for all."""

    def __init__(self):
        self.began = self.last = time.monotonic()
        self.facts: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """What has passed since the last lap ended was spent on `name`."""
        now = time.monotonic()
        key = f"seconds_{name}"
        self.facts[key] = self.facts.get(key, 0.0) + now - self.last
        self.facts["seconds"], self.last = now - self.began, now


def run(
    label: str,
    state: TrainState,
    step: Callable[[TrainState, int], tuple[TrainState, Mapping[str, float]]],
    *,
    steps: int,
    host: Mapping[str, Stateful],
    local: Mapping[str, Local] | None = None,
    directory: str | os.PathLike | None,
    facts: Mapping[str, Any],
    resume_changed: bool = False,
    save_every: int,
    keep: int = 2,
    mesh: Mesh | None = None,
    shown: tuple[str, ...] = ("loss",),
    remark: Callable[[Mapping[str, float]], str] = lambda metrics: "",
    watch: Watch | None = None,
    writers: tuple[WriterName, ...] = (),
    stream=None,
) -> TrainState:
    """Call `step(state, i)` for i = 0 .. steps - 1, from the newest checkpoint in `directory` if there is one.

    What a step does may depend on `state`, `i` and the objects in `host` and `local`, whose states are saved with it, and
    on nothing else: then a killed run that is started again ends with the same bits. Metrics go to
    `directory/metrics.jsonl` and to `writers`. Without a `directory` nothing is written.

    `remark` says of a step's metrics what a person should read beside them. `watch` looks at the state before the first step and
    after every one; it changes nothing that a step depends on.

    `facts` are what the run is, settings and digests: a directory that holds another one is refused, unless
    `resume_changed` allows it (`pixel_jax.identity`).

    A run that is told to go (`NOTICE`) saves itself after the step it is at, and ends with `Preempted`. A step that may last
    too long, or waits for data, raises that itself (`NOTICE.obey`, `NOTICE.next`), as long as it has changed nothing but
    what is in `host`: then what was before it is saved.

    With several processes, all take the same steps; `host` is the same in each, `local` is its own; the first one writes
    the metrics.
    """
    local = local or {}
    progress = Progress(label, steps, stream=stream) if first() else None

    def show(done: int, metrics: Mapping[str, float]) -> None:
        if progress is not None:
            progress.update(
                done, {name: metrics[name] for name in (*shown, *metrics) if name in metrics}, remark(metrics)
            )

    if directory is None:
        for i in range(steps):
            state, metrics = step(state, i)
            show(i + 1, metrics)
        return state
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # Weights that are not trained are where they came from; the checkpoint only says which they were.
    base = fingerprint(state.rest)
    with Checkpoints(directory / "checkpoints", keep=keep) as checkpoints, contextlib.ExitStack() as closing:
        start, latest = 0, checkpoints.latest
        if latest is not None and latest > steps:
            raise RunError(
                f"{directory}: {latest} steps are done, the configuration says {steps}: a run does not go back; choose "
                "another directory"
            )
        if first():
            settle(directory, facts, done=latest, of=steps, resume_changed=resume_changed)
        if latest is not None:
            try:
                found = checkpoints.restore(state._replace(rest=()), mesh=mesh, base=base)
            except FileNotFoundError:
                warn(f"{label}: no checkpoint is left, the run begins anew")
            else:
                state, start = found.state._replace(rest=state.rest), found.step
                _give_back(found, host, local, directory)
                say(
                    f"{label}: already finished, all {steps} steps"
                    if start == steps
                    else f"{label}: going on from step {start} of {steps}"
                )
        log = None
        if first():
            log = open_writers(directory, start, writers, label)
            closing.callback(log.close)
        if watch is not None:
            watch(state, start, log)
        for i in range(start, steps):
            before = _states(host)
            try:
                state, metrics = step(state, i)
            except Preempted:
                done, told = i, True
            else:
                done, told = i + 1, NOTICE.reached()
                if log is not None:
                    log.write(i, metrics)
                show(done, metrics)
            if (done % save_every == 0 or done == steps or told) and checkpoints.latest != done:
                now = before if done == i else _states(host)
                checkpoints.save(done, state._replace(rest=()), now, _states(local), base=base)
            if told and done < steps:
                checkpoints.finish()
                say(f"{label}: told to go; {done} of {steps} steps are done and saved. Started again, the run goes on.")
                raise Preempted
            if watch is not None and not told:
                watch(state, done, log)
            checkpoints.poll()
    return state


def _states(items: Mapping[str, Stateful] | Mapping[str, Local]) -> dict[str, Any]:
    return {name: item.get_state() for name, item in items.items()}


def _give_back(
    found: Restored, host: Mapping[str, Stateful], local: Mapping[str, Local], directory: pathlib.Path
) -> None:
    """What a checkpoint holds of the objects on the host. CheckpointError if that is nothing they can go on from."""
    try:
        for name, item in host.items():
            item.set_state(found.host[name])
        for name, item in local.items():
            item.set_state(*[states[name] for states in found.local])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory}: checkpoint {found.step} cannot be gone on from: {error}") from error
