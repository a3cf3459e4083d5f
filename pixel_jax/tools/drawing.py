"""Tools that make a new picture of one that the model names: all but `draw` and its arguments is the same for them."""

from collections.abc import Callable

import jax.numpy as jnp

from pixel_jax.tools.looking import Answer, Seen, find_target, fitted, no_such_image, region_size
from pixel_jax.tools.tool import Argument, Number, Outcome, Tool

TARGET = Number(
    "target_image",
    "The index of the image. Index from 1 to the number of images. Choose 1 to operate on original image.",
)


def drawing(
    name: str,
    description: str,
    arguments: tuple[Argument, ...],
    draw: Callable,
    *,
    shows: str,
    drawn_size: Callable | None = None,
    accepts: Callable | None = None,
) -> Tool:
    """A tool with one more argument, `target_image`, that shows what `draw` makes of that image at its full resolution.

    Args:
      draw, drawn_size: as in `Tool`.
      shows: what the observation says, as "Here is the rotated image"; the size at which it is shown follows.
      accepts: (arguments, size of the image) -> bool, whether it can be done at all.
    """
    shown, missing = Outcome("shown", f"\n{shows} (Image Size: {{0}}x{{1}}):", images=1), no_such_image(name)

    def execute(arguments, seen: Seen, limits) -> Answer:
        target = find_target(arguments["target_image"], seen, missing)
        size = region_size(target.region)
        made = size if drawn_size is None else drawn_size(arguments, size)
        view, fits = fitted(made, limits.crop_min_pixels, limits.crop_max_pixels, limits.max_side)
        accepted = jnp.bool_(True) if accepts is None else accepts(arguments, size)
        return Answer(
            outcomes=(*target.outcomes, (~accepted | ~fits, None, ())),
            last=(shown, (view[1], view[0])),
            canvas=target.canvas[None],
            region=target.region[None],
            size=view[None],
        )

    return Tool(
        name,
        description,
        (*arguments, TARGET),
        outcomes=(shown, *missing),
        execute=execute,
        draw=draw,
        drawn_size=drawn_size,
    )
