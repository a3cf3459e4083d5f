"""Tools that draw a new image from one that the model names: they share everything but `draw` and its arguments."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from pixel_jax.tools.boxes import as_shares
from pixel_jax.tools.device import Answer, Seen, Target, find_target, fitted, no_such_image, region_size
from pixel_jax.tools.tool import Argument, Box, Draw, DrawnSize, Number, Outcome, Tool

if TYPE_CHECKING:
    from pixel_jax.rollouts.config import RolloutConfig

TARGET = Number(
    "target_image",
    "The index of the image. Index from 1 to the number of images. Choose 1 to operate on original image.",
)


def drawing_tool(
    name: str,
    description: str,
    arguments: tuple[Argument, ...],
    draw: Draw,
    *,
    shows: str,
    drawn_size: DrawnSize | None = None,
    accepts: Callable[[Mapping[str, Any], jax.Array], jax.Array] | None = None,
) -> Tool:
    """Makes a tool that draws a new image from one that the model names, at full resolution.

    The tool has one more argument, `target_image`. In the arguments that `draw`, `drawn_size` and `accepts` get, a box is in
    shares of the image, whatever the call format measures it in.

    Args:
      name: as in `Tool`.
      description: as in `Tool`.
      arguments: all arguments but `target_image`.
      draw: as in `Tool`.
      shows: the text of the observation, as "Here is the rotated image"; the size at which the image is shown follows.
      drawn_size: as in `Tool`.
      accepts: (arguments, size int32 [2] of the image) -> bool [], whether the call can be carried out. None: it always can.
    """
    shown, missing = Outcome("shown", f"\n{shows} (Image Size: {{0}}x{{1}}):", images=1), no_such_image(name)

    def execute(written: Mapping[str, Any], seen: Seen, limits: "RolloutConfig") -> Answer:
        target = find_target(written["target_image"], seen, missing)
        size, shares = region_size(target.region), in_shares(written, target, seen)
        drawn = size if drawn_size is None else drawn_size(shares, size)
        view, fits = fitted(drawn, limits.sizes("crop"))
        accepted = jnp.bool_(True) if accepts is None else accepts(shares, size)
        return Answer(
            outcomes=(*target.outcomes, (~accepted | ~fits, None, ())),
            last=(shown, (view[1], view[0])),
            image=target.image[None],
            region=target.region[None],
            size=view[None],
            shown=target.size,
        )

    def in_shares(written: Mapping[str, Any], target: Target, seen: Seen) -> dict[str, Any]:
        where = region_size(target.region), target.size, seen.coordinates
        boxes = {x.name: as_shares(written[x.name], *where) for x in arguments if isinstance(x, Box)}
        return {**written, **boxes}

    return Tool(
        name,
        description,
        (*arguments, TARGET),
        outcomes=(shown, *missing),
        execute=execute,
        draw=draw,
        drawn_size=drawn_size,
    )
