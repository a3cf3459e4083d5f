"""`python -m pixel_jax.quickstart.arm DIRECTORY ARM CORE`: one arm of the reinforcement learning, on a core of its own.

Started by `pipeline.run_arms`. The core has to be chosen before JAX starts its threads, hence the imports below.
"""

import json
import os
import pathlib
import sys
import threading


def leave_with_parent() -> None:
    """Standard input is a pipe from the process that started this one: when it ends, however it ends, so do we.

    An arm left behind would write to the same files as the one that the next start begins.
    """
    while os.read(0, 1024):
        pass
    os._exit(1)


def main() -> None:
    threading.Thread(target=leave_with_parent, daemon=True).start()
    directory, arm, core = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        half = len(cores) // 2
        os.sched_setaffinity(0, cores[:half] if core == 0 else cores[half:])
    from pixel_jax.config import load
    from pixel_jax.quickstart.config import QuickstartConfig
    from pixel_jax.quickstart.pipeline import run_arm, start_process, use_cores

    use_cores(1)
    start_process(directory.parent / "compiled")
    run_arm(load(QuickstartConfig, json.loads((directory / "config.json").read_text())), directory, arm)


if __name__ == "__main__":
    main()
