"""Measures the peak memory of one alternative of a case in a separate process.

    python -m pixel_jax.bench.memory MODULE CASE ALTERNATIVE [--quick]

MODULE has a tuple `CASES`. On a CPU it is the kernel's record of the process's resident memory, reset after the first run
(which excludes the compiler's memory), minus the memory that the process had before inputs were made. On other devices it is
the device's own record.
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
    """The bytes of memory that this process has now, where the kernel records them (on a CPU); else 0."""
    import jax

    return _resident("VmRSS") if jax.default_backend() == "cpu" and CLEAR.exists() else 0


def highest(run: Callable[[], object], before: int) -> int | None:
    """The peak bytes of memory during `run()`, minus `before`; None where neither the kernel nor the device records them."""
    import jax

    from pixel_jax.bench.timing import finished

    on_cpu = jax.default_backend() == "cpu"
    if on_cpu and not CLEAR.exists():
        return None
    finished(run())
    gc.collect()
    if not on_cpu:
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")  # resets the peak (proc(5))
    finished(run())
    return _resident("VmHWM") - before


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
    build = {case.name: case.build for case in importlib.import_module(module).CASES}[case]
    prepare = build(quick).alternatives[alternative]
    before = taken()
    peak = highest(prepare(), before)
    print("unknown" if peak is None else peak)


if __name__ == "__main__":
    main(*sys.argv[1:4], quick="--quick" in sys.argv[4:])
