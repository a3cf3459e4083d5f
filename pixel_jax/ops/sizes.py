"""The size at which an image is shown: about its own shape within limits, or the middle of it in one square."""

from typing import NamedTuple, overload

import jax
import jax.numpy as jnp

from pixel_jax.ops.smart_resize import Sides, most_pixels, smart_resize


class Sizes(NamedTuple):
    """The sizes at which images of one kind are shown.

    A vision tower that takes images of any size gets them within limits of area and of sides, `smart_resize`. One that takes a
    single size gets all in one square (`square_window`).
    """

    factor: int  # pixels along a side of a visual token; sides are multiples of it
    min_pixels: int  # area, at least
    max_pixels: int  # area, at most
    max_side: int  # longest side, in pixels
    square: bool = False  # every image is shown at max_side x max_side

    @overload
    def of(self, height: int, width: int) -> tuple[int, int]: ...
    @overload
    def of(self, height: Sides, width: Sides) -> tuple[jax.Array, jax.Array]: ...
    def of(self, height, width):
        """Returns the (height, width) at which an image is shown; arguments and errors are those of `smart_resize`."""
        limits = {"factor": self.factor, "min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        size = smart_resize(height, width, **limits)
        if not self.square:
            return size
        if isinstance(size[0], jax.Array):  # zeros stand for what cannot be shown
            return tuple(jnp.where(side > 0, self.max_side, 0) for side in size)
        return self.max_side, self.max_side

    def most(self, height: int, width: int) -> int:
        """Bounds the area at which images of at most this height and width are shown, in pixels."""
        if self.square:
            return self.max_pixels
        limits = {"factor": self.factor, "min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        return most_pixels(height, width, **limits)


def square_window(height, width, side: int):
    """Where the middle of an image lies once its shorter side is resized to `side`, as CLIP's image processor has it.

    Args:
      height: of the image, in pixels; an int, or an int32 array, which may be traced.
      width: the same.
      side: of the square that is cut out of the middle.

    Returns:
      The (height, width) to which the image is resized, and the (row, column) at which the square begins in that. Where a side
      of an array is not positive, sizes are `side`.
    """
    if isinstance(height, jax.Array):
        shorter = jnp.maximum(jnp.minimum(height, width), 1)
        # side * length // shorter in two parts: the longer side of a large image, times `side`, exceeds int32.
        resized = lambda length: length // shorter * side + length % shorter * side // shorter
        size = resized(jnp.maximum(height, shorter)), resized(jnp.maximum(width, shorter))
    else:
        shorter = min(height, width)
        size = side * height // shorter, side * width // shorter
    return size, tuple((length - side) // 2 for length in size)
