"""The static room of a prompt, and how much smaller its pictures have to be for it.

The original makes every picture smaller than its limits before it shows it, and cuts crops out of what is left (its
`max_pixels`): a picture that has to shrink for its room loses no more there than sides much longer than wide cost.
"""

import math
from typing import NamedTuple

import numpy as np

from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.ops import host_crop_resize, smart_resize
from pixel_jax.rollout.config import FACTOR, RolloutConfig
from pixel_jax.rollout.prompts import PromptError, Query, prompt_tokens
from pixel_jax.tools import RELEASED, Tool

TRIES = 8  # to leave room for a long question: a picture's tokens fall in steps


class Room(NamedTuple):
    images: int
    height: int  # of the largest picture
    width: int
    tokens: int  # of the prompt


class Fit(NamedTuple):
    """What a query becomes in a room."""

    scale: float  # of its pictures; 1: as they are
    sizes: list[tuple[int, int]]  # (height, width) of each

    def apply(self, query: Query) -> Query:
        """`query` with its pixels at these sizes."""
        images = [resized(image, size) for image, size in zip(query.images, self.sizes, strict=True)]
        return query._replace(images=images)


def fit(
    query: Query,
    room: Room,
    vocabulary: Vocabulary,
    config: RolloutConfig,
    guidelines: str = "vcot",
    tools: tuple[Tool, ...] = RELEASED,
) -> Fit:
    """The largest pictures with which `query` fits `room`; of its images only the sizes are read.

    PromptError: too many images, too long a text, or pictures that no size lets in.
    """
    sizes = [image.shape[:2] for image in query.images]
    if len(sizes) > room.images:
        raise PromptError(f"{len(sizes)} images are more than the {room.images} there is room for")
    scale = min((scale_for(size, room, config, query.is_video) for size in sizes), default=1.0)
    most = min(room.tokens, config.max_tokens - 1)
    for _ in range(TRIES):
        found = Fit(scale, [tuple(max(1, int(side * scale)) for side in size) for size in sizes])
        outline = query._replace(images=[np.broadcast_to(np.uint8(0), (*size, 3)) for size in found.sizes])
        ids = prompt_tokens(outline, vocabulary, config, guidelines, tools)
        if len(ids) <= most:
            return found
        seen = ids.count(vocabulary.video_pad if query.is_video else vocabulary.image_pad)
        left = most - (len(ids) - seen)  # by the text
        if left <= 0:
            break
        # What is shown is never larger than its limit, whatever the picture is.
        limit = config.video_max_pixels if query.is_video else config.max_pixels
        scale *= min(1.0, math.sqrt(limit / max(h * w for h, w in found.sizes))) * 0.99 * math.sqrt(left / seen)
    raise PromptError(f"a prompt of {len(ids)} tokens does not fit the width of {most}")


def scale_for(size: tuple[int, int], room: Room, config: RolloutConfig, is_video: bool) -> float:
    """How much smaller a picture of `size` (height, width) has to be for the room's canvas and for `max_side`."""
    low, high = config.min_pixels, config.max_pixels
    if is_video:
        low, high = config.video_min_pixels, config.video_max_pixels
    height, width = size
    scale = min(1.0, room.height / height, room.width / width)
    held = (max(1, int(height * scale)), max(1, int(width * scale)))
    shown = smart_resize(*held, min_pixels=low, max_pixels=high, factor=FACTOR)
    if max(shown) > config.max_side:  # of one that is much longer than wide
        scale = min(scale, (high / (height * width)) ** 0.5) * (config.max_side - FACTOR) / max(shown)
    return scale


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [h, w, 3] at `size` (height, width)."""
    if image.shape[:2] == tuple(size):
        return image
    return host_crop_resize(image, (0, 0, image.shape[1], image.shape[0]), size)
