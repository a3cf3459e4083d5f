"""What operations on pixels are given: arrays of NumPy or JAX, concrete or traced, and integers in any of these or in a list."""

import os

import jax
import jax.numpy as jnp
import numpy as np


def check_pixels(name: str, value) -> None:
    """Raises ValueError, with what to pass instead, where `value` is no array: a path or a picture of Pillow's, say."""
    if isinstance(value, jax.Array | np.ndarray):
        return
    if isinstance(value, str | os.PathLike):
        remedy = f"pixel_jax.read_image({os.fspath(value)!r}) reads a file"
    elif hasattr(value, "getbands"):
        remedy = "np.asarray(image.convert('RGB')) has a Pillow image's pixels, pixel_jax.read_image(path) a file's"
    else:
        remedy = "pixel_jax.read_image(path) reads a file, np.asarray(x, np.uint8) makes one"
    raise ValueError(f"{name} must be an array of pixels, not {type(value).__name__}: {remedy}")


def integers(name: str, values, count: int | None = None):
    """`values`, a list or an array, as an array of integers, `count` of them if that is given; of NumPy unless it is JAX's."""
    values = values if isinstance(values, jax.Array) else np.asarray(values)
    if (count is not None and values.shape != (count,)) or not jnp.issubdtype(values.dtype, jnp.integer):
        many = "" if count is None else f"{count} "
        raise ValueError(f"{name} must be {many}integers, got {values.dtype} {values.shape}")
    return values
