"""Run by the restart tests in a process of its own: tunes the tiny text model, and may kill itself at a given moment.

    python resumable_worker.py DIRECTORY OUTPUT STEPS [next|save|term|stuck|full STEP DELAY]

`next`: SIGKILL DELAY seconds after batch number STEP is asked for; `save`: DELAY seconds into the first save at or after
STEP; `term`: SIGTERM when batch number STEP is asked for; `stuck`: that batch never comes; `full`: from then on no file may
grow beyond 20,000 bytes.
"""

import os
import resource
import signal
import sys
import threading
import time

import jax
import numpy as np
from tiny_model import make_batch, make_model

from pixel_jax.data.batches import MemoryBatches
from pixel_jax.training.batch import Batch
from pixel_jax.training.checkpoint import Checkpoints
from pixel_jax.training.optimizer import OptimizerConfig
from pixel_jax.training.preemption import NOTICE
from pixel_jax.training.sft import SFTConfig, sft
from pixel_jax.training.steps import ForwardConfig

SAVE_EVERY = 2


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly(MemoryBatches):
    """Data that does something when its batch number `deadline` is asked for."""

    deadline = -1

    def __next__(self) -> Batch:
        if self.position == self.deadline:
            self.act()
        return super().__next__()


def main(directory, output, steps, moment="never", step="0", delay="0"):
    data = Deadly(make_batch(10)._replace(visual=None), 4, seed=3)
    NOTICE.listen()
    data.deadline = int(step) if moment in ("next", "term", "stuck", "full") else -1
    if moment == "next":
        data.act = threading.Timer(float(delay), die).start if float(delay) else die
    elif moment == "term":
        data.act = lambda: os.kill(os.getpid(), signal.SIGTERM)
    elif moment == "stuck":
        data.act = lambda: print("waits", flush=True) or time.sleep(600)
    elif moment == "full":
        data.act = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    elif moment == "save":
        plain = Checkpoints.save

        def save(self, at, *args, **kwargs):
            if at < int(step):
                return plain(self, at, *args, **kwargs)
            timer = threading.Timer(float(delay), die)
            timer.start()
            plain(self, at, *args, **kwargs)
            timer.join()  # the save was faster: the end comes right after it

        Checkpoints.save = save
    config = SFTConfig(
        steps=int(steps),
        batch_size=4,
        save_every=SAVE_EVERY,
        optimizer=OptimizerConfig(learning_rate=1e-2),
        forward=ForwardConfig(remat=False),
    )
    model = sft(make_model(), data, config, directory=directory)
    np.savez(output, *[np.asarray(x) for x in jax.tree.leaves(model)])


if __name__ == "__main__":
    main(*sys.argv[1:])
