"""What the harness counts, on work whose cost is known."""

import os
import pathlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixel_jax.bench import timing
from pixel_jax.bench.memory import array_bytes, highest, peak_memory
from pixel_jax.bench.timing import Case, CompileLog, Workload, limited_to, measure, quartiles, take_turns

MEGABYTES = 64
ROOT = pathlib.Path(__file__).parents[2]


def _fill() -> np.ndarray:
    return np.ones(MEGABYTES * 1_000_000, np.uint8)


def _build(quick: bool) -> Workload:
    return Workload("memory", {"filled": lambda: _fill, "empty": lambda: lambda: None}, check=lambda outputs: None)


def _build_wasteful(quick: bool) -> Workload:
    """Needs more to be made than to be run, and an input that is there when it runs."""
    _fill()
    given = _fill()
    return Workload("memory", {"given": lambda: lambda: given[:1]}, check=lambda outputs: None)


CASES = (Case("memory", _build), Case("wasteful", _build_wasteful))


def _count(outputs):
    np.testing.assert_array_equal(*outputs.values())


@pytest.mark.parametrize("warm, expected", [(10.0, "aabbbbaaaabb"), (0.0, "abbaab")])
def test_alternatives_take_turns_and_change_places(monkeypatch, warm, expected):
    """What takes long does not run twice in its turn."""
    monkeypatch.setattr(timing, "WARM", warm)
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    times = take_turns(runs, least=3, most=3, seconds=0)
    assert order == list(expected) and {len(x) for x in times.values()} == {3}


def test_unequal_outputs_are_no_comparison():
    work = Workload("", {"ours": lambda: lambda: jnp.zeros(2), "theirs": lambda: lambda: np.ones(2)}, check=_count)
    with pytest.raises(AssertionError):
        measure(work, least=1, most=1)


def test_compilations_are_counted_first_and_later():
    growing = iter(range(1, 100))

    def prepare():
        double = jax.jit(lambda x: x * 2)
        return lambda: double(np.zeros(next(growing)))

    def steady():
        double = jax.jit(lambda x: x * 3)
        return lambda: double(np.zeros(5))

    work = Workload("", {"grows": prepare, "steady": steady}, check=lambda outputs: None)
    timings = measure(work, least=4, most=4)
    assert (timings["grows"].compilations, timings["grows"].recompilations) == (1, 8)
    assert (timings["steady"].compilations, timings["steady"].recompilations) == (1, 0)
    assert timings["grows"].rounds == 4 and timings["grows"].ratio == 1


def test_the_compile_log_is_over_at_its_end():
    with CompileLog() as log:
        jax.jit(lambda x: x + 1)(np.zeros(3))
    jax.jit(lambda x: x + 2)(np.zeros(3))
    assert log.count == 1 and log.seconds > 0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are kept on cores on Linux only")
def test_one_core_holds_threads_that_were_there_before():
    before, seen, ask, stop = os.sched_getaffinity(0), [], threading.Event(), threading.Event()

    def older():
        ask.wait()
        seen.append(os.sched_getaffinity(0))
        stop.set()

    threading.Thread(target=older, daemon=True).start()
    with limited_to(1):
        ask.set()
        assert stop.wait(10) and len(seen[0]) == 1 and os.sched_getaffinity(0) == seen[0]
    assert os.sched_getaffinity(0) == before


def test_quartiles():
    assert quartiles([1.0]) == (1.0, 1.0, 1.0)
    assert quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (2.0, 3.0, 4.0)


def test_bytes_of_arrays():
    assert array_bytes({"a": jnp.zeros((4, 8)), "b": np.zeros(3, np.uint8)}) == 4 * 4 * 8 + 3


def test_peak_memory_is_that_of_the_alternative(monkeypatch):
    monkeypatch.chdir(ROOT)
    filled, empty = (peak_memory("tests.bench.test_timing", "memory", name, True) for name in ("filled", "empty"))
    # The kernel counts pages in batches (proc(5)): the record may be a little low.
    assert 0.95 * MEGABYTES * 1e6 < filled < 1.25 * MEGABYTES * 1e6 and empty < 0.25 * MEGABYTES * 1e6


def test_inputs_count_and_what_was_needed_to_make_them_does_not(monkeypatch):
    monkeypatch.chdir(ROOT)
    given = peak_memory("tests.bench.test_timing", "wasteful", "given", True)
    assert 0.95 * MEGABYTES * 1e6 < given < 1.25 * MEGABYTES * 1e6


def test_a_peak_is_never_negative():
    assert highest(lambda: None, before=2**50) in (0, None)


def test_a_failing_process_says_why(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(RuntimeError, match="KeyError: 'absent'"):
        peak_memory("tests.bench.test_timing", "absent", "filled", True)
