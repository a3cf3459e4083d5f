"""What a device tool is given and what it gives back: numbers of one row, inside a compiled program.

`execute(arguments, seen, limits)` decides what a call comes to. It sees where pictures lie and how large they are, never their
pixels, so it costs nothing to ask it of every row. What is to be shown is a part of a picture, at a size; a tool that makes
new pixels says so by `Tool.draw`, which is applied to that part at full resolution, before it is resized.

    arguments   {name: value} (`pixel_jax.tools.calls.read`)
    seen        `Seen`
    limits      the rollout's config, static: pixel budgets and what else shapes tools (`pad`, `min_crop`, ...)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pixel_jax.arrays import AnyArray
from pixel_jax.ops import smart_resize
from pixel_jax.tools.calls import Lists, Numbers
from pixel_jax.tools.tool import Coordinates, Outcome, Tool

MAX_RATIO = 200  # longest to shortest side that smart_resize accepts


class ImageHistory(NamedTuple):
    """The pictures that a row may ask for, in the order the model counts them; entry 0 of a video row is the video itself."""

    image: AnyArray  # int32 [..., M]
    region: AnyArray  # int32 [..., M, 4], x1 y1 x2 y2 in the image
    size: AnyArray  # int32 [..., M, 2], (height, width) at which the model was shown it; of a video, its frames
    count: AnyArray  # int32 [...]


class Seen(NamedTuple):
    """What one row has been shown."""

    history: ImageHistory
    is_video: AnyArray  # bool, it began with the frames of a video
    image_sizes: AnyArray  # int32 [C, 2], (height, width) of the prompt's images or frames
    image_counts: AnyArray  # int32
    coordinates: AnyArray | int = Coordinates.EITHER  # int32, what boxes of calls are measured in


class Answer(NamedTuple):
    """What a call comes to: the outcome of the first condition that holds, or the last one.

    An outcome that is None is the message of all tools for calls that cannot be carried out. Pictures are shown where the
    outcome has room for them.
    """

    outcomes: Sequence[tuple[jax.Array, Outcome | None, Sequence[Any]]]  # condition, outcome, its integers
    last: tuple[Outcome, Sequence[Any]]
    image: jax.Array  # int32 [V]
    region: jax.Array  # int32 [V, 4]
    size: jax.Array  # int32 [V, 2], (height, width) at which it is shown
    count: jax.Array | int = 1  # pictures shown
    # int32 [2], (height, width) at which the model was shown the picture that its boxes are of; None: its own size
    shown: jax.Array | None = None
    listed: Lists | None = None  # what stands for {list}


def shown_size(region: jax.Array, min_pixels: int, max_pixels: int, max_side: int) -> tuple[jax.Array, jax.Array]:
    """Size [..., 2] (height, width) at which `region` [..., 4] is shown, and whether it can be.

    Rounding up can exceed a tight budget, and a sliver has no size at all.
    """
    height, width = region[..., 3] - region[..., 1], region[..., 2] - region[..., 0]
    return fitted(jnp.stack([height, width], axis=-1), min_pixels, max_pixels, max_side)


def fitted(size: jax.Array, min_pixels: int, max_pixels: int, max_side: int) -> tuple[jax.Array, jax.Array]:
    """The same of a picture of `size` [..., 2]."""
    height, width = size[..., 0], size[..., 1]
    short, long = jnp.minimum(height, width), jnp.maximum(height, width)
    possible = (short > 0) & (long <= MAX_RATIO * short)
    height, width = jnp.where(possible, height, 28), jnp.where(possible, width, 28)
    size = jnp.stack(smart_resize(height, width, min_pixels=min_pixels, max_pixels=max_pixels), axis=-1)
    fits = (size[..., 0] * size[..., 1] <= max_pixels) & (jnp.max(size, axis=-1) <= max_side)
    return size, possible & fits


class Target(NamedTuple):
    """The picture that a call names by its number."""

    image: jax.Array  # int32
    region: jax.Array  # int32 [4]
    size: jax.Array  # int32 [2], (height, width) at which the model was shown it
    outcomes: tuple[tuple[jax.Array, Outcome | None, Sequence[Any]], ...]  # where there is none of that number


def no_such_image(tool: str) -> tuple[Outcome, Outcome, Outcome]:
    """The outcomes of a `tool` whose `target_image` is out of range, in the words of the released code: an image's row, a
    video's before it has been shown any image, and after.
    """
    said = f"\nExecution error:\nExecution Error: Incorrect `target_image` argument in `{tool}` operation. You can only pick "
    written = ", but the current argument `target_image={1}`.\n"
    return (
        Outcome("no such image", said + "an image within [1,{0}]\n"),
        Outcome("no such frame", said + "an image **from** the video within [1,{0}]" + written),
        Outcome("no such selection", said + "an image within range [2,{0}]" + written),
    )


def find_target(number: Numbers, seen: Seen, missing: tuple[Outcome, Outcome, Outcome]) -> Target:
    """The picture of this number: an image that was shown, or, before any was, a frame of the video."""
    history, video, target = seen.history, seen.is_video, number.signed_units
    fresh_video = video & (history.count == 1)
    low = jnp.where(video & ~fresh_video, 2, 1)
    high = jnp.where(fresh_video, seen.image_counts, history.count)
    in_range = (target >= low) & (target <= high)
    index = jnp.where(in_range, target, low) - 1
    frame = jnp.minimum(index, seen.image_sizes.shape[0] - 1)
    return Target(
        image=jnp.where(fresh_video, frame, history.image[index]),
        region=jnp.where(fresh_video, whole(seen.image_sizes[frame]), history.region[index]),
        size=history.size[jnp.where(fresh_video, 0, index)],
        outcomes=(
            (~number.integer, None, ()),
            (~in_range & ~video, missing[0], (history.count,)),
            (~in_range & fresh_video, missing[1], (seen.image_counts, target)),
            (~in_range, missing[2], (history.count, target)),
        ),
    )


def whole(size: jax.Array) -> jax.Array:
    """The region [..., 4] of all of an image of `size` [..., 2]."""
    zeros = jnp.zeros_like(size)
    return jnp.concatenate([zeros, size[..., ::-1]], axis=-1)


def region_size(region: jax.Array) -> jax.Array:
    """(height, width) of a region: int32 [..., 2]."""
    return jnp.stack([region[..., 3] - region[..., 1], region[..., 2] - region[..., 0]], axis=-1)


def size_of_drawing(tool: Tool, arguments: dict[str, Any], size: jax.Array) -> jax.Array:
    """(height, width) of what `tool` makes of a picture of `size`: int32 [2]."""
    return size if tool.drawn_size is None else tool.drawn_size(arguments, size)
