"""Forms of computations that XLA's CPU compiler runs faster than the usual ones.

Linear layers, attention and sampling call them. Values are those of the usual form, but sums of products may be rounded
differently. docs/performance.md ("Forms chosen for CPUs") has the cost of removing each one, and `bench/forms.py` measures it.
"""

import jax
import jax.numpy as jnp

from pixel_jax.parallel.sharding import sequence_shards

FEW = 64  # the most tokens for which `product` computes W x^T


def product(x: jax.Array, weight: jax.Array, dtype=None) -> jax.Array:
    """Computes x W^T: [..., in] and [out, in] -> [..., out]; dtype: of the result, that of x if None.

    On a CPU the tokens of all rows are the rows of one matrix, because otherwise XLA transposes the cotangent
    [rows, tokens, out] inside the fusion that computes the weight's gradient. Up to `FEW` tokens are multiplied as W x^T, because
    XLA then copies the tokens, and not the weights, into the layout that its kernel reads; the barrier keeps XLA from
    transposing the product back.

    On other platforms, and where a mesh splits positions, it is the plain product.
    """
    dtype = dtype or x.dtype
    tokens = x.size // x.shape[-1]

    def plain(x, weight):
        return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=dtype)

    def matrix(x, weight):
        return plain(x.reshape(tokens, -1), weight).reshape(*x.shape[:-1], -1)

    def turned(x, weight):
        y = jnp.einsum("oi,ti->ot", weight, x.reshape(tokens, -1), preferred_element_type=dtype)
        return jax.lax.optimization_barrier(y).T.reshape(*x.shape[:-1], -1)

    if sequence_shards(jax.sharding.get_abstract_mesh()) > 1:
        return plain(x, weight)
    cpu = turned if 1 < tokens <= FEW else matrix
    return jax.lax.platform_dependent(x, weight, cpu=cpu, default=plain)


def attention_product(form: str, x: jax.Array, y: jax.Array, dtype=None) -> jax.Array:
    """Computes an einsum in which the queries that share a head of keys (g, t) are the rows of one matrix.

    Where a mesh splits positions, g and t remain two axes.

    Args:
        form: of the einsum, with the letters of `models.attention`.
        x: [B, KV, G, T, ...].
        y: [B, KV, ...].
        dtype: of the result, that of x and y if None.
    """
    if sequence_shards(jax.sharding.get_abstract_mesh()) > 1:
        return jnp.einsum(form, x, y, preferred_element_type=dtype)
    operands, result = form.split("->")
    fold = lambda z, axes: z.reshape(*z.shape[:2], -1, z.shape[-1]) if "gt" in axes else z
    folded = map(fold, (x, y), operands.split(","))
    out = jnp.einsum(form.replace("gt", "x"), *folded, preferred_element_type=dtype)
    return out.reshape(*x.shape[:4], -1) if "gt" in result else out


def first_largest(x: jax.Array) -> jax.Array:
    """Computes `jnp.argmax` over the last axis, int32; the last index for a row with a NaN.

    XLA's argmax reduces pairs of value and index, on a CPU one after the other; two reductions of numbers are vectorized.
    """
    size = x.shape[-1]
    is_largest = x == jnp.max(x, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_largest, jnp.arange(size, dtype=jnp.int32), size - 1), axis=-1)


def top_values(x: jax.Array, k: int) -> jax.Array:
    """Returns the `k` largest numbers of each row of `x` [R, N], in falling order: [R, k].

    Without the barrier XLA sorts whole rows if only the last of the values is used.
    """
    return jax.lax.optimization_barrier(jax.lax.top_k(x, k)[0])
