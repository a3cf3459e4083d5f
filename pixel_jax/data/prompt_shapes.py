"""The batch shape of each prompt, and how much smaller its images have to be for it.

The released code makes every image smaller than its limits before it shows it, and cuts crops out of the smaller image (its
`max_pixels`). So an image that is made smaller to fit a batch shape loses no more than it would there.
"""

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from pixel_jax.data.shapes import AutoShapes, cover
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.ops import Sizes, host_crop_resize
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.prompts import PromptError, Query, prompt_tokens
from pixel_jax.rollouts.shapes import BatchShape, prompt_shape
from pixel_jax.tools import RELEASED, Tool

Size = tuple[int, int]  # (height, width)

EMPTY_SIDE = 64  # pixels, of the image buffer of a prompt without images: every batch has one
MAX_TRIES = 8  # times that images are shrunk for a long question: the tokens of an image fall in steps
MAX_SHAPES = 2  # shapes for images, and as many for videos: a rollout takes long to compile


class ScaledPrompt(NamedTuple):
    """A prompt whose images are scaled to fit a batch shape."""

    scale: float  # of its images; 1: as they are
    sizes: list[Size]  # of its images, scaled
    tokens: int  # of the whole prompt
    patches: int  # of all images as they are shown

    def apply(self, query: Query) -> Query:
        """Scales the images of `query`."""
        images = [resized(image, size) for image, size in zip(query.images, self.sizes, strict=True)]
        return query._replace(images=images)


class Assignment(NamedTuple):
    """The batch shape that a prompt is asked in, and how the prompt fits it."""

    shape: BatchShape
    prompt: ScaledPrompt


class ShapeFinder(NamedTuple):
    """Finds batch shapes for queries. Only the sizes of their images are read."""

    vocabulary: Vocabulary
    config: RolloutConfig
    guidelines: str = "vcot"
    tools: tuple[Tool, ...] = RELEASED

    def sizes(self, query: Query) -> Sizes:
        """The sizes at which images of `query` are shown."""
        return self.config.sizes("video" if query.is_video else "")

    def scaled(self, query: Query, shape: BatchShape) -> ScaledPrompt:
        """Scales the images of `query` to the largest that fit `shape`.

        Raises:
            PromptError: the query has too many images, too long a text, or images that fit at no size.
        """
        sizes = [size_of(image) for image in query.images]
        if len(sizes) > shape.images:
            raise PromptError(f"{len(sizes)} images are more than the {shape.images} there is room for")
        limits, vocabulary = self.sizes(query), self.vocabulary
        scale = min((scale_for(size, shape, limits) for size in sizes), default=1.0)
        max_tokens, tokens = min(shape.tokens, self.config.max_tokens - 1), 0
        for _ in range(MAX_TRIES):
            sizes = [(scaled_side(h, scale), scaled_side(w, scale)) for h, w in map(size_of, query.images)]
            outline = query._replace(images=[np.broadcast_to(np.uint8(0), (*size, 3)) for size in sizes])
            ids = prompt_tokens(outline, vocabulary, self.config, self.guidelines, self.tools)
            tokens = len(ids)
            if tokens <= max_tokens:
                return ScaledPrompt(
                    scale, sizes, tokens, sum(map(math.prod, shown(sizes, limits))) // self.config.patch_size**2
                )
            image_tokens = ids.count(vocabulary.video_pad if query.is_video else vocabulary.image_pad)
            left = max_tokens - (tokens - image_tokens)  # tokens that the text leaves to images
            if left <= 0 or not image_tokens or limits.square:  # no image takes fewer tokens
                break
            # What is shown is never larger than its limit, whatever the image is.
            limit_scale = min(1.0, math.sqrt(limits.max_pixels / max(h * w for h, w in sizes)))
            scale *= limit_scale * 0.99 * math.sqrt(left / image_tokens)
        raise PromptError(f"a prompt of {tokens} tokens does not fit the width of {max_tokens}")

    def assign(self, query: Query, shapes: Sequence[BatchShape]) -> Assignment:
        """The first of the shapes that holds `query` as it is; else the one that holds it with the largest images.

        Raises:
            PromptError: no shape holds it. The reason is that of the last shape.
        """
        best, why = None, f"there is no room for {'videos' if query.is_video else 'pictures'}"
        for shape in shapes:
            if query.is_video != bool(shape.video):
                continue
            try:
                prompt = self.scaled(query, shape)
            except ValueError as error:
                why = str(error)
                continue
            if best is None or prompt.scale > best.prompt.scale:
                best = Assignment(shape, prompt)
            if prompt.scale == 1.0:
                break
        if best is None:
            raise PromptError(why)
        return best

    def assign_own(self, query: Query, auto: AutoShapes) -> Assignment:
        """A shape that holds `query` and no more. Its images are scaled only where those of a batch take too much memory."""
        sizes = np.array([size_of(image) for image in query.images])
        height, width = sizes.max(axis=0).tolist() if len(sizes) else (EMPTY_SIDE, EMPTY_SIDE)
        scale = min(1.0, math.sqrt(auto.memory / (3 * max(1, len(sizes)) * height * width)))

        def shape(height: int, width: int, tokens: int) -> BatchShape:
            return prompt_shape(max(1, len(sizes)), height, width, tokens, self.config, video=query.is_video)

        largest = shape(scaled_side(height, scale), scaled_side(width, scale), self.config.max_tokens)
        prompt = self.scaled(query, largest)
        height, width = np.max(prompt.sizes or [(height, width)], axis=0).tolist()
        return Assignment(shape(height, width, prompt.tokens), prompt)

    def assign_all(
        self, queries: Sequence[Callable[[], Query]], shapes: Sequence[BatchShape] | AutoShapes
    ) -> list[Assignment | ValueError]:
        """The shape of each query, or the error that says why it has none. `queries` are functions that return outlines."""
        if isinstance(shapes, AutoShapes):
            find = functools.partial(self.assign_own, auto=shapes)
        else:
            find = functools.partial(self.assign, shapes=shapes)

        def attempt(query: Callable[[], Query]) -> Assignment | ValueError:
            try:
                return find(query())
            except ValueError as error:  # a PromptError, a file that cannot be read, sides that no size fits
                return error

        with ThreadPoolExecutor() as pool:
            assigned = list(pool.map(attempt, queries))
        return self._merge_shapes(assigned, shapes) if isinstance(shapes, AutoShapes) else assigned

    def _merge_shapes(
        self, assigned: Sequence[Assignment | ValueError], auto: AutoShapes
    ) -> list[Assignment | ValueError]:
        """Assigns the same prompts to few shapes: as many as are worth their compilation."""
        needs = [x.shape for x in assigned if isinstance(x, Assignment)]
        shapes = cover(needs, auto.cost, least=auto.rows, most=MAX_SHAPES, gain=0.1)
        # A larger buffer may show more patches than any of the images that share it.
        shapes = [prompt_shape(x.images, x.height, x.width, x.tokens, self.config, video=bool(x.video)) for x in shapes]

        def merged(assignment: Assignment) -> Assignment:
            return assignment._replace(shape=next(shape for shape in shapes if shape.holds(assignment.shape)))

        return [merged(x) if isinstance(x, Assignment) else x for x in assigned]


def size_of(image: np.ndarray) -> Size:
    """Returns the (height, width) of an image, uint8 [h, w, 3]."""
    return image.shape[0], image.shape[1]


def scaled_side(length: int, scale: float) -> int:
    """Scales a side of `length` pixels, to at least one pixel."""
    return max(1, int(length * scale))


def shown(sizes: Sequence[Size], limits: Sizes) -> list[Size]:
    """The sizes at which images of these sizes are shown."""
    return [limits.of(*size) for size in sizes]


def scale_for(size: Size, shape: BatchShape, limits: Sizes) -> float:
    """The largest scale at which an image of `size` fits the shape's image buffer and is shown within the longest side."""
    height, width = size
    scale = min(1.0, shape.height / height, shape.width / width)
    ((high, wide),) = shown([(scaled_side(height, scale), scaled_side(width, scale))], limits)
    if max(high, wide) > limits.max_side:  # the image is much longer than wide
        least = min(scale, (limits.max_pixels / (height * width)) ** 0.5)
        scale = least * (limits.max_side - limits.factor) / max(high, wide)
    return scale


def resized(image: np.ndarray, size: Size) -> np.ndarray:
    """Resizes `image`, uint8 [h, w, 3], to `size`."""
    if image.shape[:2] == tuple(size):
        return image
    return host_crop_resize(image, (0, 0, image.shape[1], image.shape[0]), size)
