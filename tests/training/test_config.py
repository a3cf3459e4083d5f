"""Configurations are strict: every key is known and every value has the declared type."""

import dataclasses
from typing import Literal

import ml_collections
import pytest

from pixel_jax.config import ConfigError, load
from pixel_jax.evaluation.config import RELEASED, EvalConfig
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
