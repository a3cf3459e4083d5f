"""The gated delta rule (Yang et al. 2024, arXiv:2412.06464) and the short convolution before it.

A head has a matrix S [keys, values], which maps a key to the value that was last written for it. A token fades it, and corrects
the value of the token's key:

    S <- exp(g) S;   S <- S + k (beta (v - S^T k))^T;   output S^T q

`delta_rule` computes a single token directly, and several tokens in chunks, by products of matrices. Both forms are ordinary JAX,
so that they can be differentiated in any mode and any number of times.

A token with g = 0 and beta = 0 leaves S as it was. Where rows hold several segments, each begins with an empty state.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 64  # tokens whose products are matrices, as in the original
# With the default precision accelerators round the factors of float32 products. A state is a sum over all earlier tokens, which
# sampling and training compute in different orders, and the rounding would make them differ.
PRECISION = jax.lax.Precision.HIGHEST


class RecurrentState(NamedTuple):
    """The state of a recurrent layer after the tokens of each row; zeros before the first token.

    tail: [B, K - 1, channels], the last inputs of a convolution over K tokens
    memory: at least float32 [B, heads, keys, values], the matrices S
    """

    tail: jax.Array
    memory: jax.Array


def convolution(
    x: jax.Array, tail: jax.Array, weight: jax.Array, count: jax.Array, segments: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """A causal convolution of each channel over the last K tokens.

    Args:
        x: [B, T, channels]; a row's tokens come first.
        tail: [B, K - 1, channels], the inputs before x.
        weight: [channels, K], of the oldest token first.
        count: int32 [B], tokens of each row; the positions behind them are padding.
        segments: int32 [B, T], a token reads only tokens of its own segment; `tail` is of segment 0. None: one segment.

    Returns:
        [B, T, channels] in at least float32, and the tail behind the row's last token.
    """
    length, kernel = x.shape[1], weight.shape[1]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    whole = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
    numbers = None if segments is None else jnp.pad(segments, ((0, 0), (kernel - 1, 0)))
    out = jnp.zeros(x.shape, wide)
    for offset in range(kernel):
        product = whole[:, offset : offset + length].astype(wide) * weight[:, offset].astype(wide)
        if numbers is not None and segments is not None:
            product = jnp.where((numbers[:, offset : offset + length] == segments)[..., None], product, 0)
        out = out + product
    behind = count[:, None] + jnp.arange(kernel - 1)
    return out, jnp.take_along_axis(whole, behind[..., None], axis=1).astype(tail.dtype)


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    memory: jax.Array,
    segments: jax.Array | None = None,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Reads tokens into the matrices of every head.

    Args:
        q: [B, T, heads, keys].
        k: [B, T, heads, keys].
        v: [B, T, heads, values].
        g: [B, T, heads], logarithm of the factor by which the state fades, at most 0.
        beta: [B, T, heads], the share of the correction that is written, from 0 to 1.
        memory: [B, heads, keys, values], the state before the tokens.
        segments: int32 [B, T], not decreasing: a token reads only tokens of its own segment. The state before is of segment 0,
            and the state after is that of the last token's segment. None: one segment.
        chunk: tokens that are multiplied as matrices.

    Returns:
        The outputs [B, T, heads, values] and the state after the last token, in the type of `memory`, which everything is
        computed in.
    """
    q, k, v, g, beta = (jnp.swapaxes(x.astype(memory.dtype), 1, 2) for x in (q, k, v, g, beta))
    if q.shape[2] == 1 and segments is None:
        out, memory = _one(q[:, :, 0], k[:, :, 0], v[:, :, 0], g[:, :, 0], beta[:, :, 0], memory)
        return out[:, None], memory
    out, memory = _chunked(q, k, v, g, beta, memory, segments, min(chunk, q.shape[2]))
    return jnp.swapaxes(out, 1, 2), memory


def _product(form: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(form, x, y, precision=PRECISION)


def _one(q, k, v, g, beta, memory) -> tuple[jax.Array, jax.Array]:
    """One token: q, k [B, H, keys], v [B, H, values], g and beta [B, H]."""
    memory = memory * jnp.exp(g)[..., None, None]
    correction = (v - _product("bhkv,bhk->bhv", memory, k)) * beta[..., None]
    memory = memory + k[..., None] * correction[..., None, :]
    return _product("bhkv,bhk->bhv", memory, q), memory


def _unit_lower_inverse(system: jax.Array) -> jax.Array:
    """Inverts the triangular matrices that have ones on the diagonal and below it what `system` [..., N, N] has there.

    Two inverted blocks on the diagonal, A and B, and the block C between them give the inverse of both together, in which
    -B C A replaces C: in this way all blocks of 1, 2, 4, ... are inverted at once. `triangular_solve` is not used, because on
    CPUs it blocks a thread of XLA's pool until other threads of the pool have computed: with as many devices as cores all threads
    wait forever. Products are also faster on accelerators.
    """
    index = jnp.arange(system.shape[-1])
    inverse = jnp.broadcast_to(jnp.eye(len(index), dtype=system.dtype), system.shape)
    for level in range((len(index) - 1).bit_length()):
        block = index >> level
        between = (block[:, None] % 2 == 1) & (block[:, None] == block + 1)
        right = _product("...ij,...jk->...ik", jnp.where(between, system, 0), inverse)
        inverse = inverse - _product("...ij,...jk->...ik", inverse, right)
    return inverse


def _chunked(q, k, v, g, beta, memory, segments, size: int) -> tuple[jax.Array, jax.Array]:
    """Any number of tokens: q, k [B, H, T, keys], v [B, H, T, values], g and beta [B, H, T].

    Within a chunk, with the fading exp(c_i - c_j) from token j to i, c the running sum of g, the corrections u of its tokens
    solve a triangular system: u_i = beta_i (v_i - exp(c_i) S^T k_i - sum over j < i of exp(c_i - c_j) (k_j . k_i) u_j). It is
    solved for all chunks at once, once for what comes from v and once for what S is multiplied with.
    """
    length = q.shape[2]
    spare = -length % size

    def cut(x: jax.Array) -> jax.Array:
        """[B, H, T, ...] -> [chunks, B, H, size, ...]; what fills up the last chunk is zero, tokens that change nothing."""
        x = jnp.pad(x, [(0, spare if axis == 2 else 0) for axis in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, size, *x.shape[3:]), 2, 0)

    q, k, v, g, beta = map(cut, (q, k, v, g, beta))
    total = jnp.cumsum(g, axis=-1)
    index = jnp.arange(size)
    seen = index[:, None] >= index
    # Whether a token reads the state before its chunk, and whether it is written into the state after the chunk.
    reads = writes = 1.0
    fades = total[..., -1]
    if segments is not None:
        padded = jnp.pad(segments, ((0, 0), (0, spare)), mode="edge")
        numbers = jnp.moveaxis(padded.reshape(padded.shape[0], -1, size), 1, 0)[:, :, None]  # [chunks, B, 1, size]
        last = numbers[..., -1:]
        before = jnp.concatenate([jnp.zeros_like(last[:1]), last[:-1]])
        seen = seen & (numbers[..., :, None] == numbers[..., None, :])
        reads, writes = ((numbers == other).astype(q.dtype) for other in (before, last))
        fades = jnp.where((last == before)[..., 0], fades, -jnp.inf)
    # The mask comes before the exponential, which of positive numbers would be infinite, and NaN in the derivative.
    fading = jnp.exp(jnp.where(seen, total[..., :, None] - total[..., None, :], -jnp.inf))
    system = _product("nbhik,nbhjk->nbhij", k * beta[..., None], k) * fading
    weights = _product("nbhik,nbhjk->nbhij", q, k) * fading
    reading = (jnp.exp(total) * reads)[..., None]
    sides = jnp.concatenate([v, k * reading], axis=-1) * beta[..., None]
    solved = _product("nbhij,nbhjk->nbhik", _unit_lower_inverse(system), sides)
    values, keys = jnp.split(solved, [v.shape[-1]], axis=-1)
    written = k * (jnp.exp(total[..., -1:] - total) * writes)[..., None]

    def read(memory, chunk):
        values, keys, queries, weights, written, fade = chunk
        corrections = values - _product("bhik,bhkv->bhiv", keys, memory)
        out = _product("bhik,bhkv->bhiv", queries, memory) + _product("bhij,bhjv->bhiv", weights, corrections)
        memory = memory * fade[..., None, None] + _product("bhik,bhiv->bhkv", written, corrections)
        return memory, out

    memory, out = jax.lax.scan(read, memory, (values, keys, q * reading, weights, written, jnp.exp(fades)))
    out = jnp.moveaxis(out, 0, 2)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])[:, :, :length], memory
