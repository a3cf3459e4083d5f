"""Makes the input of a rollout from questions and images."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from pixel_jax.dialog import template
from pixel_jax.dialog.call_parser import call_parser, token_table
from pixel_jax.dialog.formats import PIXEL_REASONER, CallFormat, call_format
from pixel_jax.dialog.grammar import Language
from pixel_jax.dialog.observations import Observations
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.ops import timestamps
from pixel_jax.rollouts.checks import check_device_tool
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.images import ragged
from pixel_jax.rollouts.shapes import BatchShape, prompt_shape
from pixel_jax.rollouts.trajectory import HostPrompts, Tables
from pixel_jax.tools import RELEASED, Tool, ToolError


class Query(NamedTuple):
    """A question about images, or about the frames of one video. Images are uint8 [h, w, 3]."""

    question: str
    images: Sequence[np.ndarray]
    is_video: bool = False
    seconds: float = 1.0  # of the video that two frames cover
    text_first: bool = False  # whether the images follow the question, as in the released traces


class PromptError(ValueError):
    """Raised for a query that cannot become a prompt; the message names it and the value at fault."""


def tables(vocabulary: Vocabulary, tools: tuple[Tool, ...] = RELEASED, calls: CallFormat = PIXEL_REASONER) -> Tables:
    """Makes the tables of a tokenizer, tools and a call format for compiled programs. Make them once and share them.

    Raises:
      ToolError: the tools cannot be used, or not together; the message names them.
    """
    language = Language(tools, calls)
    for tool in tools:
        if not tool.host:
            check_device_tool(tool)
    return Tables(
        bytes=token_table(vocabulary),
        observations=Observations.of(vocabulary, tools, calls),
        stop=jnp.array([vocabulary.im_end, vocabulary.end_of_text], jnp.int32),
        parser=call_parser(language),
    )


def prompt_tokens(
    query: Query,
    vocabulary: Vocabulary,
    config: RolloutConfig,
    guidelines: str = "vcot",
    tools: tuple[Tool, ...] = RELEASED,
) -> list[int]:
    """Returns the token ids of a prompt: system message, question with the pads of its images, and the beginning of the answer.

    Raises:
      PromptError: an image has another type, or cannot be shown within the limits.
    """
    if query.images and not config.max_images:
        raise PromptError(f"the question {query.question!r} has images, of which a row may have none (max_images is 0)")
    if not query.images and config.max_images:
        raise PromptError(f"the question {query.question!r} comes without an image or frame")
    media, pads = shown_media(query, config)
    guidelines, tools = offered(guidelines, tools, config)
    messages = template.first_messages(
        query.question,
        media,
        guidelines=guidelines,
        tools=tools,
        call_format=call_format(config.call_format),
        text_first=query.text_first,
    )
    pieces = with_times(template.render(messages, layout=vocabulary.layout), query, config)
    return template.to_ids(pieces, vocabulary, pads)


def with_times(pieces: list[template.Piece], query: Query, config: RolloutConfig) -> list[template.Piece]:
    """A rendered dialog about `query`, with each temporal patch of its video behind its time where the model has it so."""
    if not (query.is_video and config.split_videos):
        return pieces
    return template.in_patches(pieces, timestamps(len(query.images), fps=2 / query.seconds))


def offered(guidelines: str, tools: tuple[Tool, ...], config: RolloutConfig) -> tuple[str, tuple[Tool, ...]]:
    """The guidelines that a prompt has, and the tools that it tells of.

    Where rows have no images (`max_images` is 0), tools that look at them and guidelines that speak of them are left out.
    """
    if not config.max_images:
        tools = tuple(tool for tool in tools if tool.host)
        guidelines = "default" if tools and guidelines != "notool" else "notool"
    return guidelines, () if guidelines == "notool" else tools


def shown_media(query: Query, config: RolloutConfig) -> tuple[list[template.Media], list[int]]:
    """The images of a query, or its one video, and how many pad tokens stand for each, or for each temporal patch.

    Raises:
      PromptError: they cannot be shown.
    """
    for i, image in enumerate(query.images):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise PromptError(
                f"image {i + 1} of {query.question!r} is {image.dtype} {image.shape}, not uint8 [h, w, 3]"
            )
    pads = []
    kind = "video" if query.is_video else "image"
    sizes = config.sizes("video" if query.is_video else "")
    for i, image in enumerate(query.images):
        try:
            height, width = sizes.of(*image.shape[:2])
        except ValueError as error:  # it is much longer than wide
            raise PromptError(f"{kind} {i + 1} of {query.question!r} cannot be shown: {error}: crop it first") from None
        if height * width > sizes.max_pixels or max(height, width) > sizes.max_side:
            raise PromptError(
                f"{kind} {i + 1} of {query.question!r} is {image.shape[1]}x{image.shape[0]} pixels and would be shown at "
                f"{width}x{height}, over the limit of {sizes.max_pixels} pixels or {sizes.max_side} a side: crop it first"
            )
        pads.append(height * width // config.factor**2)
    media = [template.Media(kind, None)] * len(query.images)
    if query.is_video:
        if len({image.shape for image in query.images}) > 1:
            raise PromptError(f"the frames of {query.question!r} differ in size")
        slices = -(-len(query.images) // 2)
        media, pads = media[:1], pads[:1] * slices if config.split_videos else [pads[0] * slices]
    return media, pads


def build_prompts(
    queries: Sequence[Query],
    vocabulary: Vocabulary,
    token_tables: Tables,
    config: RolloutConfig,
    *,
    shape: BatchShape | None = None,
    uids: Sequence[int] | None = None,
    guidelines: str = "vcot",
) -> HostPrompts:
    """Makes one batch of static shape from B queries.

    Args:
      queries: the questions with their images.
      vocabulary: of the tokenizer.
      token_tables: of the tokenizer and the tools (`tables`).
      config: of the rollout.
      shape: the batch shape (`prompt_shape`), the same in all processes; pass it to share one compilation among batches.
        None: the tokens are rounded up to a multiple of 32, the sides of images to one of 64.
      uids: integers from which the random keys of rows are derived; None: 0, 1, ...
      guidelines: a key of `dialog.GUIDELINES`.

    Raises:
      PromptError: a query cannot be shown, or does not fit the shape.
      ToolError: the tables have another call format than the config.
    """
    ids = [prompt_tokens(query, vocabulary, config, guidelines, token_tables.tools) for query in queries]
    return place_prompts(queries, ids, token_tables, config, shape=shape, uids=uids)


def place_prompts(
    queries: Sequence[Query],
    ids: Sequence[list[int]],
    token_tables: Tables,
    config: RolloutConfig,
    *,
    shape: BatchShape | None = None,
    uids: Sequence[int] | None = None,
) -> HostPrompts:
    """Makes one batch of B queries whose prompts are given as token ids; queries may have no images.

    Args:
      queries: the questions with their images.
      ids: token ids of each prompt.
      token_tables: as for `build_prompts`.
      config: as for `build_prompts`.
      shape: as for `build_prompts`.
      uids: as for `build_prompts`.

    Returns:
      The batch.

    Raises:
      PromptError: a query does not fit the shape.
      ToolError: the tables have another call format than the config.
    """
    check_format(token_tables, config)
    shape = fit_shape(queries, ids, config, shape)
    batch = len(queries)
    tokens = np.zeros((batch, shape.tokens), np.int32)
    sizes = np.zeros((batch, shape.images, 2), np.int32)
    for b, (query, row) in enumerate(zip(queries, ids, strict=True)):
        tokens[b, : len(row)] = row
        for i, image in enumerate(query.images):
            sizes[b, i] = image.shape[:2]
    return HostPrompts(
        tokens=tokens,
        length=np.array([len(row) for row in ids], np.int32),
        images=ragged(query.images for query in queries),
        image_sizes=sizes,
        image_counts=np.array([len(query.images) for query in queries], np.int32),
        is_video=np.array([query.is_video for query in queries]),
        seconds=np.array([query.seconds if query.is_video else 0.0 for query in queries], np.float32),
        uid=np.arange(batch, dtype=np.int32) if uids is None else np.asarray(uids, np.int32),
        tables=token_tables,
        shape=shape,
    )


def fit_shape(
    queries: Sequence[Query], ids: Sequence[list[int]], config: RolloutConfig, shape: BatchShape | None
) -> BatchShape:
    """Checks that queries with the token ids `ids` fit `shape`, or, if that is None, makes a shape for them.

    Raises:
      PromptError: they do not fit.
    """
    up = lambda value, step: -(-value // step) * step
    # Where no prompt has an image, each has one empty buffer, so that all arrays have the same axes.
    longest, images = max(map(len, ids)), max(1, *(len(query.images) for query in queries))
    height, width = (max((image.shape[i] for query in queries for image in query.images), default=1) for i in (0, 1))
    kinds = {"video": any(query.is_video for query in queries), "still": not all(query.is_video for query in queries)}
    shape = shape or prompt_shape(images, up(height, 64), up(width, 64), up(longest, 32), config, **kinds)
    if longest > shape.tokens:
        raise PromptError(f"a prompt of {longest} tokens does not fit the width of {shape.tokens}")
    if longest >= config.max_tokens:
        raise PromptError(f"a prompt of {longest} tokens leaves nothing of the {config.max_tokens} a row may have")
    if images > shape.images or height > shape.height or width > shape.width:
        raise PromptError(f"{images} images of up to {width}x{height} pixels do not fit {shape}")
    need = prompt_shape(shape.images, shape.height, shape.width, shape.tokens, config, **kinds)
    if need.video > shape.video or need.patches > shape.patches:
        what = " and ".join(["a video"] * kinds["video"] + ["pictures"] * kinds["still"])
        raise PromptError(f"{what} shown with up to {need.patches} patches do not fit {shape}, videos {shape.video}")
    return shape


def check_format(token_tables: Tables, config: RolloutConfig) -> None:
    """Checks that the tables have the call format of the config.

    Raises:
      ToolError: they have another one.
    """
    read = token_tables.parser.language.format
    if call_format(config.call_format) is not read:
        raise ToolError(
            f"the config's call format is {config.call_format!r}, the tables were built for {read.name!r}: give "
            "`tables` the config's"
        )
