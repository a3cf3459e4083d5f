"""Losses and log-probabilities against hand values and plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixel_jax.training.losses import (
    PolicyLossConfig,
    policy_loss,
    predictions,
    sft_loss,
    token_logprobs,
    turn_temperature,
)

ROWS, LENGTH, WIDTH, VOCAB = 3, 21, 5, 11


@pytest.fixture
def arrays():
    random = np.random.default_rng(0)
    return (
        random.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32),
        random.normal(size=(VOCAB, WIDTH)).astype(np.float32),
        random.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32),
        random.uniform(0.5, 1.5, (ROWS, LENGTH)).astype(np.float32),
    )


def plain(hidden, head, target, temperature):
    logits = np.einsum("rld,vd->rlv", hidden, head).astype(np.float64) / temperature[..., None]
    logp = logits - np.log(np.sum(np.exp(logits - logits.max(-1, keepdims=True)), -1, keepdims=True))
    logp = logp - logits.max(-1, keepdims=True)
    return np.take_along_axis(logp, target[..., None], -1)[..., 0], -np.sum(np.exp(logp) * logp, -1)


def test_predictions_cross_gaps():
    tokens = jnp.array([[7, 8, 0, 0, 9, 5], [0, 7, 0, 6, 0, 0]])
    valid = jnp.array([[1, 1, 0, 0, 1, 1], [0, 1, 0, 1, 0, 0]], bool)
    target, source, known = predictions(tokens, valid)
    assert known.tolist() == [[False, True, False, False, True, True], [False, False, False, True, False, False]]
    assert np.asarray(source)[np.asarray(known)].tolist() == [0, 1, 4, 1]
    assert [target[0, i].item() for i in (0, 1, 4)] == [8, 9, 5] and target[1, 1].item() == 6


def test_temperature_of_each_turn():
    loss_mask = jnp.array([[0, 1, 1, 0, 0, 1, 0, 1], [1, 1, 0, 0, 1, 1, 1, 1]], bool)
    found = np.asarray(turn_temperature(loss_mask, 1.0, 0.5))[np.asarray(loss_mask)]
    assert found.tolist() == [1, 1, 0.5, 0.5] + [1, 1, 0.5, 0.5, 0.5, 0.5]
    assert (np.asarray(turn_temperature(loss_mask, 0.7, None)) == np.float32(0.7)).all()


@pytest.mark.parametrize("chunk", [4, 7, 20, 21, 64])
def test_chunks_do_not_change_log_probabilities_or_gradients(arrays, chunk):
    hidden, head, target, temperature = arrays

    def run(hidden, head, chunk):
        return token_logprobs(
            lambda x: jnp.einsum("...d,vd->...v", x, head), hidden, target, temperature=temperature, chunk=chunk
        )

    logprobs, entropy = run(hidden, head, chunk)
    expected = plain(hidden, head, target, temperature)
    np.testing.assert_allclose(logprobs, expected[0], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(entropy, expected[1], rtol=2e-5, atol=1e-6)
    weights = np.random.default_rng(1).normal(size=target.shape).astype(np.float32)
    gradients = [
        jax.grad(lambda h, w, c=c: jnp.sum(weights * run(h, w, c)[0]), argnums=(0, 1))(hidden, head)
        for c in (chunk, LENGTH)
    ]
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_extreme_logits_stay_finite():
    logits = jnp.array([[[1e4, -1e4, 0.0]]])
    logprobs, entropy = token_logprobs(lambda x: x, logits, jnp.array([[1]]), temperature=0.5)
    assert logprobs.item() == -4e4 and entropy.item() == 0


def shapes_of(jaxpr):
    """The shapes of every array in a jaxpr, loops and branches included."""
    for equation in jaxpr.eqns:
        yield from (tuple(v.aval.shape) for v in equation.outvars if hasattr(v.aval, "shape"))
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from shapes_of(inner)


@pytest.mark.parametrize("chunk, exists", [(4, False), (LENGTH, True)])
def test_no_array_of_batch_length_vocabulary(arrays, chunk, exists):
    hidden, head, target, temperature = arrays

    def loss(hidden, head):
        logits = lambda x: jnp.einsum("...d,vd->...v", x, head)
        return jnp.sum(token_logprobs(logits, hidden, target, temperature=temperature, chunk=chunk)[0])

    gradient = jax.grad(loss, argnums=(0, 1))
    shapes = list(shapes_of(jax.make_jaxpr(gradient)(hidden, head).jaxpr))
    large = [shape for shape in shapes if VOCAB in shape and np.prod(shape) >= ROWS * LENGTH * VOCAB]
    assert bool(large) == exists
    text = jax.jit(gradient).lower(hidden, head).compile().as_text()
    padded = -(-LENGTH // chunk) * chunk
    whole = [f"[{ROWS},{LENGTH},{VOCAB}]", f"[{padded // chunk},{ROWS},{chunk},{VOCAB}]", f"[{ROWS},{padded},{VOCAB}]"]
    flat = [f"[{ROWS * LENGTH},{VOCAB}]", f"[{ROWS * padded},{VOCAB}]", f"[{VOCAB},{ROWS * LENGTH}]"]
    assert any(shape in text for shape in whole + flat) == exists


def test_sft_loss_by_hand():
    logprobs = jnp.array([[-1.0, -2.0, -9.0], [-4.0, jnp.nan, jnp.nan], [-jnp.inf, -1.0, -1.0]])
    entropy = jnp.ones((3, 3))
    loss_mask = jnp.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)
    weight = jnp.array([1.0, 1.0, 0.0])
    by_row = sft_loss(logprobs, entropy, loss_mask, weight, normalizer="row")
    assert (by_row.total.item(), by_row.denominator.item()) == (1.5 + 4.0, 2.0)
    by_token = sft_loss(logprobs, entropy, loss_mask, weight, normalizer="token")
    assert (by_token.total.item(), by_token.denominator.item()) == (7.0, 3.0)
    assert by_token.sums["nll"].item() == 7.0 and by_token.sums["tokens"].item() == 3
    assert by_token.rows.tolist() == [3.0, 4.0, np.inf]


def oracle(logprobs, old, advantage, loss_mask, weight, low, high):
    total, tokens, clipped = 0.0, 0, 0
    for row in range(len(logprobs)):
        for t in range(logprobs.shape[1]):
            if loss_mask[row, t] and weight[row]:
                ratio, a = np.exp(logprobs[row, t] - old[row, t]), advantage[row]
                bound = min(max(ratio, 1 - low), 1 + high)
                total += weight[row] * max(-ratio * a, -bound * a)
                clipped += -bound * a > -ratio * a
                tokens += 1
    return total, tokens, clipped


def test_policy_loss_against_loops():
    random = np.random.default_rng(2)
    logprobs, old, sampler = (random.normal(size=(6, 9)).astype(np.float32) for _ in range(3))
    advantage = random.normal(size=6).astype(np.float32)
    loss_mask = random.random((6, 9)) < 0.6
    weight = np.array([1, 1, 1, 1, 0, 1], np.float32)
    old[~loss_mask] = -np.inf  # what a padded position holds must not matter
    total, tokens, clipped = oracle(logprobs, old, advantage, loss_mask, weight, 0.2, 0.35)
    args = (logprobs, np.ones_like(logprobs), old, sampler, advantage, loss_mask, weight)
    loss = policy_loss(*map(jnp.asarray, args), PolicyLossConfig())
    np.testing.assert_allclose(loss.total, total, rtol=1e-5)
    assert loss.denominator.item() == 200 * 5
    assert (loss.sums["tokens"].item(), loss.sums["clip_fraction"].item()) == (tokens, clipped)
    per_token = policy_loss(*map(jnp.asarray, args), PolicyLossConfig(normalizer="token"))
    assert per_token.denominator.item() == tokens
    gradient = jax.grad(lambda x: policy_loss(x, *map(jnp.asarray, args[1:]), PolicyLossConfig()).total)(logprobs)
    assert np.isfinite(gradient).all() and (np.asarray(gradient)[~loss_mask] == 0).all()


def test_clip_higher_lets_good_tokens_grow_further():
    """A ratio of 1.3 is inside (1, 1.35): the gradient of a good token is alive there, and dead with a symmetric .2."""
    args = lambda x: (x, jnp.zeros((1, 1)), jnp.zeros((1, 1)), jnp.zeros((1, 1)))
    rest = (jnp.ones(1), jnp.ones((1, 1), bool), jnp.ones(1))
    gradient = lambda config: jax.grad(lambda x: policy_loss(*args(x), *rest, config).total)(
        jnp.full((1, 1), jnp.log(1.3))
    )
    np.testing.assert_allclose(gradient(PolicyLossConfig()), -1.3, rtol=1e-6)
    assert gradient(PolicyLossConfig(clip_high=0.2)).item() == 0


@pytest.mark.torch
def test_policy_loss_is_the_released_one():
    """The formula of the released `PolicyLoss` with its masked mean, written in torch, and its gradient."""
    import torch

    random = np.random.default_rng(3)
    logprobs, old = (random.normal(size=(4, 7)).astype(np.float32) for _ in range(2))
    advantage, loss_mask = random.normal(size=4).astype(np.float32), random.random((4, 7)) < 0.7
    x = torch.tensor(logprobs, requires_grad=True)
    mask, a = torch.tensor(loss_mask).float(), torch.tensor(advantage)[:, None]
    ratio = torch.exp((x - torch.tensor(old)) * mask)
    expected = torch.sum(torch.max(-ratio * a, -torch.clamp(ratio, 0.8, 1.35) * a) * mask) / 200.0
    expected.backward()
    # 200 a micro-batch of four rows is 50 a row
    rest = (np.zeros_like(old), old, old, advantage, loss_mask, np.ones(4, np.float32))

    def mean(x):
        loss = policy_loss(x, *map(jnp.asarray, rest), PolicyLossConfig(constant=50.0))
        return loss.total / loss.denominator

    value, gradient = jax.value_and_grad(mean)(logprobs)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=1e-5, atol=1e-8)
