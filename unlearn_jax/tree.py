"""Algebra on vectors that are pytrees, and on stacks of them.

A stack is a pytree whose leaves [k, ...] hold k vectors of one parameter space: the basis of a Krylov space, or the
gradients of k examples. Sums over parameters are made at the highest matrix precision.
"""

import operator

import jax
import jax.numpy as jnp

from unlearn_jax.arrays import Array, Key, Params, Scalar, Stack

PRECISION = jax.lax.Precision.HIGHEST


def add(x: Params, y: Params) -> Params:
    """x + y."""
    return jax.tree.map(operator.add, x, y)


def sub(x: Params, y: Params) -> Params:
    """x - y."""
    return jax.tree.map(operator.sub, x, y)


def mul(x: Params, y: Params) -> Params:
    """x y, coordinate by coordinate."""
    return jax.tree.map(operator.mul, x, y)


def scale(factor: Scalar, x: Params) -> Params:
    """factor * x."""
    return jax.tree.map(lambda leaf: factor * leaf, x)


def add_scale(x: Params, factor: Scalar, y: Params) -> Params:
    """x + factor * y."""
    factor = jnp.asarray(factor)
    return jax.tree.map(lambda a, b: a + factor * b, x, y)


def where(condition: Scalar, x: Params, y: Params) -> Params:
    """x where the condition [] holds, y elsewhere."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)


def vdot(x: Params, y: Params) -> Array:
    """Inner product [] of two vectors."""

    def leaf(a, b):
        a, b = jnp.asarray(a), jnp.asarray(b)
        mesh = jax.typeof(a).sharding.mesh
        # Without it JAX does not know the sharding of a sum over a mesh of explicit axes.
        spread = jax.sharding.NamedSharding(mesh, jax.P()) if mesh.are_all_axes_explicit else None
        return jnp.tensordot(a, b, a.ndim, precision=PRECISION, out_sharding=spread)

    return jax.tree.reduce(operator.add, jax.tree.map(leaf, x, y))


def norm(x: Params) -> Array:
    """Euclidean norm []."""
    return jnp.sqrt(squared_norm(x))


def squared_norm(x: Params) -> Array:
    """Sum [] of the squares of all coordinates."""
    return jax.tree.reduce(operator.add, jax.tree.map(lambda leaf: jnp.sum(jnp.square(leaf)), x))


def largest(x: Params) -> Array:
    """Largest magnitude [] of a coordinate."""
    return jax.tree.reduce(jnp.maximum, jax.tree.map(lambda leaf: jnp.max(jnp.abs(leaf), initial=0), x))


def zeros_like(x: Params) -> Params:
    """Zeros in the shapes and dtypes of x."""
    return jax.tree.map(jnp.zeros_like, x)


def full_like(x: Params, value: Scalar) -> Params:
    """`value` in the shapes and dtypes of x."""
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, value), x)


def random_like(key: Key, x: Params, dtype: jax.typing.DTypeLike | None = None) -> Params:
    """Standard normal numbers in the shapes of x, and in its dtypes unless `dtype` is given."""
    leaves, structure = jax.tree.flatten(x)
    keys = jax.random.split(key, len(leaves))
    draw = [
        jax.random.normal(key, leaf.shape, dtype or leaf.dtype, out_sharding=jax.typeof(leaf).sharding)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, draw)


def cast(x: Params, dtype: jax.typing.DTypeLike) -> Params:
    """x with every leaf in `dtype`."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), x)


def cast_like(x: Params, other: Params) -> Params:
    """x with every leaf in the dtype of the same leaf of `other`."""
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), x, other)


def unit(v: Params) -> tuple[Params, Array]:
    """(v / |v|, |v|), without overflow or underflow of the squares; a zero vector stays zero."""
    magnitude = largest(v)
    scaled = scale(1 / jnp.where(magnitude > 0, magnitude, 1), v)
    size = norm(scaled)
    return scale(1 / jnp.where(size > 0, size, 1), scaled), magnitude * size


def length(stack: Stack) -> int:
    """How many vectors a stack holds."""
    return jax.tree.leaves(stack)[0].shape[0]


def inner(stack: Stack, v: Params) -> Array:
    """Inner products [k] of every vector of the stack with v."""
    products = jax.tree.map(lambda s, x: jnp.tensordot(s, x, x.ndim, precision=PRECISION), stack, v)
    return jax.tree.reduce(jnp.add, products)


def gram(stack: Stack, other: Stack | None = None) -> Array:
    """Inner products [k, m] of the vectors of a stack with those of another, or with each other; float32 or wider."""

    def leaf(s, t):
        dtype = jnp.result_type(jnp.float32, s, t)
        s, t = s.reshape(len(s), -1), t.reshape(len(t), -1)
        return jnp.matmul(s, t.T, precision=PRECISION, preferred_element_type=dtype)

    return jax.tree.reduce(jnp.add, jax.tree.map(leaf, stack, stack if other is None else other))


def combine(coefficients: Array, stack: Stack) -> Params:
    """Linear combinations of a stack's vectors: coefficients [k] give a vector, [m, k] a stack of m."""
    return jax.tree.map(lambda s: jnp.tensordot(coefficients, s, 1, precision=PRECISION), stack)


def scale_each(factors: Array, stack: Stack) -> Stack:
    """Every vector of the stack times its own factor [k]."""
    return jax.tree.map(lambda s: s * factors.reshape((-1,) + (1,) * (s.ndim - 1)), stack)


def row_space(stack: Stack, metric: Array | None = None) -> tuple[Stack, Array]:
    """Orthonormal vectors that span a stack, and their squared singular values [k], ascending.

    Args:
        stack: k vectors.
        metric: [k, k], the stack's Gram matrix where it is another than `gram(stack)`: the vectors are then orthonormal in it.

    Returns:
        A stack of k vectors, and k values. Directions within rounding are zero vectors with value zero.
    """
    values, vectors = jnp.linalg.eigh(gram(stack) if metric is None else metric)
    kept = values > jnp.finfo(values.dtype).eps * len(values) * values[-1]
    inverse_root = jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, values, 1)), 0)
    return combine(inverse_root[:, None] * vectors.T, stack), jnp.where(kept, values, 0)
