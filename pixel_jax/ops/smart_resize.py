"""The size at which a Qwen vision tower sees an image of a given size.

The reference computes in double precision and floors quotients that are often exact integers (a square image with a
square pixel limit, say), so that its result depends on the last bit of each rounding. Compilers merge and reorder
floating-point operations, and some devices have no doubles; the traced form therefore carries out the reference's few
IEEE operations on integers.
"""

import math
import operator
from collections.abc import Sequence
from typing import TypeAlias, overload

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.arrays import AnyArray
from pixel_jax.ops.arguments import integers
from pixel_jax.ops.doubles import divide, double, floor, multiply, sqrt, where

MAX_RATIO = 200
MAX_SIDE = 1 << 24
Sides: TypeAlias = AnyArray | Sequence[int]


@overload
def smart_resize(height: int, width: int, *, factor: int = 28, min_pixels: int, max_pixels: int) -> tuple[int, int]: ...
@overload
def smart_resize(
    height: Sides, width: Sides, *, factor: int = 28, min_pixels: int, max_pixels: int
) -> tuple[jax.Array, jax.Array]: ...
def smart_resize(height, width, *, factor: int = 28, min_pixels: int, max_pixels: int):
    """Finds the size, in multiples of `factor`, of about the same shape and with an allowed number of pixels.

    Equal to `smart_resize` of the Qwen2-VL image processor for every size with sides up to 2 ** 24.

    Args:
      height: an int, or a list or an array of integers, which may be traced.
      width: the same; lists and arrays broadcast.
      factor: side of a merged token in pixels.
      min_pixels: lower limit of height * width.
      max_pixels: upper limit. Where no multiples of `factor` are within the limits, the size is outside.

    Returns:
      (height, width), ints for ints and int32 arrays for arrays; zeros in arrays for sides that are not positive or have a
      ratio over 200.

    Raises:
      ValueError: ints that are not positive or have a ratio over 200, or limits that are no interval.
    """
    if factor < 1 or not 1 <= min_pixels <= max_pixels:
        raise ValueError(
            f"need factor >= 1 and 1 <= min_pixels <= max_pixels, got {factor}, {min_pixels}, {max_pixels}"
        )
    if any(isinstance(side, jax.Array) or np.ndim(side) for side in (height, width)):
        height, width = jnp.broadcast_arrays(_sides("height", height), _sides("width", width))
        return _traced(height, width, factor, min_pixels, max_pixels)
    return _host(operator.index(height), operator.index(width), factor, min_pixels, max_pixels)


def most_pixels(height: int, width: int, *, factor: int = 28, min_pixels: int, max_pixels: int) -> int:
    """Bounds the number of pixels of what `smart_resize` returns for images of at most this height and width.

    The bound is not always reached: an image that is enlarged to `min_pixels` has each side rounded up, which adds most to one
    that is `MAX_RATIO` times as long as wide. Sizes that exceed `max_pixels` because of `factor` are left out.
    """
    rounded = round(height / factor) * round(width / factor)
    side = math.sqrt(min_pixels) / factor
    enlarged = math.ceil(side**2 + side * (math.sqrt(MAX_RATIO) + 1 / math.sqrt(MAX_RATIO)) + 1)
    return min(max_pixels // factor**2, max(rounded, enlarged)) * factor**2


def _sides(name: str, values: Sides | int) -> jax.Array:
    """Converts sides to int32; one that does not fit becomes a side that is too long."""
    values = integers(name, values)
    clip = jnp.clip if isinstance(values, jax.Array) else np.clip
    return jnp.asarray(clip(values, -1, MAX_SIDE + 1), jnp.int32)


def _host(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    if min(height, width) < 1 or max(height, width) > MAX_SIDE:
        raise ValueError(f"sides must be between 1 and {MAX_SIDE} pixels, got {height} x {width}")
    if max(height, width) > MAX_RATIO * min(height, width):
        raise ValueError(f"aspect ratio must be at most {MAX_RATIO}, got {height} x {width}")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        beta = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif new_height * new_width < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    return new_height, new_width


@jax.jit(static_argnames=("factor", "min_pixels", "max_pixels"))
def _traced(height, width, factor, min_pixels, max_pixels):
    smaller, larger = jnp.minimum(height, width), jnp.maximum(height, width)
    allowed = (smaller >= 1) & (larger <= MAX_SIDE)
    with jax.enable_x64(True):
        height, width = (jnp.where(allowed, side, 1).astype(jnp.int64) for side in (height, width))
        allowed &= jnp.maximum(height, width) <= MAX_RATIO * jnp.minimum(height, width)
        sides = jnp.stack([height, width])
        area = jnp.broadcast_to(height * width, sides.shape)
        rounded = _round_half_even(sides, factor) * factor
        too_large, too_small = rounded[0] * rounded[1] > max_pixels, rounded[0] * rounded[1] < min_pixels
        beta = sqrt(
            divide(
                double(jnp.where(too_large, area, min_pixels)),
                double(jnp.where(too_large, jnp.full_like(area, max_pixels), area)),
            )
        )
        scaled = where(too_large, divide(double(sides), beta), multiply(sides, beta))
        whole, inexact = floor(divide(scaled, double(jnp.full_like(sides, factor))))
        shrunk, grown = jnp.maximum(whole, 1) * factor, (whole + inexact) * factor
        sides = jnp.where(too_large, shrunk, jnp.where(too_small, grown, rounded))
        height, width = jnp.where(allowed, sides, 0).astype(jnp.int32)
    return height, width


def _round_half_even(value, divisor):
    quotient, twice = value // divisor, 2 * (value % divisor)
    return quotient + ((twice > divisor) | ((twice == divisor) & (quotient % 2 == 1)))
