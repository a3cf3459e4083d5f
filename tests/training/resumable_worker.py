"""Run by the restart tests in a process of its own: tunes the tiny text model, and may kill itself at a given moment.

    python resumable_worker.py DIRECTORY OUTPUT [next|save STEP DELAY]

`next`: SIGKILL when batch number STEP is asked for; `save`: DELAY seconds into the first save at or after STEP.
"""

import os
import signal
import sys
import threading

import jax
import numpy as np
from tiny_model import make_batch, make_model

from pixel_jax.training.batch import Batch
from pixel_jax.training.checkpoint import Checkpoints
from pixel_jax.training.optimizer import OptimizerConfig
from pixel_jax.training.sft import SFTConfig, Shuffled, sft
from pixel_jax.training.steps import ForwardConfig

STEPS, SAVE_EVERY = 9, 2


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly(Shuffled):
    """Data that ends the process when its batch number `deadline` is asked for."""

    deadline = -1

    def __next__(self) -> Batch:
        if self.position == self.deadline * self.batch_size:
            die()
        return super().__next__()


def main(directory, output, moment="never", step="0", delay="0"):
    data = Deadly(make_batch(10)._replace(visual=None), 4, seed=3)
    if moment == "next":
        data.deadline = int(step)
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
        steps=STEPS,
        batch_size=4,
        save_every=SAVE_EVERY,
        optimizer=OptimizerConfig(learning_rate=1e-2),
        forward=ForwardConfig(remat=False),
    )
    model = sft(make_model(), data, config, directory=directory)
    np.savez(output, *[np.asarray(x) for x in jax.tree.leaves(model)])


if __name__ == "__main__":
    main(*sys.argv[1:])
