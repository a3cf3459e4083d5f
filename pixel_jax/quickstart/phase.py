"""`python -m pixel_jax.quickstart.phase DIRECTORY PHASE [CORE]`: one phase of a seed, in its own process.

PHASE is `tuning`, `judging` or an arm; with CORE (0 or 1) it uses one half of the cores. `pipeline` starts it: the memory of a
phase is freed when it ends, and cores must be chosen before JAX starts its threads, hence the imports below. Tuning splits its
batches over all cores; the other phases see one device, so that they share compiled programs.
"""

import os
import pathlib
import sys
import threading

from pixel_jax.signals import SIGNALS


def leave_with_parent() -> None:
    """Ends this process when its parent ends: standard input is a pipe from the parent.

    A phase left behind would write to the same files as the phases of the next start.
    """
    while os.read(0, 1024):
        pass
    os._exit(1)


def main() -> None:
    """Runs the phase that the command line names."""
    SIGNALS.listen(None)  # the parent prints the message
    threading.Thread(target=leave_with_parent, daemon=True).start()
    directory, phase = pathlib.Path(sys.argv[1]), sys.argv[2]
    cores = sorted(os.sched_getaffinity(0))
    if len(sys.argv) > 3 and len(cores) > 1:
        half = len(cores) // 2
        os.sched_setaffinity(0, cores[:half] if sys.argv[3] == "0" else cores[half:])
    from pixel_jax.config import load
    from pixel_jax.files import read_json
    from pixel_jax.parallel.mesh import use_cores
    from pixel_jax.quickstart.config import QuickstartConfig
    from pixel_jax.quickstart.pipeline import run_arm, run_judging, run_tuning, start_process

    use_cores(len(cores) if phase == "tuning" else 1)
    start_process(directory.parent / "compiled")
    config = load(QuickstartConfig, read_json(directory / "config.json"))
    if phase == "tuning":
        run_tuning(config, directory)
    elif phase == "judging":
        run_judging(config, directory)
    else:
        run_arm(config, directory, phase)


if __name__ == "__main__":
    main()
