"""The one door to attention.

Who may look where is data, not code: every query and every key carries an order number, and a key is visible to a query
iff `0 <= key <= query`. Two tiny examples for four tokens, the last one padding:

    causal:         q_order [0, 1, 2, 3]   k_order [0, 1, 2, -1]
    bidirectional:  q_order [0, 0, 0, 0]   k_order [0, 0, 0, -1]

Segments add "and only within your own segment". A query that sees no key returns zeros (and a log-sum-exp of -inf), never NaN.

The chunked implementation is the flash recurrence (Dao et al. 2022, arXiv:2205.14135) as scans over tiles of queries and
keys, forward and backward, in ordinary JAX. Kernels have no forward-mode derivative; a `custom_vjp` whose two rules are plain
JAX can be pushed through `jax.jvp(jax.grad(...))`, and forward mode keeps no residuals: a Hessian-vector product is linear in
memory too.

On TPUs and GPUs 'kernel' is the fused kernel there is (`kernels.py`), for everything that is differentiated once or not at all.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pixel_jax.models import kernels

IMPLEMENTATIONS = ("dense", "chunked", "kernel")
TILE = (256, 512)  # queries and keys that a step of the chunked implementation looks at
CACHE_TILE = 512  # keys of a cache that are read together


class Mask(NamedTuple):
    """q_order int32 [B, T]; k_order int32 [B, S], negative = never visible; q_segment [B, T] and k_segment [B, S] or None."""

    q_order: jax.Array
    k_order: jax.Array
    q_segment: jax.Array | None = None
    k_segment: jax.Array | None = None


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    causal: bool,
    implementation: str = "dense",
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(q k^T / sqrt(head_dim)) v over the visible keys, softmax in float32.

    q: [B, T, heads, head_dim]; k, v: [B, S, kv_heads, head_dim], each key head shared by heads / kv_heads query heads
    causal: what a kernel has to know beforehand about the order in `mask`. True: places, those of keys or negative, T = S;
            False: no key that is not negative comes after a query
    implementation: 'dense' (an array of scores [.., T, S]); 'chunked' (memory linear in T and S; see `chunked_attention`);
            'kernel', the platform's own, where there is none 'chunked'. On GPUs a query whose own key is invisible returns
            zeros. Rows and heads that a mesh does not divide evenly, or positions that it splits, are 'chunked', too.
    -> [B, T, heads, head_dim], and with return_lse (not of kernels) also the log-sum-exp of the scores, float32 [B, T, heads]
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key heads evenly")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "kernel" and return_lse:
        raise ValueError("kernels do not return the log-sum-exp: take 'chunked'")
    if implementation == "kernel" and kernels.divides(q, k):
        return _kernel(q, k, v, mask, causal)
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    if implementation == "dense":
        out, lse = dense_attention(grouped, k, v, mask)
    else:
        out, lse = chunked_attention(grouped, k, v, mask, *TILE)
    out = out.reshape(q.shape)
    return (out, lse.reshape(batch, length, heads)) if return_lse else out


def _kernel(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, causal: bool) -> jax.Array:
    """By the platform that the function is lowered for."""
    segment = lambda x, like: jnp.zeros_like(like) if x is None else x
    q_segment = segment(mask.q_segment, mask.q_order)
    k_segment = jnp.where(mask.k_order >= 0, segment(mask.k_segment, mask.k_order), kernels.INVISIBLE)

    def on_shards(kernel):
        return lambda *given: kernels.on_shards(functools.partial(kernel, causal=causal), *given[:3], *given[4:])

    def chunked(q, k, v, mask, *segments):
        return attention(q, k, v, mask, causal=causal, implementation="chunked")

    platforms = {"tpu": on_shards(kernels.splash), "cuda": on_shards(kernels.triton), "default": chunked}
    return jax.lax.platform_dependent(q, k, v, mask, q_segment, k_segment, **platforms)


def visible(mask: Mask) -> jax.Array:
    """bool [B, T, S]"""
    seen = (mask.k_order >= 0)[:, None, :] & (mask.k_order[:, None, :] <= mask.q_order[:, :, None])
    if mask.q_segment is not None:
        seen &= mask.q_segment[:, :, None] == mask.k_segment[:, None, :]
    return seen


def scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """q [B, T, KV, G, D], k [B, S, KV, D] -> scaled scores, at least float32, [B, KV, G, T, S]"""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5


def dense_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> tuple[jax.Array, jax.Array]:
    """q [B, T, KV, G, D] -> output like q, log-sum-exp [B, T, KV, G]"""
    seen = visible(mask)[:, None, None]
    s = jnp.where(seen, scores(q, k), -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True, initial=-jnp.inf))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    # The inner where keeps -inf out of the exponential's derivative.
    p = jnp.where(seen, jnp.exp(jnp.where(seen, s, 0.0) - top), 0.0)
    total = p.sum(axis=-1, keepdims=True)
    empty = total == 0
    p = p / jnp.where(empty, 1.0, total)
    out = jnp.einsum("bkgts,bskd->btkgd", p.astype(v.dtype), v)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(jnp.where(empty, 1.0, total)))
    return out, jnp.moveaxis(lse[..., 0], 3, 1)


def cached_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, used: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """`attention` over a cache: k, v [B, kv_heads, S, head_dim] -> output like q, log-sum-exp float32 [B, T, heads].

    used: int32 [], keys from this place on are invisible to all. They are not read, but for the rest of a `CACHE_TILE`: a cache
          has room for the longest response there may be, and rows are mostly short. A token of 8 rows with room for 8,192
          takes 35 ms instead of 87 on a CPU at the beginning, as long when half is used, and 1.5 times as long at the end.

    Not to be differentiated, so it can do without what keeps the derivative finite, and divides the output, not the
    weights: on a CPU, for 64 rows (own cache of 320, one of 384 for eight) 3.1 ms a layer and token instead of 6.8, for
    8 rows .20 instead of .60.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads, room, tile = *k.shape[1:3], CACHE_TILE
    wide = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)

    def add(k, v, mask: Mask, before=None):
        """The maximum of the scores, the sum of their exponentials, and of the values weighed by these."""
        s = jnp.einsum("btkgd,bksd->bkgts", grouped, k, preferred_element_type=wide) * head_dim**-0.5
        s = jnp.where(visible(mask)[:, None, None], s, -jnp.inf)
        top = jnp.max(s, axis=-1, keepdims=True)
        top = top if before is None else jnp.maximum(top, before[0])
        shift = jnp.where(jnp.isfinite(top), top, 0.0)
        p = jnp.exp(s - shift)
        total = p.sum(axis=-1, keepdims=True)
        out = jnp.einsum("bkgts,bksd->bkgtd", p.astype(v.dtype), v, preferred_element_type=wide)
        if before is None:
            return top, total, out
        fade = jnp.exp(before[0] - shift)
        return top, total + fade * before[1], out + fade * before[2]

    def add_tile(i, before):
        # The last tile overlaps the one before it, where `room` is no multiple.
        start = jnp.minimum(i * tile, room - tile)
        cut = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, start, tile, axis)
        order = jnp.where(start + jnp.arange(tile) >= i * tile, cut(mask.k_order, 1), -1)
        part = mask._replace(k_order=order)
        if mask.k_segment is not None:
            part = part._replace(k_segment=cut(mask.k_segment, 1))
        return add(cut(k, 2), cut(v, 2), part, before)

    if used is None or room <= tile:
        top, total, out = add(k, v, mask)
    else:
        shape = (batch, kv_heads, heads // kv_heads, length)
        nothing = (
            jnp.full((*shape, 1), -jnp.inf, wide),
            jnp.zeros((*shape, 1), wide),
            jnp.zeros((*shape, head_dim), wide),
        )
        with jax.named_scope("cache"):
            top, total, out = jax.lax.fori_loop(0, (used + tile - 1) // tile, add_tile, nothing)
    shift = jnp.where(jnp.isfinite(top), top, 0.0)
    out = (out / jnp.where(total == 0, 1.0, total)).astype(q.dtype)
    rows_first = lambda x: jnp.moveaxis(x, 3, 1)
    return rows_first(out).reshape(q.shape), rows_first(shift + jnp.log(total)).reshape(batch, length, heads)


def chunked_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, queries: int, keys: int
) -> tuple[jax.Array, jax.Array]:
    """q [B, T, KV, G, D]; k, v [B, S, KV, D] -> output like q, and log-sum-exp float32 [B, T, KV, G] (-inf: no key)

    queries, keys: of a tile of scores
    """
    length = q.shape[1]
    queries, keys = min(queries, length), min(keys, k.shape[1])
    widen = lambda x, size, value=0: jnp.pad(
        x, [(0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)], constant_values=value
    )
    mask = Mask(
        widen(mask.q_order, queries, -1),
        widen(mask.k_order, keys, -1),
        None if mask.q_segment is None else widen(mask.q_segment, queries),
        None if mask.k_segment is None else widen(mask.k_segment, keys),
    )
    out, lse = _attend(queries, keys, widen(q, queries), widen(k, keys), widen(v, keys), mask)
    return out[:, :length], lse[:, :length]


def _blocks(size: int, *arrays):
    """[B, T, ...] -> [T / size, B, size, ...], block i with positions i, i + T / size, ...: all of them have a part of every
    device where positions are split over a mesh."""
    cut = lambda x: jnp.moveaxis(x.reshape(x.shape[0], size, -1, *x.shape[2:]), 2, 0)
    return jax.tree.map(cut, arrays)


def _joined(x: jax.Array) -> jax.Array:
    """The inverse of `_blocks`."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _chunks(size: int, *arrays):
    """[B, S, ...] -> [S / size, B, size, ...], of neighbours"""
    cut = lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)
    return jax.tree.map(cut, arrays)


def _forward(queries, keys, q, k, v, mask):
    """A scan over blocks of queries of a scan over chunks of keys.

    One over keys alone would do for the memory, but its tiles, [T, keys], fit in no memory on the chip: of the 77 GB that a
    layer of the 7B model then moves for 12,288 positions, .2 are left (v5e and v6e, compiled; v5p keeps tiles in its main
    memory all the same). A CPU takes half the time at 8,192 positions.
    """
    # Made to look as if it depended on q: in a gradient of a scan over layers JAX computes what does not depend on the layer
    # beforehand and keeps it, here the masks of all tiles, [T, S] for every head (12,288 positions of the 7B model: 4 GB).
    q, mask = jax.lax.optimization_barrier((q, mask))
    chunks = _chunks(keys, k, v, mask.k_order, mask.k_segment)

    def block(_, part):
        return None, _attend_block(*part, chunks)

    _, (out, lse) = jax.lax.scan(block, None, _blocks(queries, q, mask.q_order, mask.q_segment))
    return _joined(out), _joined(lse)


def _attend_block(q, q_order, q_segment, chunks):
    batch, length, kv_heads, groups, head_dim = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def add(carry, chunk):
        top, total, out = carry
        k, v, k_order, k_segment = chunk
        seen = visible(Mask(q_order, k_order, q_segment, k_segment))[:, None, None]
        s = jnp.where(seen, scores(q, k), -jnp.inf)
        # -inf - -inf would be NaN: until a key is seen the running maximum counts as 0.
        new_top = jnp.maximum(top, jax.lax.stop_gradient(s.max(axis=-1)))
        shift = jnp.where(jnp.isfinite(new_top), new_top, 0.0)
        fade = jnp.exp(top - shift)
        p = jnp.where(seen, jnp.exp(jnp.where(seen, s, 0.0) - shift[..., None]), 0.0)
        part = jnp.einsum("bkgts,bskd->bkgtd", p.astype(v.dtype), v, preferred_element_type=wide)
        return (new_top, fade * total + p.sum(axis=-1), fade[..., None] * out + part), None

    shape = (batch, kv_heads, groups, length)
    start = (jnp.full(shape, -jnp.inf, wide), jnp.zeros(shape, wide), jnp.zeros((*shape, head_dim), wide))
    (top, total, out), _ = jax.lax.scan(add, start, chunks)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    out = jnp.moveaxis(out / total[..., None], 3, 1).astype(q.dtype)
    return out, jnp.moveaxis(jnp.where(empty, -jnp.inf, top + jnp.log(total)), 3, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(queries, keys, q, k, v, mask):
    return _forward(queries, keys, q, k, v, mask)


def _attend_forward(queries, keys, q, k, v, mask):
    out, lse = _forward(queries, keys, q, k, v, mask)
    return (out, lse), (q, k, v, mask, out, lse)


def _attend_backward(queries, keys, residuals, cotangents):
    q, k, v, mask, out, lse = residuals
    d_out, d_lse = cotangents
    wide = lse.dtype
    # d scores = p * (d_out . v - delta), and the log-sum-exp's own cotangent enters as d_lse * p.
    delta = jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1) - d_lse
    shift = jnp.where(jnp.isfinite(lse), lse, 0.0)
    scale = q.shape[-1] ** -0.5
    chunks = _chunks(keys, k, v, mask.k_order, mask.k_segment)
    keys_last = lambda x: jnp.moveaxis(x, 1, 3)[..., None]  #   [B, T, KV, G] -> [B, KV, G, T, 1]

    def block(sums, part):
        q, q_order, q_segment, d_out, delta, shift = part
        delta, shift = keys_last(delta), keys_last(shift)

        def add(d_q, chunk):
            (k, v, k_order, k_segment), (d_k, d_v) = chunk
            seen = visible(Mask(q_order, k_order, q_segment, k_segment))[:, None, None]
            p = jnp.where(seen, jnp.exp(jnp.where(seen, scores(q, k) - shift, 0.0)), 0.0)
            d_v = d_v + jnp.einsum("bkgts,btkgd->bskd", p.astype(v.dtype), d_out, preferred_element_type=wide)
            d_p = jnp.einsum("btkgd,bskd->bkgts", d_out, v, preferred_element_type=wide)
            d_s = (p * (d_p - delta) * scale).astype(q.dtype)
            d_k = d_k + jnp.einsum("bkgts,btkgd->bskd", d_s, q, preferred_element_type=wide)
            d_q = d_q + jnp.einsum("bkgts,bskd->btkgd", d_s, k, preferred_element_type=wide)
            return d_q, (d_k, d_v)

        d_q, sums = jax.lax.scan(add, jnp.zeros(q.shape, wide), (chunks, sums))
        return sums, d_q.astype(q.dtype)

    zeros = tuple(jnp.zeros(x.shape, wide) for x in chunks[:2])
    sums, d_q = jax.lax.scan(block, zeros, _blocks(queries, q, mask.q_order, mask.q_segment, d_out, delta, shift))
    d_k, d_v = (jnp.moveaxis(x, 0, 1).reshape(k.shape).astype(k.dtype) for x in sums)
    return _joined(d_q), d_k, d_v, None


_attend.defvjp(_attend_forward, _attend_backward)


def merge(parts: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """One attention over several sets of keys from its partial results (output [..., D], log-sum-exp [...])."""
    outs, lses = zip(*parts, strict=True)
    top = jnp.max(jnp.stack(lses), axis=0)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    weights = [jnp.exp(lse - top) for lse in lses]
    total = sum(weights)
    total = jnp.where(total == 0, 1.0, total)
    merged = sum((w / total)[..., None] * out for w, out in zip(weights, outs, strict=True))
    return merged.astype(outs[0].dtype)
