"""Sampling, against NumPy and against the distribution it claims to draw from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixel_jax.models.cpu_forms import first_largest
from pixel_jax.rollouts.sampling import sample, truncate


def allowed(logits, top_k, top_p):
    """Indices that may be drawn, by sorting."""
    order = np.argsort(-logits, kind="stable")
    if top_k:
        order = order[:top_k]
    if top_p == 1.0:
        return set(order.tolist())
    p = np.exp(logits[order] - logits.max())
    p /= p.sum()
    return set(order[np.cumsum(p) - p < top_p].tolist())


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (5, 1.0), (0, 0.8), (12, 0.5), (100, 0.95), (1, 1.0)])
def test_truncation(top_k, top_p):
    logits = np.random.default_rng(0).normal(0, 3, (64, 40)).astype(np.float32)
    kept = np.isfinite(np.asarray(truncate(jnp.asarray(logits), top_k=top_k, top_p=top_p)))
    for row, keep in zip(logits, kept, strict=True):
        assert set(np.flatnonzero(keep).tolist()) == allowed(row, top_k, top_p)


def test_frequencies_and_log_probabilities():
    logits = jnp.array([2.0, 1.0, 0.0, -1.0])
    rows = 40_000
    keys = jax.random.split(jax.random.key(0), rows)
    temperature = jnp.full(rows, 0.7)
    token, logprob = sample(jnp.tile(logits, (rows, 1)), keys, temperature, top_k=3, top_p=1.0)
    full = jax.nn.log_softmax(logits / 0.7)
    # Recorded: the full distribution. Drawn: the truncated one.
    np.testing.assert_allclose(logprob, full[token], atol=1e-6)
    expected = np.append(jax.nn.softmax(logits[:3] / 0.7), 0.0)
    counts = np.bincount(np.asarray(token), minlength=4) / rows
    np.testing.assert_allclose(counts, expected, atol=4 * 0.5 / np.sqrt(rows))
    assert counts[3] == 0


def test_the_first_of_the_largest():
    x = jax.random.randint(jax.random.key(6), (50, 30), 0, 4).astype(jnp.float32)
    x = x.at[0].set(-jnp.inf).at[1, 7].set(jnp.inf)
    np.testing.assert_array_equal(first_largest(x), jnp.argmax(x, axis=1))
    assert int(first_largest(x[:1].at[0, 3].set(jnp.nan))[0]) == 29


def test_greedy_takes_the_best_and_records_temperature_one():
    logits = jax.random.normal(jax.random.key(1), (8, 30))
    token, logprob = sample(logits, jax.random.split(jax.random.key(2), 8), jnp.zeros(8), top_k=2, top_p=0.5)
    np.testing.assert_array_equal(token, jnp.argmax(logits, axis=1))
    np.testing.assert_allclose(logprob, jnp.max(jax.nn.log_softmax(logits), axis=1), atol=1e-6)


def test_a_row_depends_on_its_own_key_only():
    logits = jax.random.normal(jax.random.key(3), (6, 50))
    keys = jax.random.split(jax.random.key(4), 6)
    options = dict(top_k=0, top_p=0.9)
    together, _ = sample(logits, keys, jnp.ones(6), **options)
    alone = [int(sample(logits[i : i + 1], keys[i : i + 1], jnp.ones(1), **options)[0][0]) for i in range(6)]
    assert together.tolist() == alone


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_are_never_drawn(temperature):
    logits = jnp.tile(jnp.array([9.0, 8.0, 0.0]), (500, 1))
    keys = jax.random.split(jax.random.key(5), 500)
    rows = (jnp.arange(500) % 2 == 0)[:, None]
    for banned, everywhere in (
        (jnp.array([True, False, False]), True),
        (rows & jnp.array([True, False, False]), False),
    ):
        token, logprob = sample(logits, keys, jnp.full(500, temperature), top_k=2, top_p=1.0, banned=banned)
        assert not (token[::2] == 0).any() and (token[1::2] == 0).any() != everywhere
        np.testing.assert_allclose(logprob, jax.nn.log_softmax(logits[0])[token], atol=1e-6)
