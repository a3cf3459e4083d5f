"""Measures the peak memory of one alternative of a case in a separate process.

    python -m pixel_jax.bench.memory MODULE CASE ALTERNATIVE [--quick]

MODULE has a tuple `CASES`. On a CPU it is the highest resident memory of the process (VmHWM) during the second run, for which the
kernel resets its record (/proc/self/clear_refs): the first run's compilation is not in it. What the process had with all
libraries imported, before the case made weights and inputs, is subtracted. Weights that only other alternatives use are freed.
On other devices it is the device's own record.
"""

import ctypes
import gc
import importlib
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable

STATUS, CLEAR = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


def peak_memory(module: str, case: str, alternative: str, quick: bool) -> int | None:
    """The peak in bytes; None where neither the kernel nor the device records it.

    Raises:
        RuntimeError: the process fails.
    """
    command = [sys.executable, "-m", "pixel_jax.bench.memory", module, case, alternative, *["--quick"] * quick]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    answer = done.stdout.split()[-1]
    return None if answer == "unknown" else int(answer)


def taken() -> int:
    """The bytes of memory that this process has in use, where the kernel records them (on a CPU); else 0."""
    import jax

    if jax.default_backend() != "cpu" or not CLEAR.exists():
        return 0
    _return_free_memory()
    return _resident("VmRSS")


def highest(run: Callable[[], object], before: int) -> int | None:
    """The peak bytes of memory during a second `run()`, minus `before`.

    It is 0 where the work is too small to be seen, None where neither the kernel nor the device records it.
    """
    import jax

    from pixel_jax.bench.timing import finished

    on_cpu = jax.default_backend() == "cpu"
    if on_cpu and not CLEAR.exists():
        return None
    finished(run())
    if not on_cpu:
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    _return_free_memory()
    CLEAR.write_text("5")  # resets the peak (proc(5))
    finished(run())
    return max(_resident("VmHWM") - before, 0)


def _return_free_memory() -> None:
    """Gives what is not in use back to the kernel, which otherwise still counts it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _resident(what: str) -> int:
    """Reads VmRSS (now) or VmHWM (highest), in bytes."""
    matched = re.search(rf"{what}:\s+(\d+)", STATUS.read_text())
    assert matched is not None
    return 1024 * int(matched[1])


def array_bytes(*trees) -> int:
    """The bytes of all arrays."""
    import jax

    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trees))


def main(module: str, case: str, alternative: str, quick: bool) -> None:
    """Prints the peak memory of an alternative."""
    import jax

    build = {case.name: case.build for case in importlib.import_module(module).CASES}[case]
    network = sys.modules.get("pixel_jax.bench.network")  # of the cases about a model
    if network and network.HAS_TORCH:
        importlib.import_module("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    before = taken()
    run = build(quick).alternatives[alternative]()
    if network:
        network.forget()
    jax.clear_caches()  # programs with which the case was made
    peak = highest(run, before)
    print("unknown" if peak is None else peak)


if __name__ == "__main__":
    main(*sys.argv[1:4], quick="--quick" in sys.argv[4:])
