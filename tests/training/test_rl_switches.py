"""Switches of reinforcement learning: the adapters-off reference, importance sampling, over-turn masking, dynamic sampling,
and what an iteration says about itself."""

import dataclasses

import jax
import numpy as np
import pytest
from test_rl import CONFIG, N, Questions, make_trajectories, score, scored, stages
from tiny_model import make_batch, tiny_config

from pixel_jax.models import flops
from pixel_jax.models.layers import LoRAWeight
from pixel_jax.models.lora import add_lora, linears, without_lora
from pixel_jax.rollouts.shapes import BatchShape
from pixel_jax.rollouts.trajectory import STOP_ANSWER, STOP_CALLS, CallStatus
from pixel_jax.training import stages as stages_module
from pixel_jax.training.batch import Rows, pack
from pixel_jax.training.cost import Throughput
from pixel_jax.training.losses import PolicyLossConfig
from pixel_jax.training.optimizer import OptimizerConfig, make_optimizer
from pixel_jax.training.replay import Replay, ReplayConfig
from pixel_jax.training.rewards import RewardConfig
from pixel_jax.training.rl import rl, rollout_metrics
from pixel_jax.training.stages import Weighed, mask_unfinished
from pixel_jax.training.state import init_state
from pixel_jax.training.steps import ForwardConfig, check_report, make_rl_step, make_score_step
from pixel_jax.training.writers import read_metrics

TARGETS = r"model\.layers\..*"


@pytest.fixture(scope="module")
def adapted(model):
    """The tiny model with adapters that say something."""
    model = add_lora(model, jax.random.key(0), rank=2, alpha=4.0, targets=TARGETS)
    wake = lambda w: w.replace(w[...] + 0.3) if isinstance(w, LoRAWeight) else w
    return jax.tree.map(wake, model, is_leaf=lambda x: hasattr(x, "axes"))


def test_the_reference_is_the_same_weights_without_adapters(model, adapted):
    off = without_lora(adapted)
    assert all(linear.lora_a is None and linear.lora_scale == 0 for _, linear in linears(off))
    # The same buffers, not equal ones: nothing is held twice.
    for a, b in zip(jax.tree.leaves(off), jax.tree.leaves(model), strict=True):
        assert a is b
    assert any(linear.lora_a is not None for _, linear in linears(adapted))
    with pytest.raises(ValueError, match="no adapters"):
        without_lora(model)


def test_divergence_from_the_reference_and_importance(adapted, model, batch):
    """The step's numbers from the score step's log-probabilities, in NumPy."""
    scorer = make_score_step(ForwardConfig(remat=False), later_temperature=0.9)
    now, reference = (np.asarray(scorer(m, batch)[0], np.float64) for m in (adapted, model))
    sampler = now + np.random.default_rng(0).normal(size=now.shape) * batch.loss_mask
    batch = batch._replace(old_logprobs=now.astype(np.float32), logprobs=sampler.astype(np.float32))
    config = PolicyLossConfig(kl=0.5, importance_cap=1.5)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup=0.0), 10)
    state = init_state(adapted, optimizer, trainable=".*lora_")
    step = make_rl_step(ForwardConfig(remat=False), config, optimizer, later_temperature=0.9)
    state, report = step(state, batch)
    found = check_report(report, 0)
    apart = (reference - now)[batch.loss_mask]
    k3 = np.exp(apart) - apart - 1
    assert k3.mean() > 0.01
    np.testing.assert_allclose(found["kl_reference"], k3.mean(), rtol=1e-3)
    weights = np.exp((now - sampler)[batch.loss_mask])
    np.testing.assert_allclose(found["importance_capped"], np.mean(weights > 1.5), rtol=1e-6)
    advantage = np.broadcast_to(batch.advantage[:, None], now.shape)[batch.loss_mask]
    expected = np.sum(-advantage * np.minimum(weights, 1.5) + 0.5 * k3) / (200 * 8)
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-3)
    # Without advantages nothing but the divergence is left, and it falls.
    before, still = found["kl_reference"], batch._replace(advantage=np.zeros(8, np.float32))
    for _ in range(6):
        state, report = step(state, still)
    assert check_report(report, 7)["kl_reference"] < 0.9 * before


def test_rows_that_ran_out_of_turns_carry_no_loss():
    trajectories = make_trajectories(0)
    stop = np.where(np.arange(16) % 4 == 1, STOP_CALLS, STOP_ANSWER)
    batch = make_batch(16)
    found = mask_unfinished(batch, stop)
    over = stop != STOP_ANSWER
    assert not found.loss_mask[over].any() and (found.advantage[over] == 0).all()
    for name in ("loss_mask", "advantage"):
        np.testing.assert_array_equal(getattr(found, name)[~over], getattr(batch, name)[~over])
    assert pack(found).segments is not None  # and they can still be packed
    assert trajectories.stop.tolist() == [0] * 16


@pytest.fixture
def rollouts(monkeypatch):
    """Rows that depend on the key; every fourth runs out of calls. Returns how often it was asked."""
    asked = []

    def rollout(model, prompts, key, config):
        asked.append(key)
        found = make_trajectories(int(jax.random.randint(key, (), 0, 10**6)))
        return found._replace(stop=np.where(np.arange(16) % N == 0, STOP_CALLS, STOP_ANSWER).astype(np.int32))

    monkeypatch.setattr(stages_module, "rollout", rollout)
    return asked


def run(model, directory, *, score=score, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    rl(model, Questions(), stages(config, score), config, directory=directory)
    return read_metrics(directory / "metrics.jsonl")


def test_over_turn_masking_in_the_loop(model, rollouts, tmp_path):
    options = {"iterations": 1, "replay": ReplayConfig(kind="none"), "loss": PolicyLossConfig(normalizer="token")}
    (masked,) = run(model, tmp_path / "masked", mask_unfinished=True, **options)
    (plain,) = run(model, tmp_path / "plain", **options)
    assert masked["tokens"] < plain["tokens"] and masked["loss"] != plain["loss"]
    assert masked["reward"] == plain["reward"] and masked["finished"] == plain["finished"] == 0.75


def test_dynamic_sampling_waits_until_informative_rows_fill_the_batch(model, rollouts, tmp_path):
    """In each rollout one group of four is informative: four rollouts make one round of updates."""
    right = lambda rows, answers: (np.arange(16) == 1).astype(np.float32)
    flat = RewardConfig(alpha=0.0, beta=0.0)
    lines = run(
        model, tmp_path, score=right, iterations=8, reward=flat, train_batch=16, replay=ReplayConfig(kind="dynamic")
    )
    assert [line["updates"] for line in lines] == [0, 0, 0, 1] * 2
    assert len(rollouts) == 8 and {line["nonzero_variance"] for line in lines} == {0.25}
    # Nothing was updated in between: the update after a wait is on-policy.
    assert all(line["kl"] < 1e-6 for line in lines if line["updates"])


def test_a_dynamic_buffer_holds_each_row_once_and_is_emptied():
    replay = Replay(ReplayConfig(kind="dynamic", capacity=8), 0)
    rows = []
    for i in range(4):
        batch = make_batch(4, seed=i)
        batch.tokens[:, 0] = 10 * i + np.arange(4)
        rows.append(replay.select(Rows(batch, np.empty(4, object)), np.arange(4) < 3, BatchShape(24, 1, 1, 16, 64, 64)))
    assert rows[0] is None and rows[2] is None
    names = [sorted(replay.batch(rows[i]).batch.tokens[:, 0].tolist()) for i in (1, 3)]
    assert names == [[0, 1, 2, 10], [20, 21, 22, 30]]  # 11 and 12 were sampled by a policy that is gone


def test_what_an_iteration_says_about_itself():
    done, failed, spent = CallStatus.DONE, CallStatus.FAILED, CallStatus.SPENT
    calls = [[done], [failed], [done, failed], [done, done, spent]] + [[]] * 12
    trajectories, correct = make_trajectories(0, calls), np.arange(16) % 2.0
    weighed = Weighed(scored(calls, correct=correct, threshold=0.9), None, np.array([True, False, False, False]))
    found = rollout_metrics(weighed)
    assert found["accuracy"] == 0.5 and found["rapr"] == 3 / 16 and found["nonzero_variance"] == 0.25
    assert found["operations"] == 4 / 16 and found["calls"] == 7 / 16 and found["call_errors"] == 2 / 6
    # The first group looks 3 times in 4: bonus .5 (.9 - .75) each; its last row pays for a second look.
    np.testing.assert_allclose(found["reward_curiosity"], 3 * 0.075 / 16, rtol=1e-5)
    np.testing.assert_allclose(found["reward_budget"], -0.05 / 16, rtol=1e-5)
    assert found["reward_answer"] == 0.5 and found["reward_length"] == 0
    total = sum(found[f"reward_{part}"] for part in ("answer", "curiosity", "budget", "length"))
    np.testing.assert_allclose(found["reward"], total, rtol=1e-6)
    first = np.array([0.075, 1, 0.075, 1.025])
    np.testing.assert_allclose(found["group_variance"], (np.var(first) + 3 * 0.25) / 4, rtol=1e-5)
    lengths = trajectories.loss_mask.sum(1)
    assert found["response_tokens"] == lengths.mean() and found["response_tokens_max"] == lengths.max()
    assert found["row_tokens"] == trajectories.valid.sum(1).mean()


def test_throughput_counts_what_is_useful(model, adapted, batch, monkeypatch):
    batch = batch._replace(weight=np.array([1] * 6 + [0, 0], np.float32))
    lengths = batch.valid[:6].sum(1)
    work = flops.row_work(lengths, np.array([[1, 4, 4]] * 6), tiny_config())
    meter = Throughput(model, ".*", None)
    meter.count(batch)
    metrics = meter.metrics(2.0)
    assert metrics["tokens_per_second"] == lengths.sum() / 2 and "mfu" not in metrics
    expected = sum(flops.training_flops(tiny_config(), work))
    np.testing.assert_allclose(metrics["flops_per_second"], expected / 2)
    assert meter.metrics(1.0)["tokens_per_second"] == 0
    # Traces of a packed row do not see each other.
    alone = batch._replace(weight=np.ones(8, np.float32))
    rates = []
    for rows in (alone, pack(alone, length=80, slices=4)):
        meter.count(rows)
        rates.append(meter.metrics(1.0))
    assert rates[0] == rates[1]
    # Adapters and frozen parts cost less; a peak makes it a share.
    monkeypatch.setitem(flops.PEAK_FLOPS, jax.devices()[0].device_kind, 1e9)
    weights = sum(w.size for w in jax.tree.leaves(adapted.language_model)) - sum(
        w.size for w in jax.tree.leaves(model.language_model)
    )
    meter = Throughput(adapted, ".*lora_", None)
    meter.count(batch)
    expected = sum(flops.training_flops(tiny_config(), work, vision=False, base=False, adapter_weights=weights))
    np.testing.assert_allclose(meter.metrics(2.0)["mfu"], expected / 2 / 1e9)
