"""What a run says of its course: where it goes on, how many epochs it makes, at what learning rate it is."""

import collections
import math

import pytest

from pixel_jax.data.batches import MemoryBatches
from pixel_jax.phases import course_of
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.training.optimizer import OptimizerConfig
from pixel_jax.training.rl import RLConfig
from pixel_jax.training.sft import SFTConfig, sft
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
