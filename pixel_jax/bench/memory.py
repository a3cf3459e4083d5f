"""Peak memory of one alternative of one case, in a process of its own.

    python -m pixel_jax.bench.memory MODULE CASE ALTERNATIVE [--quick]

MODULE has a tuple `CASES`. On a CPU it is the kernel's record of the process's resident memory, set back after the first
run (so that what the compiler needed does not count) and less what the process took before inputs were made; elsewhere
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
    """Bytes; None where neither the kernel nor the device keeps a record. Raises RuntimeError if the process fails."""
    command = [sys.executable, "-m", "pixel_jax.bench.memory", module, case, alternative, *["--quick"] * quick]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    answer = done.stdout.split()[-1]
    return None if answer == "unknown" else int(answer)


def taken() -> int:
    """Bytes of memory that this process has now, where it is the kernel that keeps the record (on a CPU); else 0."""
    import jax

    return _resident("VmRSS") if jax.default_backend() == "cpu" and CLEAR.exists() else 0


def highest(run: Callable[[], object], before: int) -> int | None:
    """Bytes of memory at the peak of `run()`, less `before`; None where neither the kernel nor the device keeps a record."""
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
    CLEAR.write_text("5")  # the highest mark begins anew (proc(5))
    finished(run())
    return _resident("VmHWM") - before


def _resident(what: str) -> int:
    """VmRSS (now) or VmHWM (highest), in bytes."""
    return 1024 * int(re.search(rf"{what}:\s+(\d+)", STATUS.read_text())[1])


def main(module: str, case: str, alternative: str, quick: bool) -> None:
    build = {case.name: case.build for case in importlib.import_module(module).CASES}[case]
    prepare = build(quick).alternatives[alternative]
    before = taken()
    found = highest(prepare(), before)
    print("unknown" if found is None else found)


if __name__ == "__main__":
    main(*sys.argv[1:4], quick="--quick" in sys.argv[4:])
