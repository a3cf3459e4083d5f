"""Measures the cases of a bench: alternatives run in turns, so that other load of the machine affects all of them alike.

A `Case` builds a `Workload`, which holds the alternatives, ours first. `measure` calls every alternative once (compilations are
counted), compares their outputs, then runs them in turns. A ratio is the median over rounds of (other's time / ours): above 1,
ours is faster.
"""

import contextlib
import dataclasses
import functools
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from pixel_jax.training.progress import COMPILED

Run = Callable[[], Any]
Note = Callable[[str], object]  # takes a line about how far the measurement is

PAUSE = 0.05  # seconds between two alternatives: threads spin for a while after their work
# Seconds. An alternative that takes less runs twice in its turn, and the second run counts: the first one finds caches and
# memory as another alternative left them.
WARM = 10.0


@dataclasses.dataclass(frozen=True)
class Aim:
    """An aim: ours should be `ratio` times as fast as `against`, or with `memory` need at most 1 / `ratio` of its memory."""

    against: str
    ratio: float
    memory: bool = False


@dataclasses.dataclass(frozen=True)
class Workload:
    """The work of a case.

    An alternative is a function that prepares weights and inputs, which is not timed, and returns the function to be timed.
    That returns its output, which is waited for; its first call compiles.
    """

    shapes: str  # description of the work
    alternatives: Mapping[str, Callable[[], Run]]  # the first is ours
    check: Callable[[Mapping[str, Any]], None]  # raises where the outputs (by name) differ
    # FLOPs of one run (`models.flops`); by name where the alternatives differ.
    flops: float | Mapping[str, float] | None = None
    bytes: float | None = None  # the least that one run moves
    aims: tuple[Aim, ...] = ()
    memory: tuple[str, ...] | None = None  # alternatives whose peak memory is measured; None: ours
    cores: int | None = None  # cores that the alternatives may use; None: all of the process
    rounds: int = 5  # least number of rounds
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # further entries of the record


@dataclasses.dataclass(frozen=True)
class Case:
    """A case by name. `build(quick)` returns its workload, with `quick` a tiny one as a smoke test."""

    name: str
    build: Callable[[bool], Workload]


@dataclasses.dataclass(frozen=True)
class Timing:
    """The time of one alternative, and its ratio to ours over the rounds."""

    seconds: float  # median
    low: float  # quartiles
    high: float
    rounds: int
    ratio: float  # median of (this / ours)
    ratio_low: float
    ratio_high: float
    first_call: float  # seconds, compilation included
    compile: float  # seconds in the compiler
    compilations: int  # in the first call
    recompilations: int  # in all later ones
    peak_bytes: int | None = None  # of a fresh process, beyond what it needed before weights and inputs were made


class CompileLog:
    """Counts the compilations of XLA within a block, and their seconds."""

    def __enter__(self) -> "CompileLog":
        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *error) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILED:
            self.count, self.seconds = self.count + 1, self.seconds + duration_secs


def finished(output: Any) -> Any:
    """Waits for an output and returns it: JAX returns before its work is done."""
    return jax.block_until_ready(output)


def take_turns(
    runs: Mapping[str, Run], *, least: int, most: int, seconds: float, note: Note = lambda line: None
) -> dict[str, list[float]]:
    """The seconds of every alternative in every round.

    There are at least `least` and at most `most` rounds, and no further one after `seconds`. Every second round runs in reverse
    order.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    names, began = list(runs), time.perf_counter()
    for turn in range(most):
        if turn >= least and time.perf_counter() - began > seconds:
            break
        for name in names if turn % 2 == 0 else reversed(names):
            note(f"round {turn + 1} (of at least {least}, then until {seconds:.0f} s have passed): {name}")
            time.sleep(PAUSE)
            taken = _seconds(runs[name])
            times[name].append(_seconds(runs[name]) if taken < WARM else taken)
    return times


def _seconds(run: Run) -> float:
    start = time.perf_counter()
    finished(run())
    return time.perf_counter() - start


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


@contextlib.contextmanager
def limited_to(cores: int | None) -> Iterator[None]:
    """Keeps all threads of the process on its first `cores` cores during the block (Linux only)."""
    if cores is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    _keep_threads_on(set(sorted(before)[:cores]))
    try:
        yield
    finally:
        _keep_threads_on(before)


def _keep_threads_on(cores: set[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread), cores)


def measure(
    work: Workload,
    *,
    least: int | None = None,
    most: int = 30,
    seconds: float = 20.0,
    note: Note = lambda line: None,
) -> dict[str, Timing]:
    """The timing of every alternative of `work`, after their outputs were compared. `note` is told how far it is."""
    with limited_to(work.cores):
        return _measure(work, least or work.rounds, most, seconds, note)


def _measure(work: Workload, least: int, most: int, seconds: float, note: Note) -> dict[str, Timing]:
    runs, outputs, compiled, first = {}, {}, {}, {}
    for number, (name, prepare) in enumerate(work.alternatives.items(), 1):
        note(f"first call, {number} of {len(work.alternatives)}: {name}")
        run = prepare()
        with CompileLog() as log:
            start = time.perf_counter()
            outputs[name] = finished(run())
            first[name] = time.perf_counter() - start
        runs[name], compiled[name] = run, log
    work.check(outputs)
    del outputs
    gc.collect()
    recompiled = dict.fromkeys(runs, 0)

    def watched(name: str) -> Any:
        with CompileLog() as log:
            output = finished(runs[name]())
        recompiled[name] += log.count
        return output

    turns = {name: functools.partial(watched, name) for name in runs}
    times = take_turns(turns, least=least, most=most, seconds=seconds, note=note)
    ours = times[next(iter(times))]
    timings = {}
    for name, taken in times.items():
        low, middle, high = quartiles(taken)
        ratio_low, ratio, ratio_high = quartiles([a / b for a, b in zip(taken, ours, strict=True)])
        timings[name] = Timing(
            seconds=middle,
            low=low,
            high=high,
            rounds=len(taken),
            ratio=ratio,
            ratio_low=ratio_low,
            ratio_high=ratio_high,
            first_call=first[name],
            compile=compiled[name].seconds,
            compilations=compiled[name].count,
            recompilations=recompiled[name],
        )
    return timings
