"""The outline of a box on an image, as Pillow's `ImageDraw.rectangle`."""

import jax
import jax.numpy as jnp

from pixel_jax.tools.boxes import box_in_region
from pixel_jax.tools.device import whole
from pixel_jax.tools.drawing import drawing_tool
from pixel_jax.tools.tool import IN_SHARES, Box, Choice, Coordinates

COLOURS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "white": (255,) * 3}
THINNEST, PART = 2, 200  # pixels of a line, of which there is one more for so many of the image's longest side


def edges(arguments, size: jax.Array) -> jax.Array:
    """x1 y1 x2 y2, of which the last are the first pixels outside: int32 [4]."""
    return box_in_region(arguments["bbox_2d"], whole(size), size, coordinates=Coordinates.SHARES)


def accepts(arguments, size: jax.Array) -> jax.Array:
    """A box inside the image, with room for its lines."""
    box = arguments["bbox_2d"]
    beyond = (box.units > 1) | ((box.units == 1) & (box.micros > 0)) | (box.negative & (box.units + box.micros > 0))
    x1, y1, x2, y2 = edges(arguments, size)
    return ~jnp.any(beyond) & (jnp.minimum(x2 - x1, y2 - y1) >= 2 * line(size))


def line(size: jax.Array) -> jax.Array:
    """The width of a line, in pixels."""
    return THINNEST + jnp.max(size) // PART


def draw(arguments, pixels: jax.Array, size: jax.Array) -> jax.Array:
    x1, y1, x2, y2 = edges(arguments, size)
    y, x = jnp.arange(pixels.shape[0])[:, None], jnp.arange(pixels.shape[0])
    within = lambda by: (y >= y1 + by) & (y < y2 - by) & (x >= x1 + by) & (x < x2 - by)
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
