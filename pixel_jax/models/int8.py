"""Numbers of eight bits for rollouts, which wait for memory: weights of linear layers, and cached keys and values.

The numbers along the last axis share a scale: the weights of an output channel, or a head's key or value of a token. The largest
magnitude becomes 127 and all are rounded to nearest, so that each is off by at most max|x| / 254. They are multiplied in the type
of the other factor, in which they are exact, and the scale is applied to the sums.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pixel_jax.models import cpu_forms

LARGEST = 127


class Int8(NamedTuple):
    """The array values * scale: values int8 [..., N], scale float32 [...]."""

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the array."""
        return self.values.shape


def quantised(x: jax.Array) -> Int8:
    """Rounds an array to eight bits, with a scale for each vector of its last axis."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / LARGEST
    whole = jnp.round(wide / jnp.where(scale == 0, 1.0, scale)[..., None])
    return Int8(whole.astype(jnp.int8), scale)


def empty(x: jax.Array) -> Int8:
    """Makes zeros of the shape of `x`."""
    return Int8(jnp.zeros(x.shape, jnp.int8), jnp.zeros(x.shape[:-1], jnp.float32))


def product(x: jax.Array, weight: Int8, dtype=None) -> jax.Array:
    """Computes x W^T: [..., in] and [out, in] -> [..., out]; dtype: of the result, that of x if None."""
    # The barrier depends on x: otherwise the wide weights are computed before the loop over tokens, and that reads them.
    x, values = jax.lax.optimization_barrier((x, weight.values))
    sums = cpu_forms.product(x, values.astype(x.dtype), jnp.promote_types(x.dtype, jnp.float32))
    return (sums * weight.scale).astype(dtype or x.dtype)
