"""The paper's selection of frames, with the schema of the released checkpoints (Pixel Reasoner code, `experience_maker.py`)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from pixel_jax.tools.device import Answer, Seen, shown_size, whole
from pixel_jax.tools.tool import Integers, Outcome, Tool

if TYPE_CHECKING:
    from pixel_jax.rollouts.config import RolloutConfig

NAME = "select_frames"
MOST = 8  # frames that a call can show
SHOWN = Outcome("shown", "\nHere are the selected frames (Frame Size: {0}x{1}, Numbered {2} to {3}):", images=MOST)
ERROR = "\nExecution error:\nExecution Error: %s\n"
NO_VIDEO = Outcome(
    "no video",
    ERROR % "You attempted to `select_frames` from **image** not **video**. You should use `crop_image_normalized` "
    "instead for inspecting **image**.",
)
TOO_MANY = Outcome(
    "too many frames",
    ERROR
    % "You have selected {0} frames in total. Think again which frames you need to check in details (no more than 8 "
    "frames)",
)
OUT_OF_RANGE = Outcome(
    "out of range",
    ERROR % "There are {0} frames numbered in range [1,{0}]. Your selection `target_frames={list}` is out of range.",
)


def execute(arguments: Mapping[str, Any], seen: Seen, limits: "RolloutConfig") -> Answer:
    """Decides which frames are shown (`pixel_jax.tools.device`)."""
    frames, count = arguments["target_frames"]
    listed = jnp.arange(frames.shape[0]) < count
    in_range = jnp.all(~listed | ((frames >= 1) & (frames <= seen.image_counts)))
    chosen = jnp.clip(frames[:MOST] - 1, 0, seen.image_sizes.shape[0] - 1)
    region = whole(seen.image_sizes[chosen])
    size, fits = shown_size(region, limits.sizes("select"))
    first = seen.history.length
    return Answer(
        outcomes=(
            (~seen.is_video, NO_VIDEO, ()),
            (count == 0, None, ()),
            (count > MOST, TOO_MANY, (count,)),
            (~in_range, OUT_OF_RANGE, (seen.image_counts,)),
            (~jnp.all(fits | ~listed[:MOST]), None, ()),
        ),
        last=(SHOWN, (size[0, 1], size[0, 0], first, first + count - 1)),
        image=chosen,
        region=region,
        size=size,
        num_images=count,
        listed=arguments["target_frames"],
    )


SELECT_FRAMES = Tool(
    NAME,
    "Select frames from a video.",
    (
        Integers(
            "target_frames",
            "List of frame indices to select from the video (no more than 8 frames in total).",
            most=16,
            item_description="Frame index from 1 to 16.",
        ),
    ),
    outcomes=(SHOWN, NO_VIDEO, TOO_MANY, OUT_OF_RANGE),
    execute=execute,
    budget="select",
    of_videos=True,
    usage="`target_frames`, a list of one to eight frame numbers",
)
