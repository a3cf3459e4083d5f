"""Chunks of rows, so that the work follows the number of rows that need it."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


class Chunk(NamedTuple):
    """C rows of each of the S data shards of R rows."""

    at: jax.Array  # int32 [S, C], indices in the shard; R // S, past the last, stands for no row
    rows: int  # R

    def take(self, x: jax.Array) -> jax.Array:
        """Takes the chunk's rows: [R, ...] -> [S * C, ...], zeros for no row.

        If x has fewer entries than rows, neighbouring rows share one.
        """
        share = self.rows // x.shape[0]
        taken = jax.vmap(lambda x, at: x.at[at].get(mode="fill", fill_value=0))(self._split(x), self.at // share)
        return taken.reshape(self.at.size, *x.shape[1:])

    def put(self, x: jax.Array, values: jax.Array) -> jax.Array:
        """Returns x [R, ...] with the chunk's rows replaced by `values` [S * C, ...]."""
        values = values.astype(x.dtype).reshape(*self.at.shape, *x.shape[1:])
        put = jax.vmap(lambda x, at, y: x.at[at].set(y, mode="drop"))
        return put(self._split(x), self.at, values).reshape(x.shape)

    def _split(self, x: jax.Array) -> jax.Array:
        shards = self.at.shape[0]
        return x.reshape(shards, x.shape[0] // shards, *x.shape[1:])


def for_chunks(busy: jax.Array, shards: int, size: int, body: Callable[[Chunk, T], T], carry: T) -> T:
    """Computes `carry = body(chunk, carry)` for chunks of the rows that are `busy`, up to `size` of each shard.

    `busy` is bool [R], or int32 [R]: rows with larger numbers come first, those with 0 are not busy. There are as many chunks as
    the fullest shard needs, because a loop on a mesh has to turn equally often on all devices. The last chunk is filled up with
    rows that are not busy.
    """
    local = busy.shape[0] // shards
    size = min(size, local)
    order = jnp.argsort(-busy.astype(jnp.int32).reshape(shards, local), axis=1)
    order = jnp.pad(order, ((0, 0), (0, -local % size)), constant_values=local)
    count = fullest(busy > 0, shards)

    def turn(state):
        i, carry = state
        at = jax.lax.dynamic_slice_in_dim(order, i * size, size, axis=1)
        return i + 1, body(Chunk(at, busy.shape[0]), carry)

    return jax.lax.while_loop(lambda state: state[0] * size < count, turn, (jnp.int32(0), carry))[1]


def fullest(busy: jax.Array, shards: int) -> jax.Array:
    """Returns the largest number of `busy` (bool [R]) rows of one shard: int32 []."""
    return jnp.max(jnp.sum(busy.reshape(shards, -1), axis=1, dtype=jnp.int32))
