"""Configurations are strict: every key is known and every value has the declared type."""

import copy
import dataclasses
from typing import Literal

import ml_collections
import pytest

from pixel_jax.config import ConfigError, load
from pixel_jax.evaluation.config import RELEASED, EvalConfig
from pixel_jax.settings import settings
from pixel_jax.train_config import TrainConfig
from pixel_jax.training.sft import SFTConfig


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    mode: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = ()

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"rate must not be negative: {self.rate}")


@dataclasses.dataclass(frozen=True)
class Outer:
    steps: int
    inner: Inner = Inner()
    limit: float | None = None
    other: Inner | None = None
    told: Inner = Inner(rate=0.25, mode="b")
    on: bool = False
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)


def test_a_config_dict_becomes_nested_dataclasses():
    values = ml_collections.ConfigDict({"steps": 3, "inner": {"rate": 1, "sizes": [1, 2]}, "mesh": {"data": 2}})
    assert load(Outer, values) == Outer(3, Inner(rate=1.0, sizes=(1, 2)), mesh={"data": 2})
    assert type(load(Outer, values).inner.rate) is float


def test_a_section_keeps_what_its_parent_declares():
    assert (
        load(Outer, {"steps": 1, "told": {}})
        == load(Outer, {"steps": 1, "told": Outer.told})
        == load(Outer, {"steps": 1})
    )
    assert load(Outer, {"steps": 1, "told": {"sizes": (3,)}}).told == Inner(0.25, "b", (3,))
    assert load(Outer, {"steps": 1, "told": {"rate": 0.5}}).told == Inner(0.5, "b")


MAY_BE_ZERO = {
    *("temperature", "later_temperature", "top_k", "min_tokens", "max_calls", "max_images", "pad", "min_crop"),
    *("alpha", "beta", "threshold", "budget", "unparsable", "length_limit", "length_buffer", "exponent", "seed"),
    *("clip_low", "clip_high", "kl", "final_fraction", "warmup", "b1", "b2", "weight_decay", "time_operations"),
    *("share", "drawn", "save_model_every", "staleness"),
}
SHAPES = {
    *("trace_tokens", "trace_frames", "trace_patches", "video_frames", "video_patches"),
    *("prompt_width", "video_prompt_width"),
}
NO_NUMBER_YET = {*SHAPES, "micro_batches", "steps", "epochs", "in_flight", "tail_rows", "importance_cap", "dual_clip"}
WHOLE = {
    **{"model": "m", "data": "d", "out": "o", "sft": {}, "lora": {"rank": 1, "alpha": 1.0, "targets": "x"}},
    "rl": {"iterations": 1, "packing": {"length": 1, "slices": 1}},
}


def numbers():
    """Dotted names of the numbers of a training config that zero makes no sense of."""
    for setting in settings(TrainConfig, WHOLE):
        name = setting.key.removeprefix("config.")
        last = name.split(".")[-1]
        if (last in NO_NUMBER_YET or type(setting.value) in (int, float)) and last not in MAY_BE_ZERO:
            yield name
    yield "lora.alpha"


@pytest.mark.parametrize("name", list(numbers()))
def test_zero_is_refused_by_name_where_it_means_nothing(name):
    values = copy.deepcopy(WHOLE)
    *sections, last = name.split(".")
    section = values
    for part in sections:
        section = section.setdefault(part, {})
    section[last] = 0
    with pytest.raises(ConfigError, match=rf"^{'.'.join(['config', *sections])}\b.*{last}.* 0"):
        load(TrainConfig, values)


def test_steps_or_epochs():
    assert (SFTConfig(steps=7).updates(None), SFTConfig(epochs=2.5).updates(10.0)) == (7, 25)
    assert SFTConfig(epochs=3).updates(10 / 3) == 10 and SFTConfig(epochs=0.01).updates(4.0) == 1
    assert SFTConfig().updates(61.3) == 246  # the released warm start: 7,850 traces in batches of 128
    with pytest.raises(ValueError, match="not known how many steps make an epoch"):
        SFTConfig(epochs=2).updates(None)
    with pytest.raises(ConfigError, match=r"config.sft: steps 3 and epochs 2.0 are both given"):
        load(TrainConfig, {"model": "m", "data": "d", "out": "o", "sft": {"steps": 3, "epochs": 2}})


@pytest.mark.parametrize("section", [{}, {"learning_rate": SFTConfig(steps=1).optimizer.learning_rate}])
def test_tuning_keeps_its_schedule_when_the_optimizer_is_named(section):
    assert load(SFTConfig, {"steps": 1, "optimizer": section}) == SFTConfig(steps=1)


def test_an_evaluation_keeps_the_released_settings_when_one_is_set():
    values = {"model": "m", "out": "o", "benchmarks": {"own": {"format": "jsonl", "data": "d"}}}
    calls = RELEASED.max_calls
    assert load(EvalConfig, {**values, "rollout": {"max_calls": calls}}).rollout == RELEASED
    changed = load(EvalConfig, {**values, "rollout": {"max_calls": calls + 1}}).rollout
    assert changed == dataclasses.replace(RELEASED, max_calls=calls + 1)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"steps": 1, "inner": {"rat": 1.0}}, r"config\.inner\.rat.*nearest.*config\.inner\.rate"),
        ({"steps": 1, "inner": {"zzz": 1.0}}, r"unknown key config\.inner\.zzz; config\.inner has rate, mode, sizes"),
        ({"steps": 1.0}, r"config\.steps must be int, not 1\.0 \(float\)"),
        ({"steps": 1, "inner": {"rate": float("nan")}}, r"config\.inner\.rate must be float, not nan"),
        ({"steps": 1, "limit": float("inf")}, r"config\.limit must be float \| None, not inf"),
        ({"steps": True}, r"config\.steps must be int, not True"),
        ({"steps": 1, "on": 1}, r"config\.on must be bool"),
        ({"steps": 1, "limit": "none"}, r"config\.limit must be float \| None"),
        ({"steps": 1, "inner": {"mode": "c"}}, r"config\.inner\.mode must be one of 'a', 'b', not 'c'"),
        ({"steps": 1, "inner": {"sizes": [1, "2"]}}, r"config\.inner\.sizes\[1\] must be int"),
        ({"steps": 1, "inner": 4}, r"config\.inner must be a mapping"),
        ({"steps": 1, "other": 4}, r"config\.other must be .*Inner \| None, not 4"),
        ({"steps": 1, "other": {"rat": 1.0}}, r"config\.other\.rat.*nearest.*config\.other\.rate"),
        ({"steps": 1, "other": {"rate": -1.0}}, r"config\.other: rate must not be negative: -1\.0"),
        ({"inner": {}}, "lacks steps"),
        ({"steps": 1, "inner": {"rate": -1.0}}, r"config\.inner: rate must not be negative: -1\.0"),
    ],
)
def test_errors_name_the_key_and_the_value(values, words):
    with pytest.raises(ConfigError, match=words):
        load(Outer, values)
