"""Quarter turns and mirror images, as Pillow's `Image.transpose`."""

import jax
import jax.numpy as jnp

from pixel_jax.tools.drawing import drawing_tool
from pixel_jax.tools.tool import Choice

BY = ("90", "180", "270", "mirror", "flip")


def sideways(arguments) -> jax.Array:
    """Whether width and height change places."""
    return (arguments["by"] == BY.index("90")) | (arguments["by"] == BY.index("270"))


def drawn_size(arguments, size: jax.Array) -> jax.Array:
    return jnp.where(sideways(arguments), size[::-1], size)


def draw(arguments, pixels: jax.Array, size: jax.Array) -> jax.Array:
    y, x = jnp.arange(pixels.shape[0])[:, None], jnp.arange(pixels.shape[0])
    down, across = size[0] - 1, size[1] - 1
    # Of every option, the row and the column of a pixel in the picture before.
    rows = (down - x, down - y, x, y, down - y)
    columns = (y, across - x, across - y, across - x, x)
    place = lambda options: jnp.stack([jnp.broadcast_to(z, pixels.shape[:2]) for z in options])[arguments["by"]]
    return pixels[jnp.maximum(place(rows), 0), jnp.maximum(place(columns), 0)]


ROTATE = drawing_tool(
    "rotate",
    "Turn the image, or mirror it. It is useful when the image lies on its side, is upside down or is mirrored.",
    (
        Choice(
            "by",
            "Degrees to turn it clockwise; or mirror, to swap left and right; or flip, to swap top and bottom.",
            options=BY,
        ),
    ),
    draw,
    shows="Here is the rotated image",
    drawn_size=drawn_size,
)
