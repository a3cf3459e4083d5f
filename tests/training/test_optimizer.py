"""The schedule at its corners, and one update against the textbook."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pixel_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer


def test_warm_up_then_cosine_to_half():
    schedule = learning_rate(OptimizerConfig(learning_rate=1.0, warmup=0.1), 100)
    np.testing.assert_allclose(schedule(0), 1 / 11, rtol=1e-6)
    np.testing.assert_allclose(schedule(9), 10 / 11, rtol=1e-6)
    np.testing.assert_allclose(schedule(10), 1.0, rtol=1e-6)
    np.testing.assert_allclose(schedule(55), 0.75, rtol=1e-6)
    np.testing.assert_allclose(schedule(100), 0.5, rtol=1e-6)


def test_constant_and_no_warm_up():
    schedule = learning_rate(OptimizerConfig(learning_rate=0.3, schedule="constant", warmup=0.0), 7)
    np.testing.assert_allclose([schedule(i) for i in range(9)], 0.3)


def test_one_update_clips_and_decays():
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", warmup=0.0, weight_decay=0.5, clip=1.0, eps=1e-3)
    optimizer = make_optimizer(config, 10)
    x = jnp.array([1.0, 2.0])
    updates, _ = optimizer.update(jnp.array([3.0, 4.0]), optimizer.init(x), x)
    g = np.array([0.6, 0.8])
    expected = np.array([1.0, 2.0]) * (1 - 0.1 * 0.5) - 0.1 * g / (g + 1e-3)
    np.testing.assert_allclose(optax.apply_updates(x, updates), expected, rtol=1e-5)


@pytest.mark.parametrize("bad", [{"warmup": 1.5}, {"learning_rate": 0.0}, {"clip": -1.0}, {"final_fraction": -0.1}])
def test_bad_values_are_named(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        OptimizerConfig(**bad)
