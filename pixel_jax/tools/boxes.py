"""Converts boxes that a model writes to pixels.

The call format says what a box is measured in (`Coordinates`): shares of an image, its own pixels, or pixels of the image *as
the model was shown it*, which is the size that observations announce and the one in which Qwen2.5-VL was trained to point.
The box is converted to shares, padded, clipped, and then to pixels at full resolution. A tool that draws gets boxes as shares,
to the millionth, whatever they were measured in (`as_shares`).

The released code computes this in Python's floats. Their last bit decides which pixel an edge halfway between two pixels goes to
(4 % of boxes in pixels), so the same IEEE operations are computed on integers here, and every device and the host agree.
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
    """Converts a box of a region of an image to pixels of the image, padded and clipped to the region.

    Args:
      box: [..., 4], the numbers x1, y1, x2, y2 as they were written.
      region: int32 [..., 4], x1 y1 x2 y2 in pixels of the image.
      size: int32 [..., 2], (height, width) at which the model was shown the region.
      coordinates: the unit of the numbers, a `Coordinates`.
      pad: added on each side, as a share of the region.
      one_is_absolute: whether a coordinate of exactly 1 makes the box one in pixels, as in the released code.

    Returns:
      int32 [..., 4], x1 y1 x2 y2 in pixels of the image.
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
        edges = jnp.minimum(jnp.where(doubles.at_least_one(share), sides, edges), sides).astype(jnp.int32)
    return edges + region[..., jnp.array([0, 1, 0, 1])]


def in_pixels(box: Numbers, coordinates: jax.Array | int, one_is_absolute: bool = False) -> jax.Array:
    """Whether the numbers of boxes [..., 4] are pixels, not shares: bool [..., 1]."""
    beyond = (box.units > 1) | ((box.units == 1) & (box.micros > 0))
    if one_is_absolute:
        beyond = box.units >= 1
    absolute = jnp.any(beyond & ~box.negative, axis=-1, keepdims=True)
    return jnp.where(coordinates == Coordinates.EITHER, absolute, coordinates == Coordinates.PIXELS)


def as_shares(box: Numbers, size: jax.Array, shown: jax.Array, coordinates: jax.Array | int) -> Numbers:
    """Converts a box to shares of its image, to the millionth.

    Args:
      box: [4], as it was written.
      size: int32 [2], (height, width) of the image.
      shown: int32 [2], (height, width) at which the model was shown it.
      coordinates: the unit of the numbers, a `Coordinates`.
    """
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
    """Converts the boxes among the values of one call of `tool` to shares; the arguments are those of `as_shares`."""
    for argument in tool.arguments:
        if isinstance(argument, Box):
            at = slice(tool.starts[argument.name], tool.starts[argument.name] + argument.slots)
            shares = as_shares(values.numbers(at), size, shown, coordinates)
            values = values._replace(
                **{name: getattr(values, name).at[at].set(x) for name, x in shares._asdict().items()}
            )
    return values
