"""The interface of device tools: what `execute` gets and returns, for one row, inside a compiled program.

`execute(arguments, seen, limits)` decides the outcome of a call. It gets the positions and sizes of images, never their pixels,
so it is cheap enough to be called for every row. What it shows is a region of an image, at a size. A tool that makes new pixels
has `Tool.draw`, which is applied to that region at full resolution, before the result is resized.

    arguments   {name: value} (`pixel_jax.tools.calls.read`)
    seen        `Seen`
    limits      the rollout's config, static: pixel budgets and other settings of tools (`pad`, `min_crop`, ...)
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from pixel_jax.arrays import AnyArray
from pixel_jax.ops import Sizes
from pixel_jax.tools.calls import Lists, Numbers
from pixel_jax.tools.tool import Coordinates, Outcome, Tool

MAX_RATIO = 200  # of the longer to the shorter side, as in `smart_resize`


class ImageHistory(NamedTuple):
    """The images that a row has been shown, in the order in which the model counts them; entry 0 of a video row is the video."""

    image: jax.Array  # int32 [..., M], index of the image, as in `Views`
    region: jax.Array  # int32 [..., M, 4], x1 y1 x2 y2 in the image
    size: jax.Array  # int32 [..., M, 2], (height, width) at which it was shown; of a video, that of its frames
    length: jax.Array  # int32 [...], number of entries


class Seen(NamedTuple):
    """The images that one row has been shown: the part of its state that tools can use."""

    history: ImageHistory
    is_video: jax.Array  # bool, the prompt shows the frames of a video
    image_sizes: jax.Array  # int32 [C, 2], (height, width) of the prompt's images or frames
    image_counts: jax.Array  # int32, number of the prompt's images or frames
    coordinates: jax.Array | int = Coordinates.EITHER  # int32, what boxes of calls are measured in


# Condition (bool []), outcome (None: the shared message), and the integers of its text.
Case: TypeAlias = tuple[AnyArray | bool, Outcome | None, Sequence[Any]]


class Answer(NamedTuple):
    """The outcome of a call, and the V views that it can show.

    The outcome is that of the first condition in `outcomes` that holds, or else `last`. None stands for the message that all
    tools share, for calls that cannot be carried out. Views are shown if the outcome shows images.
    """

    outcomes: Sequence[Case]
    last: tuple[Outcome, Sequence[Any]]  # outcome, and the integers of its text
    image: jax.Array  # int32 [V], index of the image, as in `Seen.history`
    region: jax.Array  # int32 [V, 4], x1 y1 x2 y2 in the image
    size: jax.Array  # int32 [V, 2], (height, width) at which the region is shown
    num_images: jax.Array | int = 1  # views that are shown, the first of V
    # int32 [2], (height, width) at which the model was shown the image that its boxes refer to. None: the image's own size.
    shown: jax.Array | None = None
    listed: Lists | None = None  # the integers of {list} in the outcome's text


def shown_size(region: jax.Array, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """Returns the size (height, width), int32 [..., 2], at which `region` [..., 4] is shown, and bool [...]: whether it can be.

    `sizes` are those of the tool's budget: `limits.sizes("crop")`, or `limits.sizes("select")`.

    It cannot where the rounded size exceeds the budget, or where a region is too long and thin (`MAX_RATIO`) or empty.
    """
    height, width = region[..., 3] - region[..., 1], region[..., 2] - region[..., 0]
    return fitted(jnp.stack([height, width], axis=-1), sizes)


def fitted(size: jax.Array, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """Returns the same as `shown_size` for images of `size` [..., 2]."""
    height, width = size[..., 0], size[..., 1]
    short, long = jnp.minimum(height, width), jnp.maximum(height, width)
    possible = (short > 0) & (long <= MAX_RATIO * short)
    height, width = jnp.where(possible, height, sizes.factor), jnp.where(possible, width, sizes.factor)
    size = jnp.stack(sizes.of(height, width), axis=-1)
    fits = (size[..., 0] * size[..., 1] <= sizes.max_pixels) & (jnp.max(size, axis=-1) <= sizes.max_side)
    return size, possible & fits


class Target(NamedTuple):
    """The image that a call names by its number."""

    image: jax.Array  # int32 [], index of the image
    region: jax.Array  # int32 [4], x1 y1 x2 y2 in the image
    size: jax.Array  # int32 [2], (height, width) at which the model was shown it
    outcomes: tuple[Case, ...]  # of calls with a number that no image has


def no_such_image(tool: str) -> tuple[Outcome, Outcome, Outcome]:
    """Returns the outcomes of a `tool` whose `target_image` is out of range, in the words of the released code.

    They are for rows about images, for rows about a video that has not been shown any frame alone, and for those that have.
    """
    error = f"\nExecution error:\nExecution Error: Incorrect `target_image` argument in `{tool}` operation. You can only pick "
    argument = ", but the current argument `target_image={1}`.\n"
    return (
        Outcome("no such image", error + "an image within [1,{0}]\n"),
        Outcome("no such frame", error + "an image **from** the video within [1,{0}]" + argument),
        Outcome("no such selection", error + "an image within range [2,{0}]" + argument),
    )


def find_target(number: Numbers, seen: Seen, missing: tuple[Outcome, Outcome, Outcome]) -> Target:
    """Finds the image of this number: one that was shown, or, before any frame was shown alone, a frame of the video.

    Args:
      number: [], as it was written, from 1.
      seen: what the row has been shown.
      missing: outcomes for numbers out of range (`no_such_image`).
    """
    history, video, target = seen.history, seen.is_video, number.signed_units
    fresh_video = video & (history.length == 1)
    low = jnp.where(video & ~fresh_video, 2, 1)
    high = jnp.where(fresh_video, seen.image_counts, history.length)
    in_range = (target >= low) & (target <= high)
    index = jnp.where(in_range, target, low) - 1
    frame = jnp.minimum(index, seen.image_sizes.shape[0] - 1)
    return Target(
        image=jnp.where(fresh_video, frame, history.image[index]),
        region=jnp.where(fresh_video, whole(seen.image_sizes[frame]), history.region[index]),
        size=history.size[jnp.where(fresh_video, 0, index)],
        outcomes=(
            (~number.integer, None, ()),
            (~in_range & ~video, missing[0], (history.length,)),
            (~in_range & fresh_video, missing[1], (seen.image_counts, target)),
            (~in_range, missing[2], (history.length, target)),
        ),
    )


def whole(size: AnyArray) -> jax.Array:
    """Returns the region of a whole image of `size` [..., 2]: int32 [..., 4]."""
    zeros = jnp.zeros_like(size)
    return jnp.concatenate([zeros, size[..., ::-1]], axis=-1)


def region_size(region: jax.Array) -> jax.Array:
    """Returns the (height, width) of a region [..., 4]: int32 [..., 2]."""
    return jnp.stack([region[..., 3] - region[..., 1], region[..., 2] - region[..., 0]], axis=-1)


def size_of_drawing(tool: Tool, arguments: Mapping[str, Any], size: jax.Array) -> jax.Array:
    """Returns the (height, width) of what `tool` draws from an image of `size`: int32 [2]."""
    return size if tool.drawn_size is None else tool.drawn_size(arguments, size)
