"""Token statistics, against scipy and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from unlearn_jax.loss import CrossEntropy, Loss
from unlearn_jax.metrics import tokens


def random_batch(seed=0, shape=(3, 5), vocabulary=7, scale=4.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, scale, (*shape, vocabulary)).astype(np.float32)
    mask = rng.random(shape) < 0.7
    labels = np.where(mask, rng.integers(0, vocabulary, shape), -100)
    return logits, labels, mask


def test_statistics_are_those_of_the_distribution():
    logits, labels, mask = random_batch()
    found = jax.jit(tokens.token_statistics)(logits, labels, mask)
    logp = log_softmax(logits.astype(np.float64), axis=-1)
    expected = np.take_along_axis(logp, np.maximum(labels, 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(found.logprob, np.where(mask, expected, 0), rtol=1e-5)
    np.testing.assert_array_equal(found.correct, mask & (logits.argmax(-1) == labels))
    assert found.logprob.dtype == jnp.float32 and found.correct.dtype == bool


def test_narrow_logits_are_widened_and_wide_ones_kept():
    logits, labels, mask = random_batch()
    assert tokens.token_statistics(jnp.asarray(logits, jnp.bfloat16), labels, mask).logprob.dtype == jnp.float32
    with jax.enable_x64(True):
        found = tokens.token_statistics(jnp.asarray(logits, jnp.float64), labels, mask)
        assert found.logprob.dtype == jnp.float64
        logp = log_softmax(logits.astype(np.float64), axis=-1)
        expected = np.take_along_axis(logp, np.maximum(labels, 0)[..., None], -1)[..., 0]
        np.testing.assert_allclose(found.logprob, np.where(mask, expected, 0), rtol=1e-12)


def test_impossible_tokens_and_flat_distributions():
    logits = jnp.array([[0.0, 0.0, -jnp.inf], [0.0, 0.0, 0.0]])
    found = tokens.token_statistics(logits, jnp.array([1, 2]), jnp.ones(2))
    np.testing.assert_allclose(found.logprob, [-np.log(2), -np.log(3)], rtol=1e-6)
    np.testing.assert_array_equal(found.correct, [False, False])


def test_padding_may_hold_anything():
    logits = jnp.full((2, 3), jnp.nan).at[0].set(0)
    found = tokens.token_statistics(logits, jnp.array([0, 99]), jnp.array([1, 0]))
    assert all(np.isfinite(np.asarray(x, float)).all() for x in found)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(-50, 50))
def test_a_constant_added_to_the_logits_changes_nothing(seed, constant):
    logits, labels, mask = random_batch(seed)
    one, two = (tokens.token_statistics(x, labels, mask) for x in (logits, logits + np.float32(constant)))
    np.testing.assert_allclose(one.logprob, two.logprob, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31))
def test_divergence_is_gibbs(seed):
    one, two = random_batch(seed)[0], random_batch(seed + 1)[0]
    kl = np.asarray(tokens.token_kl(one, two))
    logp, logq = (log_softmax(x.astype(np.float64), axis=-1) for x in (one, two))
    np.testing.assert_allclose(kl, (np.exp(logp) * (logp - logq)).sum(-1), rtol=1e-4, atol=1e-6)
    assert (kl >= -1e-6).all()
    np.testing.assert_allclose(tokens.token_kl(one, one), 0, atol=1e-7)


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_scoring_a_dataset_in_micro_batches(micro_batch):
    logits, labels, mask = random_batch(shape=(5, 4))
    loss = linear_loss()
    examples = {"x": logits, "labels": labels, "loss_mask": mask.astype(np.float32)}
    params = np.eye(7, dtype=np.float32)
    found = tokens.score(loss, params, examples, micro_batch=micro_batch)
    for one, two in zip(found, tokens.token_statistics(logits, labels, mask), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)

    other = params + np.random.default_rng(3).normal(0, 0.1, (7, 7)).astype(np.float32)
    mask[:, 0] = True
    found = tokens.kl_to(loss, params, other, {"x": logits, "loss_mask": mask}, micro_batch=micro_batch)
    kl = np.asarray(tokens.token_kl(logits, logits @ other))
    np.testing.assert_allclose(found, (kl * mask).sum(-1) / mask.sum(-1), rtol=1e-4)
    examples = {"x": logits, "labels": np.where(mask, np.maximum(labels, 0), -100), "loss_mask": mask}
    statistics, again = tokens.compare(loss, params, other, examples, micro_batch=micro_batch)
    np.testing.assert_array_equal(again, found)
    for one, two in zip(statistics, tokens.score(loss, params, examples, micro_batch=micro_batch), strict=True):
        np.testing.assert_array_equal(one, two)


def linear_loss():
    return Loss(lambda params, example: example["x"] @ params, CrossEntropy("labels"))


def test_a_plain_callable_has_no_tokens():
    with pytest.raises(ValueError, match="outputs and the criterion apart"):
        tokens.score(lambda params, example: 0.0, None, {"x": np.zeros((1, 2))})


def test_the_last_token_is_left_out():
    mask = np.array([[0, 1, 1, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 0, 1]])
    np.testing.assert_array_equal(
        tokens.without_last(mask),
        np.array([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 0, 0]], bool),
    )
