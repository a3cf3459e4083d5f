"""Rollouts with weights and caches of eight bits: what they compute is what rounding by hand gives, and near the model's own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pixel_jax.models import LanguageModel, decoder, int8
from pixel_jax.models.attention import Mask, cached_attention
from pixel_jax.models.int8 import Int8, quantised
from pixel_jax.models.layers import Weight
from pixel_jax.models.lora import copied, linears
from pixel_jax.rollouts import loop
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.layers import quantised_layers, row_cache_bytes
from pixel_jax.rollouts.rollout import rollout
from pixel_jax.rollouts.trajectory import to_host
from tests.rollouts import scripted_model
from tests.training.tiny_model import tiny_config

NUMBERS = st.floats(-1e4, 1e4, width=32)


def by_hand(x) -> np.ndarray:
    """Rounding to eight bits as NumPy does it, back in wide numbers."""
    x = np.asarray(x, np.float64)
    scale = np.abs(x).max(axis=-1, keepdims=True) / 127
    return np.round(x / np.where(scale == 0, 1, scale)) * scale


def widened(x: Int8) -> np.ndarray:
    return np.asarray(x.values, np.float64) * np.asarray(x.scale, np.float64)[..., None]


@given(arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=NUMBERS))
def test_no_number_is_off_by_more_than_half_a_step(x):
    error = np.abs(widened(quantised(jnp.asarray(x))) - x)
    largest = np.abs(x.astype(np.float64)).max(axis=-1, keepdims=True)
    assert np.all(error <= largest / 254 * (1 + 1e-4) + 1e-30)


def test_products_are_those_of_the_rounded_weight():
    x, weight = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(3, 5, 16), (7, 16)]))
    found = int8.product(x, quantised(weight))
    np.testing.assert_allclose(found, np.asarray(x) @ by_hand(weight).T, rtol=1e-5, atol=1e-5)
    half = np.abs(np.asarray(weight)).max(axis=-1) / 254
    bound = np.abs(np.asarray(x)).sum(axis=-1, keepdims=True) * half
    assert np.all(np.abs(found - x @ weight.T) <= bound + 1e-5)
    assert int8.product(x.astype(jnp.bfloat16), quantised(weight)).dtype == jnp.bfloat16


@pytest.mark.parametrize("keys", [24, 1030])
def test_attention_is_that_of_the_rounded_cache(keys):
    """Also where the cache is read tile by tile, the last of which overlaps the one before."""
    q, k, v = (
        jax.random.normal(jax.random.key(i), (2, n, length, 8))
        for i, (n, length) in enumerate([(4, 3), (2, keys), (2, keys)])
    )
    q = jnp.swapaxes(q, 1, 2)
    used = keys - 2
    mask = Mask(jnp.full((2, 3), used - 1), jnp.broadcast_to(jnp.arange(keys), (2, keys)))
    found = cached_attention(q, quantised(k), quantised(v), mask, jnp.int32(used))
    wide = (jnp.float32(widened(quantised(x))) for x in (k, v))
    expected = cached_attention(q, *wide, mask, jnp.int32(used))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def rounded_layers(layers):
    """The same with weights of float32 that were rounded by the rule, for the usual products."""
    layers = copied(layers)
    for layer in layers:
        for _, linear in list(linears(layer)):
            small = quantised(linear.weight[...])
            linear.weight = Weight(
                (small.values * small.scale[..., None]).astype(linear.weight.dtype), axes=linear.weight.axes
            )
    return layers


def test_logits_are_near_those_in_float32():
    """Six tokens read onto a cache: errors of a few thousandths of the logits' spread, and none of them zero."""
    model = LanguageModel(tiny_config(), jax.random.key(0))
    tokens, valid = jax.random.randint(jax.random.key(1), (2, 6), 0, 64), jnp.ones((2, 6), bool)
    positions = jnp.broadcast_to(jnp.arange(6), (3, 2, 6))

    @functools.partial(jax.jit, static_argnames=("weights", "caches"))
    def logits(model, weights=False, caches=False):
        layers, cache = model.unstack(), model.empty_cache(2, 8)
        layers, cache = quantised_layers(layers) if weights else layers, cache.quantised() if caches else cache
        return model.logits(model.step(layers, model.embed(tokens), positions, valid, cache)[0])

    exact = logits(model)
    for switches in ({"weights": True}, {"caches": True}, {"weights": True, "caches": True}):
        error = jnp.abs(logits(model, **switches) - exact).max() / jnp.std(exact)
        assert 0 < error < 0.05, switches


def test_a_row_takes_half_the_memory_of_bfloat16():
    text, small = tiny_config().text, dataclasses.replace(RolloutConfig(), caches="int8")
    model = jax.eval_shape(lambda: LanguageModel(tiny_config(), jax.random.key(0), dtype=jnp.bfloat16))
    cache = jax.eval_shape(lambda model: model.empty_cache(1, small.max_response).quantised(), model)
    counted = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.k, cache.v)))
    assert counted == row_cache_bytes(text, small, 2)
    wide = dataclasses.replace(text, hidden_size=512, mrope_section=(16, 24, 24))  # heads of 128
    assert row_cache_bytes(wide, small, 2) < 0.52 * row_cache_bytes(wide, dataclasses.replace(small, caches=None), 2)


@pytest.mark.slow
@pytest.mark.parametrize("switches", [{"weights": "int8"}, {"caches": "int8"}, {"weights": "int8", "caches": "int8"}])
def test_what_a_rollout_records_is_of_the_policy_that_wrote(monkeypatch, switches):
    """Its rows, to the token, and log-probabilities are those of the usual products with numbers that were rounded before."""
    model, prompts, key = scripted_model.model(), scripted_model.prompts(2), jax.random.key(0)
    config = dataclasses.replace(scripted_model.CONFIG, **switches)
    found = to_host(rollout(model, prompts, key, config))
    plain = to_host(rollout(model, prompts, key, scripted_model.CONFIG))
    if "weights" in switches:
        monkeypatch.setattr(loop, "decoding_layers", lambda model, config: rounded_layers(model.unstack()))
    if "caches" in switches:
        store = decoder.written

        def rounded(cache, write, new):
            small = quantised(new)
            return store(cache, write, small.values * small.scale[..., None])

        monkeypatch.setattr(decoder, "written", rounded)
    jax.clear_caches()
    expected = to_host(rollout(model, prompts, key, scripted_model.CONFIG))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    # The scripted model is sure of what it writes: rounding changes no token, and log-probabilities little.
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    assert np.abs(found.logprobs - expected.logprobs).max() < np.abs(found.logprobs - plain.logprobs).max() / 4
    jax.clear_caches()
