"""Boxes that a model writes, as pixels.

A box is in shares of an image, in pixels of that image *as the model was shown it*, which is the size that observations
announce and the one in which Qwen2.5-VL was taught to point, or in its own pixels (`Coordinates`). In each case it becomes
shares, is padded and clipped, and lies in what the image shows of its image, at full resolution. A tool that draws is given
boxes as shares, to the millionth (`as_shares`), whatever they are measured in. The released code does this
in Python's floats, whose last bit decides where an edge lies halfway between two pixels (4 % of boxes in pixels); so do we,
on integers, so that every device and the host agree. A coordinate counts to the millionth.
"""

import jax
import jax.numpy as jnp

from pixel_jax.ops import doubles
from pixel_jax.tools.calls import Numbers, Values
from pixel_jax.tools.tool import Box, Coordinates, Tool

MILLION = 1_000_000


def box_in_region(
    box: Numbers,
    region: jax.Array,
    size: jax.Array,
    *,
    coordinates: jax.Array | int = Coordinates.EITHER,
    pad: float = 0.0,
    one_is_absolute: bool = False,
) -> jax.Array:
    """The box that was written as int32 [..., 4] in image pixels, padding applied, clipped to the region that it is a box of.

    Args:
      box: of four numbers, x1, y1, x2, y2, [..., 4].
      region: int32 [..., 4], x1 y1 x2 y2 in the image; size: int32 [..., 2], (height, width) at which it was shown.
      coordinates: what the numbers are measured in, a `Coordinates`.
      pad: added on each side, as a share of the region.
      one_is_absolute: the released code reads a box with a coordinate of exactly 1 as pixels.
    """
    absolute = in_pixels(box, coordinates, one_is_absolute)
    with jax.enable_x64(True):
        sides = (region[..., jnp.array([2, 3, 2, 3])] - region[..., jnp.array([0, 1, 0, 1])]).astype(jnp.int64)
        shown = jnp.maximum(size, 1)[..., jnp.array([1, 0, 1, 0])].astype(jnp.int64)
        shown = jnp.where(coordinates == Coordinates.PIXELS, jnp.maximum(sides, 1), shown)
        millionths = box.units.astype(jnp.int64) * MILLION + box.micros
        share = doubles.divide(doubles.double(millionths), doubles.constant(float(MILLION)))
        share = doubles.where(absolute, doubles.divide(share, doubles.double(shown)), share)
        padding, zero = doubles.constant(pad), doubles.constant(0.0)
        low = doubles.where(box.negative, zero, doubles.subtract(share, padding))
        high = doubles.where(box.negative, doubles.subtract(padding, share), doubles.add(share, padding))
        share = doubles.where(jnp.arange(4) < 2, low, high)
        edges = doubles.round_half_even(doubles.multiply(sides, share))
        found = jnp.minimum(jnp.where(doubles.at_least_one(share), sides, edges), sides).astype(jnp.int32)
    return found + region[..., jnp.array([0, 1, 0, 1])]


def in_pixels(box: Numbers, coordinates: jax.Array | int, one_is_absolute: bool = False) -> jax.Array:
    """Whether the numbers of boxes [..., 4] are pixels: bool [..., 1]."""
    beyond = (box.units > 1) | ((box.units == 1) & (box.micros > 0))
    if one_is_absolute:
        beyond = box.units >= 1
    absolute = jnp.any(beyond & ~box.negative, axis=-1, keepdims=True)
    return jnp.where(coordinates == Coordinates.EITHER, absolute, coordinates == Coordinates.PIXELS)


def as_shares(box: Numbers, size: jax.Array, shown: jax.Array, coordinates: jax.Array | int) -> Numbers:
    """A box [4] of a picture of `size` int32 [2] (height, width), which was shown at `shown`, as shares to the millionth."""
    absolute = in_pixels(box, coordinates)
    side = jnp.where(coordinates == Coordinates.PIXELS, size, shown)[jnp.array([1, 0, 1, 0])]
    with jax.enable_x64(True):
        side = jnp.maximum(side, 1).astype(jnp.int64)
        share = (2 * (box.units.astype(jnp.int64) * MILLION + box.micros) + side) // (2 * side)
        units, micros = (x.astype(jnp.int32) for x in (share // MILLION, share % MILLION))
    return Numbers(
        jnp.where(absolute, units, box.units),
        jnp.where(absolute, micros, box.micros),
        box.negative,
        box.integer & ~absolute,
    )


def with_shares(tool: Tool, values: Values, size: jax.Array, shown: jax.Array, coordinates: jax.Array | int) -> Values:
    """The values of a call of `tool`, its boxes as shares (`as_shares`)."""
    for argument in tool.arguments:
        if isinstance(argument, Box):
            at = slice(tool.starts[argument.name], tool.starts[argument.name] + argument.slots)
            shares = as_shares(Numbers(*(x[at] for x in values[:4])), size, shown, coordinates)
            values = Values(*(x.at[at].set(y) for x, y in zip(values[:4], shares, strict=True)), values.lengths)
    return values
