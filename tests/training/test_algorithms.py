"""The named algorithms: losses and gradients against TRL's own trainers and verl, through files (`make_golden_losses.py`)."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixel_jax.config import load
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.training.algorithms import algorithm
from pixel_jax.training.losses import PolicyLossConfig, policy_loss
from pixel_jax.training.replay import ReplayConfig
from pixel_jax.training.rewards import overlong
from pixel_jax.training.rl import RLConfig

GOLDEN = json.loads(pathlib.Path(__file__).with_name("golden_losses.json").read_text())
NAMES = ("grpo", "dr_grpo", "dapo", "gspo", "rloo")
# What a case has beyond its algorithm.
EXTRA = {
    "grpo with kl": {"kl": 0.04},
    "grpo with truncated importance sampling": {"importance_cap": 1.2},
    "dapo with all": {"kl": 0.1, "importance_cap": 1.5},
    "grpo with sequence truncated": {"importance_cap": 1.2, "importance_level": "sequence"},
    "grpo with sequence masked": {
        "importance_cap": 1.2,
        "importance_level": "sequence",
        "importance_above": "masked",
    },
    "grpo with token masked": {"importance_cap": 1.2, "importance_above": "masked"},
    "grpo verl left_out": {"masked_traces": "left_out"},
    "grpo verl dual": {"dual_clip": 3.0},
    "grpo verl sequence": {"importance_cap": 1.2, "importance_level": "sequence"},
    "grpo verl far kl": {"kl": 0.1},
    "grpo verl below kl": {"kl": 0.1},
}
FAR = [case for case in GOLDEN["cases"] if {"far", "below"} & set(case.split())]  # a token 100 nats or more off


def config_of(name: str) -> RLConfig:
    return load(RLConfig, {"iterations": 1, **algorithm(name, longest=GOLDEN["longest"])})


def loss_config(case: str) -> PolicyLossConfig:
    return dataclasses.replace(config_of(case.split()[0]).loss, **EXTRA.get(case, {}))


def arrays(case: str) -> dict[str, np.ndarray]:
    values = {name: np.array(x, np.float32) for name, x in GOLDEN["cases"][case].items()}
    return values | {"mask": values["mask"].astype(bool)}


def loss(logprobs, x, config, rows=slice(None), weight=None, segments=None, advantage=None):
    weight = np.ones(len(x["mask"]), np.float32) if weight is None else weight
    advantage = x["advantage"] if advantage is None else advantage
    given = (logprobs, np.zeros_like(x["old"]), x["old"], x["sampler"], advantage, x["mask"], weight, x["reference"])
    *given, reference = (jnp.asarray(value)[rows] for value in given)
    return policy_loss(*given, config, reference_logprobs=reference, segments=segments)


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_losses_and_gradients_are_those_of_trl(case):
    x, config = arrays(case), loss_config(case)

    def mean(logprobs):
        found = loss(logprobs, x, config)
        return found.total / found.denominator, found

    (value, found), gradient = jax.value_and_grad(mean, has_aux=True)(x["logprobs"])
    np.testing.assert_allclose(value, x["loss"], rtol=2e-5)
    np.testing.assert_allclose(gradient, x["gradient"], rtol=5e-4, atol=1e-7 * max(1, np.abs(x["gradient"]).max()))
    assert (np.asarray(gradient) == 0)[~x["mask"]].all()
    assert np.asarray(gradient)[x["mask"]].any() or case == "gspo verl far"  # every trace is beyond the bound
    assert 0 < found.sums["clip_fraction"] < found.sums["tokens"]  # the case tells clipped from free


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_micro_batches_packing_and_padding_do_not_change_them(case):
    """Totals and denominators of two halves add up; two rows may share one; rows of weight 0 may hold anything."""
    x, config = arrays(case), loss_config(case)
    whole = loss(x["logprobs"], x, config)
    halves = [loss(x["logprobs"], x, config, rows) for rows in (slice(0, 2), slice(2, 6))]
    np.testing.assert_allclose(sum(half.total for half in halves), whole.total, rtol=1e-5)
    np.testing.assert_allclose(sum(half.denominator for half in halves), whole.denominator, rtol=1e-6)

    pairs = {name: np.reshape(x[name], (3, -1)) for name in ("logprobs", "old", "sampler", "reference", "mask")}
    segments = np.tile(np.repeat([0, 1], x["mask"].shape[1]), (3, 1))
    advantage = np.repeat(x["advantage"].reshape(3, 2), x["mask"].shape[1], axis=1)
    packed = loss(pairs["logprobs"], pairs, config, segments=jnp.asarray(segments), advantage=advantage)
    np.testing.assert_allclose(packed.total, whole.total, rtol=1e-5)
    np.testing.assert_allclose(packed.denominator, whole.denominator, rtol=1e-6)

    spoiled = {name: np.concatenate([value, np.full((1, *value.shape[1:]), np.nan)]) for name, value in x.items()
               if name not in ("loss", "gradient", "mask")}  # fmt: skip
    spoiled["mask"] = np.concatenate([x["mask"], np.ones((1, x["mask"].shape[1]), bool)])
    padded = loss(spoiled["logprobs"], spoiled, config, weight=np.array([1] * 6 + [0], np.float32))
    assert (padded.total, padded.denominator) == (whole.total, whole.denominator)


@pytest.mark.parametrize(
    "case", [case for case in GOLDEN["cases"] if "silent" not in case and case != "grpo verl left_out"]
)
@pytest.mark.parametrize("masked_traces", ["counted", "left_out"])
def test_what_a_trace_counts_whose_tokens_carry_no_loss(case, masked_traces):
    """Nothing in the numerator; in the denominator as much as any, or nothing. By `token` it never counts."""
    x, config = arrays(case), dataclasses.replace(loss_config(case), masked_traces=masked_traces)
    some = loss(x["logprobs"], x, config, slice(1, 6))
    silent = x | {"mask": x["mask"] & (np.arange(6) > 0)[:, None]}
    found = loss(x["logprobs"], silent, config)
    np.testing.assert_allclose(found.total, some.total, rtol=1e-6)
    one = {"row": 1.0, "constant": config.constant, "token": 0.0}[config.normalizer]
    assert found.denominator == some.denominator + (one if masked_traces == "counted" else 0)
    counted = loss(x["logprobs"], x, config)
    if config.normalizer != "token":
        assert counted.denominator == 6 * one


@pytest.mark.parametrize("case", FAR)
def test_a_token_far_off_leaves_everything_finite(case):
    """Also its metrics, and in float32, where exp(100) is infinite."""
    x, config = arrays(case), loss_config(case)
    found, gradient = jax.value_and_grad(lambda y: loss(y, x, config).total)(x["logprobs"])
    assert np.isfinite(found) and np.isfinite(gradient).all()
    sums = loss(x["logprobs"], x, config).sums
    assert all(np.isfinite(value) for value in sums.values()), sums


def test_fields_of_the_papers():
    """Each name stands for the settings of its paper; numbers are those of the papers' experiments."""
    grpo, dr_grpo, dapo, gspo, rloo = (config_of(name) for name in NAMES)
    assert [x.scale_by_std for x in (grpo, dr_grpo, dapo, gspo, rloo)] == [True, False, True, True, False]
    assert [x.baseline for x in (grpo, dr_grpo, dapo, gspo, rloo)] == ["mean"] * 4 + ["leave_one_out"]
    assert [x.loss.ratio for x in (grpo, dr_grpo, dapo, gspo, rloo)] == ["token"] * 3 + ["sequence", "product"]
    assert [x.loss.normalizer for x in (grpo, dr_grpo, dapo, gspo, rloo)] == ["row", "constant", "token", "row", "row"]
    assert (dapo.loss.clip_low, dapo.loss.clip_high) == (0.2, 0.28) and dapo.replay.kind == "dynamic"
    assert (gspo.loss.clip_low, gspo.loss.clip_high) == (3e-4, 4e-4)
    assert dr_grpo.loss.constant == GOLDEN["longest"]
    # 16,384 tokens without punishment, 4,096 more in which it grows
    reward = algorithm("dapo", longest=20_480)["reward"]
    assert reward == {"length_limit": 20_480, "length_buffer": 4096}
    with pytest.raises(ValueError, match="'ppo'; known are grpo, dr_grpo, dapo, gspo, rloo"):
        algorithm("ppo", longest=1)


def test_overlong_punishment_is_that_of_trl():
    found = overlong(np.array(GOLDEN["overlong"]["lengths"]), limit=GOLDEN["longest"], buffer=10)
    np.testing.assert_allclose(found, GOLDEN["overlong"]["punishment"], rtol=1e-6)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"loss": {"importance_cap": 2.0}, "old_logprobs": "sampler"}, "old_logprobs must be 'recomputed'"),
        ({"loss": {"kl": 0.1}}, "trainable '.*lora_', not '.*'"),
        ({"replay": {"kind": "dynamic", "capacity": 100}}, "4096 rows can never be collected .* 100"),
        ({"loss": {"clip_low": -0.1}}, "clip_low must be positive: -0.1"),
        ({"loss": {"importance_cap": 0.0}}, "importance_cap must be positive: 0"),
        ({"loss": {"dual_clip": 1.0}}, "dual_clip must be above 1, .*: 1.0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        load(RLConfig, {"iterations": 1, **changes})
    assert RolloutConfig().group_size * 512 <= ReplayConfig().capacity
