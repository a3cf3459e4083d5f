"""The shape that a question is asked in, and how much smaller its pictures have to be for it.

The original makes every picture smaller than its limits before it shows it, and cuts crops out of what is left (its
`max_pixels`): a picture that has to shrink for its room loses no more there than sides much longer than wide cost.
"""

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from pixel_jax.data.shapes import Measured, cover
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.ops import host_crop_resize, smart_resize
from pixel_jax.rollouts.config import FACTOR, PATCH, RolloutConfig
from pixel_jax.rollouts.prompts import PromptError, Query, prompt_tokens
from pixel_jax.rollouts.shapes import BatchShape, prompt_shape
from pixel_jax.tools import RELEASED, Tool

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


class Fitter(NamedTuple):
    """Finds the shapes that queries fit, and with how large pictures: by how they are written as prompts."""

    vocabulary: Vocabulary
    config: RolloutConfig
    guidelines: str = "vcot"
    tools: tuple[Tool, ...] = RELEASED

    def limits(self, query: Query) -> dict[str, int]:
        """Of the pixels of a picture of `query` as it is shown."""
        config = self.config
        if query.is_video:
            return {"min_pixels": config.video_min_pixels, "max_pixels": config.video_max_pixels}
        return {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}

    def fit(self, query: Query, room: BatchShape) -> Fit:
        """The largest pictures with which `query` fits `room`; of its images only the sizes are read.

        PromptError: too many images, too long a text, or pictures that no size lets in.
        """
        sizes = [image.shape[:2] for image in query.images]
        if len(sizes) > room.images:
            raise PromptError(f"{len(sizes)} images are more than the {room.images} there is room for")
        limits, vocabulary = self.limits(query), self.vocabulary
        scale = min((scale_for(size, room, self.config.max_side, limits) for size in sizes), default=1.0)
        most = min(room.tokens, self.config.max_tokens - 1)
        for _ in range(TRIES):
            sizes = [tuple(max(1, int(side * scale)) for side in image.shape[:2]) for image in query.images]
            outline = query._replace(images=[np.broadcast_to(np.uint8(0), (*size, 3)) for size in sizes])
            ids = prompt_tokens(outline, vocabulary, self.config, self.guidelines, self.tools)
            if len(ids) <= most:
                return Fit(scale, sizes, len(ids), sum(map(math.prod, shown(sizes, limits))) // PATCH**2)
            seen = ids.count(vocabulary.video_pad if query.is_video else vocabulary.image_pad)
            left = most - (len(ids) - seen)  # by the text
            if left <= 0:
                break
            # What is shown is never larger than its limit, whatever the picture is.
            held = min(1.0, math.sqrt(limits["max_pixels"] / max(h * w for h, w in sizes)))
            scale *= held * 0.99 * math.sqrt(left / seen)
        raise PromptError(f"a prompt of {len(ids)} tokens does not fit the width of {most}")

    def place(self, query: Query, shapes: Sequence[BatchShape]) -> Place:
        """The first of the shapes that holds `query` as it is; else the one that holds it with the largest pictures.

        PromptError: too many images, too long a text or too long a picture for every shape.
        """
        best, why = None, f"there is no room for {'videos' if query.is_video else 'pictures'}"
        for shape in shapes:
            if query.is_video != bool(shape.video):
                continue
            try:
                found = self.fit(query, shape)
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

    def measure(self, query: Query, by: Measured) -> Place:
        """What `query` takes in a shape of its own. Pictures are as they are, unless those of a batch take too much memory."""
        sizes = np.array([image.shape[:2] for image in query.images])
        height, width = sizes.max(axis=0).tolist() if len(sizes) else (1, 1)
        scale = min(1.0, math.sqrt(by.memory / (3 * max(1, len(sizes)) * height * width)))
        side = lambda length: max(1, int(length * scale))
        shape = functools.partial(prompt_shape, len(sizes), config=self.config, video=query.is_video)
        found = self.fit(query, shape(side(height), side(width), self.config.max_tokens))
        return Place(shape(*np.max(found.sizes, axis=0).tolist(), found.tokens), found)

    def places(
        self, queries: Sequence[Callable[[], Query]], shapes: Sequence[BatchShape] | Measured
    ) -> list[Place | ValueError]:
        """A place for each of the queries, of whose images the sizes are read; or why there is none."""
        find = self.measure if isinstance(shapes, Measured) else self.place

        def attempt(query: Callable[[], Query]) -> Place | ValueError:
            try:
                return find(query(), shapes)
            except ValueError as error:  # a PromptError, a file that cannot be read, sides that no size fits
                return error

        with ThreadPoolExecutor() as pool:
            found = list(pool.map(attempt, queries))
        return self.shared(found, shapes) if isinstance(shapes, Measured) else found

    def shared(self, found: Sequence[Place | ValueError], by: Measured) -> list[Place | ValueError]:
        """Places in shapes of their own, in as few as are worth their compilation."""
        needs = [x.shape for x in found if isinstance(x, Place)]
        shapes = cover(needs, by.cost, least=by.rows, most=FEW, gain=0.1)
        # A larger buffer may show more patches than any of the pictures that share it.
        shapes = [prompt_shape(x.images, x.height, x.width, x.tokens, self.config, video=bool(x.video)) for x in shapes]
        assigned = lambda x: x._replace(shape=next(shape for shape in shapes if shape.holds(x.shape)))
        return [assigned(x) if isinstance(x, Place) else x for x in found]


def shown(sizes: Sequence[tuple[int, int]], limits: dict[str, int]) -> list[tuple[int, int]]:
    return [smart_resize(*size, factor=FACTOR, **limits) for size in sizes]


def scale_for(size: tuple[int, int], room: BatchShape, max_side: int, limits: dict[str, int]) -> float:
    """How much smaller a picture of `size` (height, width) has to be for the room's buffer and for `max_side`."""
    height, width = size
    scale = min(1.0, room.height / height, room.width / width)
    held = (max(1, int(height * scale)), max(1, int(width * scale)))
    ((high, wide),) = shown([held], limits)
    if max(high, wide) > max_side:  # of one that is much longer than wide
        most = limits["max_pixels"]
        scale = min(scale, (most / (height * width)) ** 0.5) * (max_side - FACTOR) / max(high, wide)
    return scale


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [h, w, 3] at `size` (height, width)."""
    if image.shape[:2] == tuple(size):
        return image
    return host_crop_resize(image, (0, 0, image.shape[1], image.shape[0]), size)
