"""The gated delta rule in chunks and in single tokens against its recurrence, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixel_jax.models.delta_rule import _unit_lower_inverse as delta_rule_inverse
from pixel_jax.models.delta_rule import convolution, delta_rule

HEADS, KEYS, VALUES, KERNEL = 2, 3, 4, 4


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def recurrence(q, k, v, g, beta, memory, segments):
    """As it is defined, token by token, in NumPy."""
    memory, out, number = memory.copy(), np.zeros(v.shape), 0
    for t in range(q.shape[1]):
        if segments[t] != number:
            memory, number = np.zeros_like(memory), segments[t]
        memory = memory * np.exp(g[:, t])[..., None, None]
        held = np.einsum("bhkv,bhk->bhv", memory, k[:, t])
        memory += k[:, t][..., None] * ((v[:, t] - held) * beta[:, t][..., None])[..., None, :]
        out[:, t] = np.einsum("bhkv,bhk->bhv", memory, q[:, t])
    return out, memory


def inputs(seed, length, rows=1):
    rng = np.random.default_rng(seed)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    q, k = (unit(rng.standard_normal((rows, length, HEADS, KEYS))) for _ in range(2))
    v, memory = rng.standard_normal((rows, length, HEADS, VALUES)), rng.standard_normal((rows, HEADS, KEYS, VALUES))
    g, beta = -rng.exponential(2.0, (rows, length, HEADS)), rng.uniform(0, 1, (rows, length, HEADS))
    return q, k, v, g, beta, memory


def check(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 99),
    length=st.integers(1, 13),
    chunk=st.sampled_from([1, 2, 4, 5, 64]),
    gaps=st.sets(st.integers(0, 12)),
    borders=st.sets(st.integers(0, 12)),
)
def test_chunks_equal_the_recurrence(seed, length, chunk, gaps, borders):
    """Chunks that divide the length or do not, tokens that are none, segments that begin anywhere, also at a chunk's border."""
    q, k, v, g, beta, memory = inputs(seed, length)
    none = [t for t in gaps if t < length]
    g[:, none], beta[:, none] = 0, 0
    segments = np.cumsum([t in borders for t in range(length)])
    with jax.disable_jit():  # every length would be compiled
        got = delta_rule(q, k, v, g, beta, jnp.asarray(memory), jnp.asarray(segments)[None], chunk)
        check(got, recurrence(q, k, v, g, beta, memory, segments))
        got = delta_rule(q, k, v, g, beta, jnp.asarray(memory), chunk=chunk)
    check(got, recurrence(q, k, v, g, beta, memory, np.zeros(length, int)))


def test_single_tokens_equal_chunks_and_none_changes_nothing():
    arrays = inputs(3, 9, rows=2)
    *tokens, memory = map(jnp.asarray, arrays)
    whole, after = delta_rule(*tokens, memory, chunk=4)
    state = memory
    for t in range(9):
        out, state = delta_rule(*(x[:, t : t + 1] for x in tokens), state)
        np.testing.assert_allclose(out[:, 0], whole[:, t], atol=1e-12)
    np.testing.assert_allclose(state, after, atol=1e-12)
    q, k, v, g, beta = (x[:, :1] for x in tokens)
    assert (delta_rule(q, k, v, 0 * g, 0 * beta, state)[1] == state).all()


@pytest.mark.parametrize("strong", [1.0, 300.0])  # exponentials of what is masked would be infinite
def test_derivatives_in_both_modes(strong):
    """Reverse mode, and forward over reverse (a Hessian-vector product), against finite differences."""
    arrays = inputs(5, 7)
    segments = jnp.array([[0, 0, 0, 1, 1, 1, 1]])
    point = tuple(jnp.asarray(x * (strong if place == 3 else 1)) for place, x in enumerate(arrays))
    tangent = tuple(jnp.asarray(np.random.default_rng(place).standard_normal(x.shape)) for place, x in enumerate(point))

    @jax.jit
    def loss(point):
        out, memory = delta_rule(*point, segments, 4)
        return jnp.sum(jnp.sin(out)) + jnp.sum(memory**3)

    gradient = jax.jit(jax.grad(loss))
    moved = lambda step: tuple(x + step * y for x, y in zip(point, tangent, strict=True))
    dot = lambda x: sum(jnp.sum(a * b) for a, b in zip(x, tangent, strict=True))
    step = 1e-6
    slope = (loss(moved(step)) - loss(moved(-step))) / (2 * step)
    np.testing.assert_allclose(dot(gradient(point)), slope, rtol=1e-6)
    _, product = jax.jit(lambda point: jax.jvp(jax.grad(loss), (point,), (tangent,)))(point)
    change = [(a - b) / (2 * step) for a, b in zip(gradient(moved(step)), gradient(moved(-step)), strict=True)]
    scale = max(float(jnp.abs(x).max()) for x in change)
    for ours, theirs in zip(product, change, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6 * scale)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99), length=st.integers(1, 9), count=st.integers(0, 9), borders=st.sets(st.integers(0, 8)))
def test_convolution(seed, length, count, borders):
    """Against NumPy's, channel by channel and segment by segment; the tail is the last inputs, of fewer tokens the old ones."""
    rng, count = np.random.default_rng(seed), min(count, length)
    x, weight = rng.standard_normal((1, length, 3)), rng.standard_normal((3, KERNEL))
    tail = rng.standard_normal((1, KERNEL - 1, 3))
    segments = np.cumsum([t in borders for t in range(length)])
    with jax.disable_jit():
        out, behind = convolution(
            *map(jnp.asarray, (x, tail, weight, np.array([count]))), segments=jnp.asarray(segments)[None]
        )
    before = np.concatenate([tail[0], x[0]])
    for number in range(segments[-1] + 1):
        own = np.flatnonzero(segments == number)
        if not len(own):
            continue
        history = before[: KERNEL - 1] if number == 0 else np.zeros((KERNEL - 1, 3))
        stretch = np.concatenate([history, x[0, own]])
        for channel in range(3):
            expected = np.convolve(stretch[:, channel], weight[channel, ::-1], mode="valid")
            np.testing.assert_allclose(out[0, own, channel], expected, atol=1e-12)
    np.testing.assert_array_equal(behind[0], before[count : count + KERNEL - 1])


def test_a_chunk_waits_for_no_thread():
    """XLA's kernels of LAPACK wait in one of its threads for another one. With as many devices as threads none is free."""
    *tokens, memory = inputs(0, 8, rows=2)
    program = jax.jit(lambda *x: delta_rule(*x)).lower(*tokens, memory).compile().as_text()
    assert "custom-call" not in program


@pytest.mark.parametrize("size", [1, 5, 64])
def test_the_inverse_of_a_chunk_keeps_its_precision(size):
    """Also where all keys are the same, and powers of what stands below the diagonal exceed float32."""
    rng = np.random.default_rng(0)
    below = np.stack([np.ones((size, size)), rng.uniform(-1, 1, (size, size)) / np.sqrt(size)])
    exact = np.linalg.inv(np.tril(below, -1) + np.eye(size))
    found = jax.jit(delta_rule_inverse)(jnp.asarray(below, jnp.float32))
    np.testing.assert_allclose(found, exact, atol=1e-5 * np.abs(exact).max())
