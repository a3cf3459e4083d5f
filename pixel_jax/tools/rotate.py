"""Quarter turns and mirror images, equal to Pillow's `Image.transpose`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pixel_jax.tools.drawing import drawing_tool
from pixel_jax.tools.tool import Choice

BY = ("90", "180", "270", "mirror", "flip")


def sideways(arguments: Mapping[str, Any]) -> jax.Array:
    """Whether width and height are swapped: bool []."""
    return (arguments["by"] == BY.index("90")) | (arguments["by"] == BY.index("270"))


def drawn_size(arguments: Mapping[str, Any], size: jax.Array) -> jax.Array:
    """Returns the (height, width) of the rotated image, int32 [2], for an image of `size`."""
    return jnp.where(sideways(arguments), size[::-1], size)


def draw(arguments: Mapping[str, Any], pixels: jax.Array, size: jax.Array) -> jax.Array:
    """Rotates or mirrors pixels uint8 [S, S, 3] of `size` int32 [2]."""
    y, x = jnp.arange(pixels.shape[0])[:, None], jnp.arange(pixels.shape[0])
    down, across = size[0] - 1, size[1] - 1
    # For every option, the row and the column of the source of each pixel.
    rows = (down - x, down - y, x, y, down - y)
    columns = (y, across - x, across - y, across - x, x)

    def chosen(options: tuple[jax.Array, ...]) -> jax.Array:
        return jnp.stack([jnp.broadcast_to(x, pixels.shape[:2]) for x in options])[arguments["by"]]

    return pixels[jnp.maximum(chosen(rows), 0), jnp.maximum(chosen(columns), 0)]


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
