"""What a run says of its course: where it goes on, how many epochs it makes, at what learning rate it is."""

import collections
import math

import jax
import numpy as np
import pytest

from pixel_jax.data.batches import MemoryBatches
from pixel_jax.phases import course_of
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.training.checkpoint import Checkpoints
from pixel_jax.training.loop import EARLY
from pixel_jax.training.optimizer import OptimizerConfig
from pixel_jax.training.rl import RLConfig
from pixel_jax.training.sft import SFTConfig, replay, sft
from pixel_jax.training.steps import ForwardConfig
from pixel_jax.training.writers import read_metrics
from tests.training.tiny_model import make_batch, make_model


class Lost(Exception):
    """A process ends here."""


class Fragile(MemoryBatches):
    """Data that is lost before batch number `end`."""

    end = -1

    def __next__(self):
        if self.position == self.end:
            raise Lost
        return super().__next__()


def test_a_run_by_epochs_stopped_gone_on_with_and_finished(tmp_path, capsys):
    """Rows make 1.5 batches an epoch, so two epochs are three steps."""
    config = SFTConfig(
        epochs=2,
        batch_size=4,
        save_every=1,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.0, final_fraction=0.0),
        forward=ForwardConfig(remat=False),
    )
    said = []
    for end in (2, -1, -1):
        data = Fragile(make_batch(6)._replace(visual=None), 4, seed=0)
        data.end = end
        try:
            sft(make_model(), data, config, directory=tmp_path, epoch=6 / 4)
        except Lost:
            assert end == 2
        said.append(capsys.readouterr().out)
    assert "sft: " not in said[0]
    assert "sft: going on from step 2 of 3\n" in said[1]
    assert "sft: already finished, all 3 steps\n" in said[2] and "going on" not in said[2]
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [x["epoch"] for x in metrics] == pytest.approx([2 / 3, 4 / 3, 2])
    rates = [1e-3 * (1 + math.cos(math.pi * i / 3)) / 2 for i in range(3)]
    assert [x["learning_rate"] for x in metrics] == pytest.approx(rates)


def test_a_replayable_run_keeps_its_first_epoch(tmp_path, capsys):
    """Stopped in it and gone on with; it is repeated from each of these checkpoints, to the last bit."""
    config = SFTConfig(
        epochs=2,
        batch_size=4,
        save_every=1,
        keep=1,
        replayable=True,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup=0.0),
        forward=ForwardConfig(remat=False),
    )
    rows = make_batch(6)._replace(visual=None)
    for end in (1, -1):
        data = Fragile(rows, 4, seed=0)
        data.end = end
        try:
            model = sft(make_model(), data, config, directory=tmp_path, epoch=6 / 4)
        except Lost:
            assert end == 1
    assert sorted(int(x.name) for x in (tmp_path / "checkpoints").iterdir()) == [3]
    with Checkpoints(tmp_path / EARLY, keep=None) as kept:
        assert kept.steps == [0, 1, 2]
    weights = lambda model: [np.asarray(x) for x in jax.tree.leaves(model)]
    for before, begun in {1: 1, 9: 2}.items():
        found = replay(
            make_model(), MemoryBatches(rows, 4, seed=0), config, early=tmp_path / EARLY, before=before, epoch=1.5
        )
        assert found.begun == begun
        for a, b in zip(weights(found.model), weights(model), strict=True):
            np.testing.assert_array_equal(a, b)
    next((tmp_path / EARLY / "2").rglob("manifest*")).write_bytes(b"")
    found = replay(make_model(), MemoryBatches(rows, 4, seed=0), config, early=tmp_path / EARLY, before=2, epoch=1.5)
    assert found.begun == 1 and "checkpoint 2 is damaged" in capsys.readouterr().err
    with pytest.raises(ValueError, match="it is not known how many steps make one"):
        sft(make_model(), MemoryBatches(rows, 4, seed=0), config)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"image": 16}, "16 questions; 90 iterations of 8 prompts make 45 epochs"),
        (
            {"image": 4},
            "4 questions; 90 iterations of 8 prompts make 180 epochs, each question 2 times an iteration: more questions or "
            "fewer config.rl.prompts teach more",
        ),
        (
            {"image": 12, "video": 5},
            "17 questions; 90 iterations of 8 prompts make 42.4 epochs, a question of the rarest shape 1.6 times an iteration: "
            "more questions or fewer config.rl.prompts teach more",
        ),
    ],
)
def test_how_often_questions_are_asked(shapes, said):
    config = RLConfig(iterations=90, prompts=8, train_batch=8, rollout=RolloutConfig(group_size=2))
    assert course_of(config, collections.Counter(shapes)) == said
