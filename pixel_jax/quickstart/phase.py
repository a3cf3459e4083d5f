"""`python -m pixel_jax.quickstart.phase DIRECTORY PHASE [CORE]`: a part of one seed, in a process of its own.

PHASE is `tuning`, `judging` or an arm; with CORE (0 or 1) it keeps to one half of the cores. Started by `pipeline`: the memory
of a phase goes back when it ends, and cores have to be chosen before JAX starts its threads, hence the imports below. Tuning
splits its batches over all cores; the others see one device, so that the programs of one are found compiled by the next.
"""

import os
import pathlib
import sys
import threading

from pixel_jax.signals import SIGNALS


def leave_with_parent() -> None:
    """Standard input is a pipe from the process that started this one: when it ends, however it ends, so do we.

    A phase left behind would write to the same files as the one that the next start begins.
    """
    while os.read(0, 1024):
        pass
    os._exit(1)


def main() -> None:
    SIGNALS.listen(None)  # the command that started this says it
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
