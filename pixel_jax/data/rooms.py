"""The shape that a question is asked in, and how much smaller its pictures have to be for it.

The original makes every picture smaller than its limits before it shows it, and cuts crops out of what is left (its
`max_pixels`): a picture that has to shrink for its room loses no more there than sides much longer than wide cost.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from pixel_jax.data.shapes import BatchShape, Measured, cover
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.ops import host_crop_resize, smart_resize
from pixel_jax.rollout.config import FACTOR, PATCH, RolloutConfig
from pixel_jax.rollout.machine import Shape
from pixel_jax.rollout.prompts import PromptError, Query, prompt_tokens

TRIES = 8  # to leave room for a long question: a picture's tokens fall in steps
FEW = 2  # shapes of questions about pictures, and as many of those about videos: a rollout takes long to compile


class Fit(NamedTuple):
    """What a query becomes in a room."""

    scale: float  # of its pictures; 1: as they are
    sizes: list[tuple[int, int]]  # (height, width) of each
    tokens: int  # of the prompt
    patches: int  # of all pictures as they are shown

    def apply(self, query: Query) -> Query:
        """`query` with its pixels at these sizes."""
        images = [resized(image, size) for image, size in zip(query.images, self.sizes, strict=True)]
        return query._replace(images=images)


class Place(NamedTuple):
    """Where a query is asked, and how it fits in there."""

    shape: BatchShape
    fit: Fit


def prompt_shape(
    images: int, height: int, width: int, tokens: int, config: RolloutConfig, *, video: bool
) -> BatchShape:
    """Of prompts with at most so many images, or frames, of at most this size, and so many tokens."""
    shape = Shape.of((height, width), config, 1, still=not video, video=video)
    return BatchShape(tokens, images, images, shape.patches, height, width, shape.views)


def limits_of(query: Query, config: RolloutConfig) -> dict[str, int]:
    """Of the pixels of a picture of `query` as it is shown."""
    if query.is_video:
        return {"min_pixels": config.video_min_pixels, "max_pixels": config.video_max_pixels}
    return {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}


def fit(query: Query, room: BatchShape, vocabulary: Vocabulary, config: RolloutConfig, guidelines: str = "vcot") -> Fit:
    """The largest pictures with which `query` fits `room`; of its images only the sizes are read.

    PromptError: too many images, too long a text, or pictures that no size lets in.
    """
    sizes = [image.shape[:2] for image in query.images]
    if len(sizes) > room.images:
        raise PromptError(f"{len(sizes)} images are more than the {room.images} there is room for")
    limits = limits_of(query, config)
    scale = min((scale_for(size, room, config.max_side, limits) for size in sizes), default=1.0)
    most = min(room.tokens, config.max_tokens - 1)
    for _ in range(TRIES):
        sizes = [tuple(max(1, int(side * scale)) for side in image.shape[:2]) for image in query.images]
        outline = query._replace(images=[np.broadcast_to(np.uint8(0), (*size, 3)) for size in sizes])
        ids = prompt_tokens(outline, vocabulary, config, guidelines)
        if len(ids) <= most:
            return Fit(scale, sizes, len(ids), sum(map(math.prod, shown(sizes, limits))) // PATCH**2)
        seen = ids.count(vocabulary.video_pad if query.is_video else vocabulary.image_pad)
        left = most - (len(ids) - seen)  # by the text
        if left <= 0:
            break
        # What is shown is never larger than its limit, whatever the picture is.
        scale *= (
            min(1.0, math.sqrt(limits["max_pixels"] / max(h * w for h, w in sizes))) * 0.99 * math.sqrt(left / seen)
        )
    raise PromptError(f"a prompt of {len(ids)} tokens does not fit the width of {most}")


def shown(sizes: Sequence[tuple[int, int]], limits: dict[str, int]) -> list[tuple[int, int]]:
    return [smart_resize(*size, factor=FACTOR, **limits) for size in sizes]


def scale_for(size: tuple[int, int], room: BatchShape, max_side: int, limits: dict[str, int]) -> float:
    """How much smaller a picture of `size` (height, width) has to be for the room's canvas and for `max_side`."""
    height, width = size
    scale = min(1.0, room.height / height, room.width / width)
    held = (max(1, int(height * scale)), max(1, int(width * scale)))
    ((high, wide),) = shown([held], limits)
    if max(high, wide) > max_side:  # of one that is much longer than wide
        most = limits["max_pixels"]
        scale = min(scale, (most / (height * width)) ** 0.5) * (max_side - FACTOR) / max(high, wide)
    return scale


def place(
    query: Query, shapes: Sequence[BatchShape], vocabulary: Vocabulary, config: RolloutConfig, guidelines: str = "vcot"
) -> Place:
    """The first of the shapes that holds `query` as it is; else the one that holds it with the largest pictures.

    PromptError: too many images, too long a text or too long a picture for every shape.
    """
    best, why = None, f"there is no room for {'videos' if query.is_video else 'pictures'}"
    for shape in shapes:
        if query.is_video != (shape.views > 1):
            continue
        try:
            found = fit(query, shape, vocabulary, config, guidelines)
        except ValueError as error:
            why = str(error)
            continue
        if best is None or found.scale > best.fit.scale:
            best = Place(shape, found)
        if found.scale == 1.0:
            break
    if best is None:
        raise PromptError(why)
    return best


def places(
    queries: Sequence[Callable[[], Query]],
    shapes: Sequence[BatchShape] | Measured,
    vocabulary: Vocabulary,
    config: RolloutConfig,
    guidelines: str = "vcot",
) -> list[Place | ValueError]:
    """A place for each of the queries, of whose images the sizes are read; or why there is none."""

    def attempt(find: Callable[[Query], Place]) -> Callable[[Callable[[], Query]], Place | ValueError]:
        def found(query: Callable[[], Query]) -> Place | ValueError:
            try:
                return find(query())
            except ValueError as error:  # a PromptError, a file that cannot be read, sides that no size fits
                return error

        return found

    with ThreadPoolExecutor() as pool:
        if not isinstance(shapes, Measured):
            return list(pool.map(attempt(lambda query: place(query, shapes, vocabulary, config, guidelines)), queries))
        own = list(pool.map(attempt(lambda query: measure(query, shapes, vocabulary, config, guidelines)), queries))
    needs = [x.shape for x in own if isinstance(x, Place)]
    found = cover(needs, shapes.cost, least=shapes.rows, most=FEW, gain=0.1)
    # A larger canvas may show more patches than any of the pictures that share it.
    found = [prompt_shape(x.images, x.height, x.width, x.tokens, config, video=x.views > 1) for x in found]

    def assigned(x: Place) -> Place:
        return x._replace(shape=next(shape for shape in found if shape.holds(x.shape)))

    return [assigned(x) if isinstance(x, Place) else x for x in own]


def measure(
    query: Query, by: Measured, vocabulary: Vocabulary, config: RolloutConfig, guidelines: str = "vcot"
) -> Place:
    """What `query` takes in a shape of its own. Pictures are as they are, unless those of a batch take too much memory."""
    sizes = np.array([image.shape[:2] for image in query.images])
    height, width = sizes.max(axis=0).tolist() if len(sizes) else (1, 1)
    scale = min(1.0, math.sqrt(by.memory / (3 * max(1, len(sizes)) * height * width)))
    side = lambda length: max(1, int(length * scale))
    room = prompt_shape(len(sizes), side(height), side(width), config.max_tokens, config, video=query.is_video)
    found = fit(query, room, vocabulary, config, guidelines)
    height, width = np.max(found.sizes, axis=0).tolist()
    return Place(prompt_shape(len(sizes), height, width, found.tokens, config, video=query.is_video), found)


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [h, w, 3] at `size` (height, width)."""
    if image.shape[:2] == tuple(size):
        return image
    return host_crop_resize(image, (0, 0, image.shape[1], image.shape[0]), size)
