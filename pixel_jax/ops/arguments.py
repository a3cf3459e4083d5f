"""Checks of what operations on pixels are given: arrays of NumPy or JAX, concrete or traced, and lists of integers."""

import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pixel_jax.arrays import AnyArray


def check_pixels(name: str, value: object) -> None:
    """Checks that `value` is an array, and not a path or an image of Pillow's.

    Raises:
      ValueError: it is not; the message says what to pass instead.
    """
    if isinstance(value, jax.Array | np.ndarray):
        return
    if isinstance(value, str | os.PathLike):
        remedy = f"pixel_jax.read_image({os.fspath(value)!r}) reads a file"
    elif hasattr(value, "getbands"):
        remedy = "np.asarray(image.convert('RGB')) has a Pillow image's pixels, pixel_jax.read_image(path) a file's"
    else:
        remedy = "pixel_jax.read_image(path) reads a file, np.asarray(x, np.uint8) makes one"
    raise ValueError(f"{name} must be an array of pixels, not {type(value).__name__}: {remedy}")


def is_concrete(values: AnyArray) -> bool:
    """Whether the values are known now, so that they can be checked; those of a traced array are not."""
    return not isinstance(values, Tracer)


def integers(name: str, values: AnyArray | Sequence[int] | int, count: int | None = None) -> AnyArray:
    """Returns a list or an array of integers as an array: of NumPy, unless it is JAX's already.

    Raises:
      ValueError: the values are no integers, or not `count` of them.
    """
    values = values if isinstance(values, jax.Array) else np.asarray(values)
    if (count is not None and values.shape != (count,)) or not jnp.issubdtype(values.dtype, jnp.integer):
        many = "" if count is None else f"{count} "
        raise ValueError(f"{name} must be {many}integers, got {values.dtype} {values.shape}")
    return values
