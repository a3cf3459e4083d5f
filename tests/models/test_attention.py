"""The attention door: both implementations, masks, log-sum-exp, second derivatives, memory."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixel_jax.models.attention import Mask, attention, cached_attention, chunked_attention, merge


def naive(q, k, v, mask):
    """Query by query, over the keys it sees; float64 numpy."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = [s for s in range(k.shape[1]) if 0 <= mask.k_order[b, s] <= mask.q_order[b, t]
                and (mask.q_segment is None or mask.q_segment[b, t] == mask.k_segment[b, s])]  # fmt: skip
        if seen:
            group = h * k.shape[2] // q.shape[2]
            score = k[b, seen, group] @ q[b, t, h] / np.sqrt(q.shape[-1])
            lse[b, t, h] = np.log(np.exp(score).sum())
            out[b, t, h] = np.exp(score - lse[b, t, h]) @ v[b, seen, group]
    return out, lse


def case(rng, batch=2, queries=7, keys=11, heads=4, kv_heads=2, dim=8, segments=False):
    """Ragged: some keys are padding, the first query of row 0 sees nothing."""
    draw = lambda *shape: jnp.array(rng.standard_normal(shape, dtype=np.float32))
    q, k, v = draw(batch, queries, heads, dim), draw(batch, keys, kv_heads, dim), draw(batch, keys, kv_heads, dim)
    q_order = rng.integers(0, keys, (batch, queries))
    k_order = np.where(rng.random((batch, keys)) < 0.8, np.arange(keys), -1)
    q_order[0, 0] = -1
    parts = (rng.integers(0, 2, (batch, queries)), rng.integers(0, 2, (batch, keys))) if segments else (None, None)
    return q, k, v, Mask(q_order, k_order, *parts)


def small_chunks(q, k, v, mask):
    """The chunked implementation on tiles of three queries and four keys, in the door's shapes."""
    batch, length, heads, dim = q.shape
    kv = k.shape[2]
    grouped = jnp.moveaxis(q.reshape(batch, length, kv, heads // kv, dim), 1, 3)
    out, lse = chunked_attention(grouped, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), mask, 3, 4)
    return jnp.moveaxis(out, 3, 1).reshape(q.shape), jnp.moveaxis(lse, 3, 1).reshape(q.shape[:3])


def dense(q, k, v, mask):
    return attention(q, k, v, mask, causal=True, return_lse=True)


def cached(q, k, v, mask):
    return cached_attention(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), mask)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("run", [dense, small_chunks, cached])
def test_values(rng, run, segments):
    q, k, v, mask = case(rng, segments=segments)
    out, lse = jax.jit(run)(q, k, v, mask)
    expected, expected_lse = naive(q, k, v, mask)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-6)
    assert (np.asarray(out)[0, 0] == 0).all() and (np.asarray(lse)[0, 0] == -np.inf).all()


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("spare", [0, 7])
def test_a_cache_is_read_as_far_as_it_is_used(rng, monkeypatch, segments, spare):
    """Tiles of four keys. The last one read overlaps the one before if there is no spare room; else nobody reads on."""
    monkeypatch.setattr(importlib.import_module("pixel_jax.models.attention"), "CACHE_TILE", 4)
    q, k, v, mask = case(rng, segments=segments)
    keys = k.shape[1]
    widen = lambda x, axis, value: jnp.pad(x, [(0, spare * (i == axis)) for i in range(x.ndim)], constant_values=value)
    unread = (jnp.arange(keys + spare) >= -(-keys // 4) * 4)[:, None]
    room = lambda x: jnp.where(unread, jnp.nan, widen(jnp.swapaxes(x, 1, 2), 2, 9.0))
    wide = mask._replace(k_order=widen(jnp.asarray(mask.k_order), 1, -1))
    if segments:
        wide = wide._replace(k_segment=widen(jnp.asarray(mask.k_segment), 1, 0))
    out, lse = jax.jit(lambda *arguments: cached_attention(*arguments))(q, room(k), room(v), wide, keys)
    expected, expected_lse = naive(q, k, v, mask)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-6)


def test_door_chunks_equal_dense(rng):
    q, k, v, mask = case(rng, queries=520, keys=700)
    a, b = (
        attention(q, k, v, mask, causal=True, implementation=name, return_lse=True) for name in ("dense", "chunked")
    )
    np.testing.assert_allclose(a[0], b[0], atol=2e-6)
    np.testing.assert_allclose(a[1], b[1], atol=2e-6)


@pytest.mark.parametrize("kind", ["causal", "packed"])
def test_tiles_that_nobody_sees_into_are_passed_over(rng, kind):
    """Tiles of three queries and four keys; what a tile holds reaches all of its queries, so that NaN would show."""
    q, k, v, _ = case(rng, queries=12, keys=12)
    order = np.tile(np.arange(12), (2, 1))
    segments = np.array([[0] * 4 + [1] * 8] * 2) if kind == "packed" else None
    mask = Mask(order, order, segments, segments)
    unseen = slice(4, None) if kind == "causal" else slice(None, 4)
    queries = slice(None, 3) if kind == "causal" else slice(6, None)

    def outputs(q, k, v):
        return small_chunks(q, k, v, mask)[0][:, queries]

    spoiled = tuple(x.at[:, unseen].set(jnp.nan) for x in (k, v))
    np.testing.assert_array_equal(jax.jit(outputs)(q, *spoiled), jax.jit(outputs)(q, k, v))


def test_gradient_and_hessian_vector_product(rng):
    """Of a loss that uses the output and the (finite) log-sum-exps, against dense attention."""
    q, k, v, mask = case(rng, segments=True)
    weights = jnp.array(rng.standard_normal(q.shape, dtype=np.float32))

    def loss(run, qkv):
        out, lse = run(*qkv, mask)
        return jnp.sum(jnp.sin(out * weights)) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0) ** 2)

    direction = tuple(jnp.array(rng.standard_normal(x.shape, dtype=np.float32)) for x in (q, k, v))

    def products(run):
        gradient = jax.grad(lambda qkv: loss(run, qkv))
        return jax.jit(lambda qkv: jax.jvp(gradient, (qkv,), (direction,)))((q, k, v))

    for ours, expected in zip(jax.tree.leaves(products(small_chunks)), jax.tree.leaves(products(dense)), strict=True):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, expected, atol=2e-5 * float(jnp.abs(expected).max()))


def test_no_derivative_where_nothing_is_seen(rng):
    q, k, v, mask = case(rng)
    nothing = mask._replace(k_order=np.full_like(mask.k_order, -1))
    for run in (dense, small_chunks):
        gradient = jax.grad(lambda qkv: jnp.sum(run(*qkv, nothing)[0] ** 2 + 1))((q, k, v))  # noqa: B023
        assert all((x == 0).all() for x in gradient)


def test_by_default_memory_grows_linearly_and_few_scores_are_dense():
    """Sizes on both sides of a tile: the values of dense attention, and no array of all scores where there are many."""

    def lowered(length, implementation):
        q = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        order = jnp.arange(length)[None]
        attend = lambda q: attention(q, q, q, Mask(order, order), causal=True, implementation=implementation)
        return jax.jit(attend).lower(q)

    assert lowered(256, None).as_text() == lowered(256, "dense").as_text()
    assert lowered(257, None).as_text() == lowered(257, "kernel").as_text()
    size = lambda implementation: lowered(2048, implementation).compile().memory_analysis().temp_size_in_bytes
    assert size(None) < size("dense") / 4


def test_memory_grows_linearly():
    """Temporary memory of one Hessian-vector product: fourfold length, about fourfold memory; dense would take sixteenfold."""

    def temporaries(length, implementation):
        q = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        k = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        order = jnp.arange(length)[None]

        def product(q, k, v):
            def loss(q, k, v):
                return jnp.sum(attention(q, k, v, Mask(order, order), causal=True, implementation=implementation) ** 2)

            return jax.jvp(jax.grad(loss, (0, 1, 2)), (q, k, v), (q, k, v))[1]

        return jax.jit(product).lower(q, k, k).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(1024, "chunked"), temporaries(4096, "chunked")
    assert long < 5 * short
    assert temporaries(1024, "dense") > 12 * temporaries(256, "dense")
    assert long < temporaries(1024, "dense") * 4


def test_memory_grows_linearly_through_a_scan_over_layers():
    """JAX computes what is the same in all turns of a scan before it: the masks of all tiles are [T, S] and must not be kept."""

    def temporaries(length):
        order = jnp.arange(length)[None]

        def layer(x, w):
            q = (x @ w).reshape(1, length, 4, 16)
            out = attention(q, q[:, :, :2], q[:, :, 2:], Mask(order, order), causal=True, implementation="chunked")
            return x + out.reshape(x.shape), None

        gradient = jax.jit(jax.grad(lambda w, x: jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, w)[0] ** 2)))
        shapes = jax.ShapeDtypeStruct((3, 64, 64), jnp.float32), jax.ShapeDtypeStruct((1, length, 64), jnp.float32)
        return gradient.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 4.5 * temporaries(2048)


def test_merged_parts_equal_the_whole(rng):
    """Keys in two parts, one of which a query may not see at all."""
    q, k, v, mask = case(rng)
    whole = attention(q, k, v, mask, causal=True)
    parts = [
        attention(q, k[:, part], v[:, part], mask._replace(k_order=mask.k_order[:, part]), causal=True, return_lse=True)
        for part in (slice(0, 5), slice(5, 11))
    ]
    np.testing.assert_allclose(merge(parts), whole, atol=2e-6)


def test_bad_arguments(rng):
    q, k, v, mask = case(rng)
    with pytest.raises(ValueError, match="'flash' is not one of dense, chunked, kernel"):
        attention(q, k, v, mask, causal=True, implementation="flash")
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key heads"):
        attention(q[:, :, :3], k, v, mask, causal=True)
