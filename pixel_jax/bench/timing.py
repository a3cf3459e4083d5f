"""How a bench measures: alternatives take turns, so that what else the machine does falls on all of them alike.

A `Case` is one piece of work; its `Workload` holds the alternatives, ours first, each of which says in its output what it
computed. `measure` calls every alternative once (what it compiles is counted), has the outputs compared, then lets them
take turns. A ratio is the median over rounds of (other's time / ours): above 1, ours is faster.
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

PAUSE = 0.05  # seconds between two alternatives: the threads of the one before spin for a while after their work
# Seconds: what takes less runs twice in its turn, and the second run counts. The first one finds the caches, and the memory
# that the process has, as another alternative left them: a tuning step after one of torch takes 3.8 s, and then 3.3.
WARM = 10.0


@dataclasses.dataclass(frozen=True)
class Aim:
    """`ours` is to be at least `ratio` times as fast as `against` (or, `memory`, to need at most 1 / `ratio` of its memory)."""

    against: str
    ratio: float
    memory: bool = False


@dataclasses.dataclass(frozen=True)
class Workload:
    """The alternatives of a case: name -> a function that prepares and returns the function to be timed.

    `run()` returns its output; a JAX array in it is waited for. Preparing is not timed: weights and inputs are made there,
    and compilation belongs into the first run.
    """

    shapes: str  # what the work is, in words and numbers
    alternatives: Mapping[str, Callable[[], Run]]  # the first is ours
    check: Callable[[Mapping[str, Any]], None]  # raises where the outputs (by name) differ
    flops: float | Mapping[str, float] | None = None  # of one run, counted; by name where the alternatives differ
    bytes: float | None = None  # that one run has to move at least
    aims: tuple[Aim, ...] = ()
    memory: tuple[str, ...] | None = None  # whose peak memory is measured, each in its own process; None: of ours
    cores: int | None = None  # that all alternatives may use together; all the process has if None
    rounds: int = 5  # at least
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # whatever else belongs into the record


@dataclasses.dataclass(frozen=True)
class Case:
    """`build(quick)` makes the work; quick: tiny, to see that it works. It must be a function at the top of a module."""

    name: str
    build: Callable[[bool], Workload]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one alternative, and how many times slower than ours it is, round by round."""

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
    """Counts what XLA compiles while it is entered, and the seconds that takes."""

    def __enter__(self) -> "CompileLog":
        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *error) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, seconds: float, **facts) -> None:
        if event == COMPILED:
            self.count, self.seconds = self.count + 1, self.seconds + seconds


def finished(output: Any) -> Any:
    """`output` when it is there: JAX returns before its work is done."""
    return jax.block_until_ready(output)


def take_turns(runs: Mapping[str, Run], *, least: int, most: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of a run of every alternative in every round: at least `least`, and on until `seconds` or `most` are over.

    The order is turned round in every second round.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    names, began = list(runs), time.perf_counter()
    for turn in range(most):
        if turn >= least and time.perf_counter() - began > seconds:
            break
        for name in names if turn % 2 == 0 else reversed(names):
            time.sleep(PAUSE)
            taken = _seconds(runs[name])
            times[name].append(_seconds(runs[name]) if taken < WARM else taken)
    return times


def _seconds(run: Run) -> float:
    start = time.perf_counter()
    finished(run())
    return time.perf_counter() - start


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


@contextlib.contextmanager
def limited_to(cores: int | None) -> Iterator[None]:
    """Keeps every thread that the process has, and those it starts, on the first `cores` of its cores. Linux only."""
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


def measure(work: Workload, *, least: int | None = None, most: int = 30, seconds: float = 20.0) -> dict[str, Timing]:
    """The timing of every alternative of `work`, after their outputs were found equal."""
    with limited_to(work.cores):
        return _measure(work, least or work.rounds, most, seconds)


def _measure(work: Workload, least: int, most: int, seconds: float) -> dict[str, Timing]:
    runs, outputs, compiled, first = {}, {}, {}, {}
    for name, prepare in work.alternatives.items():
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
    times = take_turns(turns, least=least, most=most, seconds=seconds)
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
