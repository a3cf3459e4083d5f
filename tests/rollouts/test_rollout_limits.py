"""What lies beside a model: limits, and nothing of how training explored; and who goes by them."""

import dataclasses
import json
import types

import pytest
from PIL import Image

from pixel_jax import chat
from pixel_jax.config import load
from pixel_jax.models.io import save_pretrained
from pixel_jax.models.processor import Processor
from pixel_jax.phases import other_limits
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.limits import FILE, read_limits, single_answer, write_limits
from pixel_jax.train_config import TrainConfig
from tests.rollouts import scripted_model

EXPLORING = RolloutConfig(group_size=4, temperature=1.7, later_temperature=2.0, max_calls=2, crop_max_pixels=50 * 784)


def test_limits_without_exploration(tmp_path):
    assert read_limits(tmp_path) is None
    write_limits(tmp_path, EXPLORING)
    written = json.loads((tmp_path / FILE).read_text())
    assert (written["temperature"], written["later_temperature"], written["group_size"]) == (1.0, None, 1)
    found = read_limits(tmp_path)
    assert found == single_answer(EXPLORING) and found.max_calls == 2 and found.crop_max_pixels == 50 * 784
    # A file that has them all the same is no other model.
    (tmp_path / FILE).write_text(json.dumps(dataclasses.asdict(EXPLORING)))
    assert read_limits(tmp_path) == found


class Asked(Exception):
    """What the rollout was asked for."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    place = tmp_path_factory.mktemp("scripted")
    save_pretrained(
        scripted_model.model(),
        Processor(scripted_model.vocabulary().tokenizer, min_pixels=784, max_pixels=4 * 784),
        place,
    )
    hot = dataclasses.replace(scripted_model.CONFIG, temperature=1.7, later_temperature=2.0, group_size=4)
    (place / FILE).write_text(json.dumps(dataclasses.asdict(hot)))
    Image.fromarray(scripted_model.image(1, 120, 150)).save(place / "a.png")
    return place


@pytest.mark.parametrize("greedy, temperature, wanted", [(True, None, 0.0), (False, None, 1.0), (True, 0.7, 0.7)])
def test_chat_samples_as_the_model_is_judged(directory, monkeypatch, greedy, temperature, wanted):
    def asked(model, prompts, key, config, **_):
        raise Asked(config)

    given = types.SimpleNamespace(
        question="Which?",
        video=False,
        frames=None,
        fps=None,
        greedy=greedy,
        temperature=temperature,
        seed=0,
        tools=None,
        call_format=None,
        adapter=None,
        tool_workers=4,
        tool_seconds=30.0,
        html=None,
        json=None,
    )
    monkeypatch.setattr(chat, "FLAGS", given)
    monkeypatch.setattr("pixel_jax.serving.session.begin", asked)
    monkeypatch.setattr("pixel_jax.training.progress.use_compilation_cache", lambda path: None)
    with pytest.raises(Asked) as found:
        chat.main("chat", [str(directory), str(directory / "a.png")])
    (config,) = found.value.args
    assert (config.temperature, config.later_temperature, config.group_size) == (wanted, None, 1)
    assert (
        config.max_calls == scripted_model.CONFIG.max_calls
        and config.crop_max_pixels == scripted_model.CONFIG.crop_max_pixels
    )


def own(model, **more):
    values = {"model": str(model), "data": "d.jsonl", "out": "o", "rl": {"iterations": 1}, **more}
    return load(TrainConfig, values)


def test_rl_says_which_limits_it_goes_by(tmp_path):
    assert other_limits(own(tmp_path)) == []  # a model without limits of its own
    write_limits(tmp_path, EXPLORING)
    assert other_limits(own(tmp_path)) == [
        f"rl goes by config.rl.rollout.crop_max_pixels=784000, not by the 39200 of {tmp_path / FILE}",
        f"rl goes by config.rl.rollout.max_calls=4, not by the 2 of {tmp_path / FILE}",
    ]
    same = own(tmp_path, rl={"iterations": 1, "rollout": {"max_calls": 2, "crop_max_pixels": 50 * 784, "top_k": 3}})
    assert other_limits(same) == []  # how it samples is its own affair


def test_rl_says_that_it_does_not_go_by_tunings(tmp_path):
    assert other_limits(own(tmp_path, rollout={"max_pixels": 6272, "top_k": 40})) == [
        "rl goes by config.rl.rollout.max_pixels=1568000, not by the 6272 of config.rollout, which is of tuning"
    ]
    assert other_limits(own(tmp_path, rollout={"top_k": 3})) == [
        "rl goes by config.rl.rollout.top_k=40, not by the 3 of config.rollout, which is of tuning"
    ]
    both = {"max_pixels": 6272}
    assert other_limits(own(tmp_path, rollout=both, rl={"iterations": 1, "rollout": both})) == []
