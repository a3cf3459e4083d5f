"""Tools that make a new picture of one that the model names: all but `draw` and its arguments is the same for them."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from pixel_jax.tools.boxes import as_shares
from pixel_jax.tools.device import Answer, Seen, Target, find_target, fitted, no_such_image, region_size
from pixel_jax.tools.tool import Argument, Box, Number, Outcome, Tool

TARGET = Number(
    "target_image",
    "The index of the image. Index from 1 to the number of images. Choose 1 to operate on original image.",
)


def drawing_tool(
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

    In the arguments of all three a box is in shares of the image, whatever the call format measures it in.
    """
    shown, missing = Outcome("shown", f"\n{shows} (Image Size: {{0}}x{{1}}):", images=1), no_such_image(name)

    def execute(written, seen: Seen, limits) -> Answer:
        target = find_target(written["target_image"], seen, missing)
        size, given = region_size(target.region), in_shares(written, target, seen)
        made = size if drawn_size is None else drawn_size(given, size)
        view, fits = fitted(made, limits.crop_min_pixels, limits.crop_max_pixels, limits.max_side)
        accepted = jnp.bool_(True) if accepts is None else accepts(given, size)
        return Answer(
            outcomes=(*target.outcomes, (~accepted | ~fits, None, ())),
            last=(shown, (view[1], view[0])),
            image=target.image[None],
            region=target.region[None],
            size=view[None],
            shown=target.size,
        )

    def in_shares(given: dict[str, Any], target: Target, seen: Seen) -> dict[str, Any]:
        size = region_size(target.region)
        share = lambda box: as_shares(box, size, target.size, seen.coordinates)
        return given | {x.name: share(given[x.name]) for x in arguments if isinstance(x, Box)}

    return Tool(
        name,
        description,
        (*arguments, TARGET),
        outcomes=(shown, *missing),
        execute=execute,
        draw=draw,
        drawn_size=drawn_size,
    )
