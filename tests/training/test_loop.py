"""The loop by hand: it goes back to where it saved, and whoever watches is told every step."""

import jax.numpy as jnp
import numpy as np

from pixel_jax.training.loop import Keeping, Loop, RunSteps
from pixel_jax.training.state import TrainState
from pixel_jax.training.writers import read_metrics


class Numbers:
    """Data: 1, 2, 3, ..."""

    def __init__(self):
        self.given = 0

    def __next__(self):
        self.given += 1
        return self.given

    def get_state(self):
        return {"given": self.given}

    def set_state(self, state):
        self.given = state["given"]


def make(directory, watch=None):
    numbers = Numbers()

    def step(state, i):
        found = next(numbers)
        return state._replace(trainable={"w": state.trainable["w"] * 2 + found}), {"loss": float(found), "at": float(i)}

    state = TrainState({"w": jnp.zeros(3)}, (), (), jnp.zeros((), jnp.int32))
    return Loop(RunSteps("toy", 5, step, {"numbers": numbers}), state, Keeping(directory, save_every=2), watch)


def weights(loop):
    return np.asarray(loop.state.trainable["w"]).tolist()


def test_restore_step_save(tmp_path):
    seen = []
    with make(tmp_path, lambda state, done, log: seen.append((done, log is not None))) as loop:
        loop.restore()
        for _ in range(3):
            metrics = loop.step()
            loop.save()
        assert loop.done == 3 and metrics == {"loss": 3.0, "at": 2.0} and weights(loop) == [11.0] * 3  # 1, 4, 11
    assert seen == [(i, True) for i in range(4)]
    with make(tmp_path) as loop:
        loop.restore()  # of the second step: the third was not saved
        assert loop.done == 2 and weights(loop) == [4.0] * 3
        assert loop.step() == {"loss": 3.0, "at": 2.0}  # the data went back, too
    whole = make(None)
    whole.run()
    again = make(tmp_path)
    again.run()
    assert again.done == whole.done == 5 and weights(again) == weights(whole) == [57.0] * 3
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(5))
    assert make(tmp_path).run() is not None and read_metrics(tmp_path / "metrics.jsonl")[-1]["loss"] == 5.0
