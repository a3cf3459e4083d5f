"""Attention: all models call it through this module.

The keys that a query sees are given by data: every query and every key has an order number, and a key is visible to a query
iff `0 <= key <= query`. Two small examples for four tokens, of which the last is padding:

    causal:         q_order [0, 1, 2, 3]   k_order [0, 1, 2, -1]
    bidirectional:  q_order [0, 0, 0, 0]   k_order [0, 0, 0, -1]

With segments, a query sees only keys of its own segment. A query that sees no key returns zeros (and a log-sum-exp of -inf),
never NaN.

The chunked implementation is the flash recurrence (Dao et al. 2022, arXiv:2205.14135) as scans over tiles of queries and
keys, forward and backward, in ordinary JAX. Kernels have no forward-mode derivative; a `custom_vjp` whose two rules are plain
JAX can be pushed through `jax.jvp(jax.grad(...))`, and forward mode keeps no residuals: a Hessian-vector product is linear in
memory too.

On TPUs and GPUs 'kernel' is the platform's fused kernel (`kernels.py`), which can be differentiated only once.
"""

import functools
from typing import Literal, NamedTuple, cast, overload

import jax
import jax.numpy as jnp

from pixel_jax.models import cpu_forms, kernels
from pixel_jax.models.int8 import Int8
from pixel_jax.parallel.sharding import sequence_shards

IMPLEMENTATIONS = ("dense", "chunked", "kernel")
# The most queries and keys in a tile of the chunked implementation. With tiles of 512 keys no tile of a causal row of 512 tokens
# could be skipped; for rows of 4,096 tokens larger tiles are no faster (docs/performance.md).
TILE = (256, 256)
CACHE_TILE = 512  # keys of a cache that are read together


class Mask(NamedTuple):
    """The visibility of keys: q_order int32 [B, T]; k_order int32 [B, S], negative: never visible; segments likewise or None."""

    q_order: jax.Array
    k_order: jax.Array
    q_segment: jax.Array | None = None
    k_segment: jax.Array | None = None


@overload
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    causal: bool,
    implementation: str | None = None,
    return_lse: Literal[False] = False,
) -> jax.Array: ...
@overload
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    causal: bool,
    implementation: str | None = None,
    return_lse: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    causal: bool,
    implementation: str | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Computes softmax(q k^T / sqrt(head_dim)) v over the visible keys, with the softmax in float32.

    q: [B, T, heads, head_dim]; k, v: [B, S, kv_heads, head_dim], each key head shared by heads / kv_heads query heads
    causal: static knowledge about the orders in `mask`, which kernels need. True: the order of a query or key is its position,
            or negative for a key, and T = S; False: no visible key has an order above a query's
    implementation: 'dense' (an array of scores [.., T, S]); 'chunked' (memory linear in T and S; see `chunked_attention`);
            'kernel', the platform's own, or 'chunked' if it has none. On GPUs a query whose own key is invisible returns
            zeros. If a mesh does not divide rows and heads evenly, or splits positions, 'kernel' is 'chunked', too.
            None: by size, see `select_implementation`
    -> [B, T, heads, head_dim], and with return_lse (not of kernels) also the log-sum-exp of the scores, float32 [B, T, heads]
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key heads evenly")
    if implementation == "kernel" and return_lse:
        raise ValueError("kernels do not return the log-sum-exp: take 'chunked'")
    implementation = select_implementation(implementation, length, k.shape[1])
    if implementation == "kernel" and kernels.divides(q, k) and not return_lse:
        return _kernel(q, k, v, mask, causal)
    grouped = jnp.moveaxis(q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim), 1, 3)
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    if implementation == "dense":
        out, lse = dense_attention(grouped, k, v, mask)
    else:
        out, lse = chunked_attention(grouped, k, v, mask, *TILE)
    out = jnp.moveaxis(out, 3, 1).reshape(q.shape)
    return (out, jnp.moveaxis(lse, 3, 1).reshape(batch, length, heads)) if return_lse else out


def select_implementation(implementation: str | None, queries: int, keys: int) -> str:
    """Returns the implementation for this number of queries and of keys.

    For None it is 'dense' if the scores of a row fit into one tile of the chunked implementation, which then needs the same
    memory, and otherwise 'kernel', whose memory is linear in the length on every platform.

    Raises:
        ValueError: an unknown implementation.
    """
    if implementation is None:
        return "dense" if queries * keys <= TILE[0] * TILE[1] else "kernel"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    return implementation


def _kernel(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, causal: bool) -> jax.Array:
    """Computes attention with the kernel of the platform that the function is lowered for, on CPUs in tiles."""
    segment = lambda x, like: jnp.zeros_like(like) if x is None else x
    q_segment = segment(mask.q_segment, mask.q_order)
    k_segment = jnp.where(mask.k_order >= 0, segment(mask.k_segment, mask.k_order), kernels.INVISIBLE)

    def on_shards(kernel):
        def attend(q, k, v, mask, *segments):
            return kernels.on_shards(functools.partial(kernel, causal=causal), q, k, v, *segments)

        return attend

    def chunked(q, k, v, mask, *segments):
        return attention(q, k, v, mask, causal=causal, implementation="chunked")

    platforms = {"tpu": on_shards(kernels.splash), "cuda": on_shards(kernels.triton), "default": chunked}
    return jax.lax.platform_dependent(q, k, v, mask, q_segment, k_segment, **platforms)


def visible(mask: Mask) -> jax.Array:
    """Says which keys each query sees: bool [B, T, S]."""
    seen = (mask.k_order >= 0)[:, None, :] & (mask.k_order[:, None, :] <= mask.q_order[:, :, None])
    if mask.q_segment is not None and mask.k_segment is not None:
        seen &= mask.q_segment[:, :, None] == mask.k_segment[:, None, :]
    return seen


def _finite(x: jax.Array) -> jax.Array:
    """Returns the shift of exponents: the maximum, or 0 where no key is seen, because -inf - -inf would be NaN."""
    return jnp.where(jnp.isfinite(x), x, 0.0)


def cached_attention(
    q: jax.Array, k: jax.Array | Int8, v: jax.Array | Int8, mask: Mask, used: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Computes `attention` over a cache: k, v [B, kv_heads, S, head_dim] -> output like q, log-sum-exp float32 [B, T, heads].

    used: int32 [], keys from this index on are invisible to all queries, and only those in the last tile of visible keys are
          read. A cache has the size of the longest allowed response, and most rows are short.

    It must not be differentiated, because its derivative may not be finite. The output is divided by the sum of the weights, and
    not each weight, which is faster (docs/performance.md).
    """
    batch, length, heads, head_dim = q.shape
    kv_heads, capacity, tile = *k.shape[1:3], CACHE_TILE
    wide = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)

    def factors(x):
        """The numbers to multiply, and what scales their products with each key."""
        return (x.values.astype(q.dtype), x.scale[:, :, None, None]) if isinstance(x, Int8) else (x, 1)

    def add(k, v, mask: Mask, before=None):
        """The maximum of the scores, the sum of their exponentials, and of the values weighed by these."""
        (k, k_scale), (v, v_scale) = factors(k), factors(v)
        s = jnp.einsum("btkgd,bksd->bkgts", grouped, k, preferred_element_type=wide) * head_dim**-0.5 * k_scale
        s = jnp.where(visible(mask)[:, None, None], s, -jnp.inf)
        top = jnp.max(s, axis=-1, keepdims=True)
        top = top if before is None else jnp.maximum(top, before[0])
        shift = _finite(top)
        p = jnp.exp(s - shift)
        total = p.sum(axis=-1, keepdims=True)
        out = jnp.einsum("bkgts,bksd->bkgtd", (p * v_scale).astype(v.dtype), v, preferred_element_type=wide)
        if before is None:
            return top, total, out
        fade = jnp.exp(before[0] - shift)
        return top, total + fade * before[1], out + fade * before[2]

    def add_tile(i, before):
        # The last tile overlaps the one before it, where `capacity` is no multiple of `tile`.
        start = jnp.minimum(i * tile, capacity - tile)
        cut = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, start, tile, axis)
        order = jnp.where(start + jnp.arange(tile) >= i * tile, cut(mask.k_order, 1), -1)
        of_tile = mask._replace(k_order=order)
        if mask.k_segment is not None:
            of_tile = of_tile._replace(k_segment=cut(mask.k_segment, 1))
        k_tile, v_tile = jax.tree.map(lambda x: cut(x, 2), (k, v))
        return add(k_tile, v_tile, of_tile, before)

    if used is None or capacity <= tile:
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
    out = (out / jnp.where(total == 0, 1.0, total)).astype(q.dtype)
    rows_first = lambda x: jnp.moveaxis(x, 3, 1)
    return rows_first(out).reshape(q.shape), rows_first(_finite(top) + jnp.log(total)).reshape(batch, length, heads)


# From here on heads come before positions: the matrices of a batched product are then contiguous, which is faster on a CPU
# (docs/performance.md). q is [B, KV, G, T, D]: the heads of keys and, for each, the G heads of queries that share it; k and v
# are [B, KV, S, D].


def scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """Computes q k^T / sqrt(D) in at least float32: [B, KV, G, T, S]."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    return cpu_forms.attention_product("bkgtd,bksd->bkgts", q, k, wide) * q.shape[-1] ** -0.5


def dense_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> tuple[jax.Array, jax.Array]:
    """Computes attention from one array of scores: output like q, log-sum-exp [B, KV, G, T]."""
    s = jnp.where(visible(mask)[:, None, None], scores(q, k), -jnp.inf)
    top = jax.lax.stop_gradient(_finite(jnp.max(s, axis=-1, keepdims=True, initial=-jnp.inf)))
    p = jnp.exp(s - top)
    total = p.sum(axis=-1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    out = cpu_forms.attention_product("bkgts,bksd->bkgtd", (p / total).astype(v.dtype), v)
    return out, jnp.where(empty, -jnp.inf, top + jnp.log(total))[..., 0]


def chunked_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, queries: int, keys: int
) -> tuple[jax.Array, jax.Array]:
    """Computes attention tile by tile: output like q, log-sum-exp float32 [B, KV, G, T] (-inf: no key).

    queries, keys: the most that a tile has
    """
    length = q.shape[3]
    evenly = lambda size, most: -(-size // -(-size // most))  # 576 by at most 256 are 3 x 192, not 3 x 256
    queries, keys = evenly(length, queries), evenly(k.shape[2], keys)

    def widen(x, size, axis, value=0):
        return jnp.pad(x, [(0, -n % size if i == axis else 0) for i, n in enumerate(x.shape)], constant_values=value)

    mask = Mask(
        widen(mask.q_order, queries, 1, -1),
        widen(mask.k_order, keys, 1, -1),
        None if mask.q_segment is None else widen(mask.q_segment, queries, 1),
        None if mask.k_segment is None else widen(mask.k_segment, keys, 1),
    )
    out, lse = cast(
        tuple[jax.Array, jax.Array],
        _attend(queries, keys, widen(q, queries, 3), widen(k, keys, 2), widen(v, keys, 2), mask),
    )
    return out[..., :length, :], lse[..., :length]


def _cut(x: jax.Array, size: int, axis: int, strided: bool = False) -> jax.Array:
    """`axis` in chunks of `size`, over which a scan goes: [.., S, ..] -> [S / size, .., size, ..].

    A chunk is of neighbours; strided: chunk i has i, i + S / size, ...
    """
    parts = (size, -1) if strided else (-1, size)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], *parts, *x.shape[axis + 1 :]), axis + strided, 0)


def _joined(x: jax.Array, axis: int, strided: bool = False) -> jax.Array:
    """The inverse of `_cut`."""
    x = jnp.moveaxis(x, 0, axis + strided)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


class _Tiles:
    """The tiles of T queries by S keys: arrays cut by queries or by keys, and which tiles have a visible key.

    needed: bool [T / queries, S / keys]; False: no query of the tile sees one of its keys, so that the tile is skipped (half of
            the tiles of a causal row, and most tiles of rows packed from short ones). It follows from the ranges of orders and
            segments, so that some tiles without a visible key are computed, too.
    """

    def __init__(self, queries: int, keys: int, mask: Mask):
        self.queries, self.keys = queries, keys
        # Where a mesh splits positions, every block has positions of every device, so that all devices have work.
        self.strided = sequence_shards(jax.sharding.get_abstract_mesh()) > 1
        self.q_mask = self.of_queries((mask.q_order, mask.q_segment), 1)
        self.k_mask = self.of_keys((mask.k_order, mask.k_segment), 1)
        (q_order, q_segment), (k_order, k_segment) = self.q_mask, self.k_mask
        seen, none = k_order >= 0, jnp.iinfo(jnp.int32).max
        across = lambda q, k: (q[:, None], k[None])  # [T / queries, 1, B], [1, S / keys, B]
        last, first = across(q_order.max(axis=-1), jnp.where(seen, k_order, none).min(axis=-1))
        needed = first <= last
        if q_segment is not None:
            low, high = across(q_segment.min(axis=-1), k_segment.max(axis=-1))
            needed &= low <= high
            high, low = across(q_segment.max(axis=-1), k_segment.min(axis=-1))
            needed &= low <= high
        self.needed = needed.any(axis=-1)

    def of_queries(self, tree, axis: int):
        return jax.tree.map(lambda x: _cut(x, self.queries, axis, self.strided), tree)

    def queries_joined(self, x: jax.Array, axis: int) -> jax.Array:
        return _joined(x, axis, self.strided)

    def of_keys(self, tree, axis: int):
        return jax.tree.map(lambda x: _cut(x, self.keys, axis), tree)


def _tile(q, k, q_mask, k_mask) -> jax.Array:
    """Scores of a tile, -inf where a key is invisible: [B, KV, G, queries, keys]."""
    (q_order, q_segment), (k_order, k_segment) = q_mask, k_mask
    seen = visible(Mask(q_order, k_order, q_segment, k_segment))[:, None, None]
    return jnp.where(seen, scores(q, k), -jnp.inf)


def _forward(queries, keys, q, k, v, mask):
    """A scan over blocks of queries of a scan over chunks of keys.

    A scan over keys alone would need as little memory, but its tiles, [T, keys], do not fit into the memory on a chip. With
    blocks of queries a layer of the 7B model moves .2 GB for 12,288 positions instead of 77 (compiled for v5e and v6e; v5p
    keeps tiles in its main memory in both forms).
    """
    # The barrier makes the mask depend on q. Otherwise the gradient of a scan over layers computes in advance, and keeps, the
    # masks of all tiles, which are the same in all layers: [T, S] for every head (12,288 positions of the 7B model: 4 GB).
    q, mask = jax.lax.optimization_barrier((q, mask))
    tiles = _Tiles(queries, keys, mask)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    chunks = tiles.of_keys((k, v), 2)

    def block(_, part):
        q, q_mask, needed = part

        def add(carry, chunk):
            k, v, k_mask, needed = chunk

            def tile(top, total, out):
                s = _tile(q, k, q_mask, k_mask)
                new_top = jnp.maximum(top, jax.lax.stop_gradient(s.max(axis=-1)))
                shift = _finite(new_top)
                fade = jnp.exp(top - shift)
                p = jnp.exp(s - shift[..., None])
                part = cpu_forms.attention_product("bkgts,bksd->bkgtd", p.astype(v.dtype), v, wide)
                return new_top, fade * total + p.sum(axis=-1), fade[..., None] * out + part

            return jax.lax.cond(needed, tile, lambda *carry: carry, *carry), None

        shape = q.shape[:-1]
        start = (jnp.full(shape, -jnp.inf, wide), jnp.zeros(shape, wide), jnp.zeros(q.shape, wide))
        (top, total, out), _ = jax.lax.scan(add, start, (*chunks, tiles.k_mask, needed))
        empty = total == 0
        total = jnp.where(empty, 1.0, total)
        out = (out / total[..., None]).astype(q.dtype)
        return None, (out, jnp.where(empty, -jnp.inf, top + jnp.log(total)))

    _, (out, lse) = jax.lax.scan(block, None, (tiles.of_queries(q, 3), tiles.q_mask, tiles.needed))
    return tiles.queries_joined(out, 3), tiles.queries_joined(lse, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(queries, keys, q, k, v, mask):
    return _forward(queries, keys, q, k, v, mask)


def _attend_forward(queries, keys, q, k, v, mask):
    out, lse = _forward(queries, keys, q, k, v, mask)
    return (out, lse), (q, k, v, mask, out, lse)


def _attend_backward(queries, keys, residuals, cotangents):
    q, k, v, mask, out, lse = residuals
    d_out, d_lse = cotangents
    tiles = _Tiles(queries, keys, mask)
    wide = lse.dtype
    # d scores = p * (d_out . v - delta), and the log-sum-exp's own cotangent enters as d_lse * p.
    delta = jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1) - d_lse
    scale = q.shape[-1] ** -0.5
    chunks = tiles.of_keys((k, v), 2)

    def block(sums, part):
        q, d_out, delta, shift, q_mask, needed = part

        def add(d_q, chunk):
            (k, v, k_mask, needed), (d_k, d_v) = chunk

            def tile(d_q, d_k, d_v):
                p = jnp.exp(_tile(q, k, q_mask, k_mask) - shift[..., None])
                d_v = d_v + cpu_forms.attention_product("bkgts,bkgtd->bksd", p.astype(v.dtype), d_out, wide)
                d_p = cpu_forms.attention_product("bkgtd,bksd->bkgts", d_out, v, wide)
                d_s = (p * (d_p - delta[..., None]) * scale).astype(q.dtype)
                d_k = d_k + cpu_forms.attention_product("bkgts,bkgtd->bksd", d_s, q, wide)
                d_q = d_q + cpu_forms.attention_product("bkgts,bksd->bkgtd", d_s, k, wide)
                return d_q, d_k, d_v

            d_q, d_k, d_v = jax.lax.cond(needed, tile, lambda *sums: sums, d_q, d_k, d_v)
            return d_q, (d_k, d_v)

        d_q, sums = jax.lax.scan(add, jnp.zeros(q.shape, wide), ((*chunks, tiles.k_mask, needed), sums))
        return sums, d_q.astype(q.dtype)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, wide), chunks)
    of_queries = tiles.of_queries((q, d_out, delta, _finite(lse)), 3)
    sums, d_q = jax.lax.scan(block, zeros, (*of_queries, tiles.q_mask, tiles.needed))
    d_k, d_v = (_joined(x, 2).astype(k.dtype) for x in sums)
    return tiles.queries_joined(d_q, 3), d_k, d_v, None


_attend.defvjp(_attend_forward, _attend_backward)


def merge(parts: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """Combines attention over several sets of keys from partial results (output [..., D], log-sum-exp [...])."""
    outs, lses = zip(*parts, strict=True)
    top = jnp.max(jnp.stack(lses), axis=0)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    weights = [jnp.exp(lse - top) for lse in lses]
    total = sum(weights)
    total = jnp.where(total == 0, 1.0, total)
    merged = [(w / total)[..., None] * out for w, out in zip(weights, outs, strict=True)]
    return functools.reduce(jnp.add, merged).astype(outs[0].dtype)
