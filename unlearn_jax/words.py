"""Arrays in the memory of the host as rows of 32-bit words, of which a device copies some at a time.

The last axes of an array are laid out in tiles, in which elements of less than 32 bits share words with those of other rows. A
program for TPUs does not compile where it copies such a row out of the memory of the host (libtpu 0.0.52: "sublane slicing with
mismatched tiling"), or pads it to whole tiles on the device, pixels of a byte to 80 times their size. A row of words is copied as
it lies.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

WORD = 4  # bytes


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Words:
    """The rows of an array, each as words."""

    rows: Any  # uint32 [..., words]
    shape: tuple[int, ...]  # of a row
    dtype: np.dtype

    def array(self) -> jax.Array:
        """The array, [..., *shape]."""
        rows, size = jnp.asarray(self.rows), math.prod(self.shape)
        dtype = np.dtype(np.uint8) if self.dtype == bool else self.dtype
        if dtype.itemsize > WORD:
            rows = rows.reshape(*rows.shape[:-1], size, dtype.itemsize // WORD)
        elements = jax.lax.bitcast_convert_type(rows, dtype).reshape(*self.rows.shape[:-1], -1)[..., :size]
        return elements.reshape(*elements.shape[:-1], *self.shape).astype(self.dtype)

    def tree_flatten(self):
        """For JAX: the words are an array, shape and dtype are static."""
        return (self.rows,), (self.shape, self.dtype)

    @classmethod
    def tree_unflatten(cls, static, children):
        """For JAX."""
        return cls(*children, *static)


def count_words(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """The number of words of a row."""
    return -(-math.prod(shape) * dtype.itemsize // WORD)


def to_words(x: np.ndarray, axes: int) -> Words | np.ndarray:
    """Views an array on the host as words; one of complex numbers, or of less than a byte each, is returned as it is.

    Args:
        x: [..., *shape]
        axes: the number of axes before the shape of a row.
    """
    if x.dtype.kind not in "biuf" and x.dtype != jnp.bfloat16:
        return x
    shape = x.shape[axes:]
    rows = np.ascontiguousarray(x).reshape(*x.shape[:axes], math.prod(shape)).view(np.uint8)
    missing = count_words(shape, x.dtype) * WORD - rows.shape[-1]
    if missing:
        rows = np.pad(rows, [(0, 0)] * axes + [(0, missing)])
    return Words(rows.view(np.uint32), shape, x.dtype)


def to_arrays(tree: Any) -> Any:
    """A pytree with arrays in the place of `Words`."""
    return jax.tree.map(
        lambda x: x.array() if isinstance(x, Words) else x, tree, is_leaf=lambda x: isinstance(x, Words)
    )
