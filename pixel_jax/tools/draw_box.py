"""The outline of a box on an image, equal to Pillow's `ImageDraw.rectangle`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pixel_jax.tools.boxes import box_in_region
from pixel_jax.tools.device import whole
from pixel_jax.tools.drawing import drawing_tool
from pixel_jax.tools.tool import IN_SHARES, Box, Choice, Coordinates

COLOURS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "white": (255,) * 3}
# A line has THINNEST pixels, and one more for every PIXELS_A_LINE pixels of the image's longest side.
THINNEST, PIXELS_A_LINE = 2, 200


def edges(arguments: Mapping[str, Any], size: jax.Array) -> jax.Array:
    """Returns the box in pixels of an image of `size`: int32 [4], x1 y1 x2 y2, x2 and y2 exclusive."""
    return box_in_region(arguments["bbox_2d"], whole(size), size, coordinates=Coordinates.SHARES)


def accepts(arguments: Mapping[str, Any], size: jax.Array) -> jax.Array:
    """Whether the box lies inside the image and is large enough for its lines: bool []."""
    box = arguments["bbox_2d"]
    beyond = (box.units > 1) | ((box.units == 1) & (box.micros > 0)) | (box.negative & (box.units + box.micros > 0))
    x1, y1, x2, y2 = edges(arguments, size)
    return ~jnp.any(beyond) & (jnp.minimum(x2 - x1, y2 - y1) >= 2 * line(size))


def line(size: jax.Array) -> jax.Array:
    """Returns the width of a line, in pixels: int32 []."""
    return THINNEST + jnp.max(size) // PIXELS_A_LINE


def draw(arguments: Mapping[str, Any], pixels: jax.Array, size: jax.Array) -> jax.Array:
    """Draws the box on pixels uint8 [S, S, 3] of an image of `size` int32 [2]."""
    x1, y1, x2, y2 = edges(arguments, size)
    y, x = jnp.arange(pixels.shape[0])[:, None], jnp.arange(pixels.shape[0])

    def within(margin: jax.Array | int) -> jax.Array:
        return (y >= y1 + margin) & (y < y2 - margin) & (x >= x1 + margin) & (x < x2 - margin)

    colour = jnp.array(list(COLOURS.values()), jnp.uint8)[arguments["colour"]]
    return jnp.where((within(0) & ~within(line(size)))[..., None], colour, pixels)


DRAW_BOX = drawing_tool(
    "draw_box",
    "Draw the outline of a box on the image. It is useful to keep track of a place, or to compare places.",
    (
        Box("bbox_2d", "coordinates for bounding box to draw. " + IN_SHARES),
        Choice("colour", "Of the line.", options=tuple(COLOURS)),
    ),
    draw,
    shows="Here is the image with the box",
    accepts=accepts,
)
