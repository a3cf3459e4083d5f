"""Static shapes of a batch of rows and of a rollout, which are known before anything is compiled."""

from typing import NamedTuple

import jax

from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.tools.tool import Tool


@jax.tree_util.register_static
class BatchShape(NamedTuple):
    """The shape of every row of a batch, or the shape that one example needs. In a pytree it is static, not a leaf."""

    # Of a prompt; of a trace, or of the traces packed in a row; of a row of a rollout, prompt and response together.
    tokens: int
    images: int  # pictures of a row: the images or frames of a prompt; in SFT all pictures that are shown
    slices: int  # temporal slices for the vision tower: images, and pairs of frames of videos
    patches: int  # of one picture, at the size at which it is shown
    height: int = 0  # of the largest picture, in pixels. 0: rows have patches, which were cut on the host
    width: int = 0
    video: bool = False  # whether prompts may be videos

    def holds(self, need: "BatchShape") -> bool:
        """Whether an example with the shape `need` fits."""
        return self.video == need.video and all(a >= b for a, b in zip(self[:6], need[:6], strict=True))

    def __str__(self) -> str:
        size = f" of {self.height} x {self.width} pixels" if self.height else ""
        picture = "picture" if self.images == 1 else "pictures"
        return f"{self.tokens} tokens and {self.images} {picture}{size}, {self.patches} patches each"


def prompt_shape(
    images: int,
    height: int,
    width: int,
    tokens: int,
    config: RolloutConfig,
    *,
    video: bool,
    still: bool | None = None,
) -> BatchShape:
    """Returns the shape of prompts of limited sizes.

    Args:
      images: the most images, or frames of a video, of a prompt.
      height: the largest height of an image, in pixels.
      width: the largest width.
      tokens: the most tokens.
      config: of the rollout.
      video: whether any prompt is about a video.
      still: whether any prompt is about images. None: if none is about a video.
    """
    budgets = [""] * ((not video) if still is None else still) + ["video"] * video  # prefixes of fields of the config
    patches = max(most_patches((height, width), budget, config) for budget in budgets)
    return BatchShape(tokens, images, images, patches, height, width, video)


def most_patches(buffer: tuple[int, int], budget: str, config: RolloutConfig) -> int:
    """Returns the most patches of a region of a buffer (height, width), within a budget: "crop", "select", "video" or ""."""
    return config.merge_unit * (config.sizes(budget).most(*buffer) // config.factor**2)


class RolloutShape(NamedTuple):
    """The static shape of a rollout, besides its config."""

    prompts: BatchShape
    tools: tuple[Tool, ...]
    shards: int  # data shards, which rows are split over
    observed: int | None = None  # the most patches of one image of an observation; None: as many as the config allows

    @classmethod
    def of(cls, prompts: BatchShape, config: RolloutConfig, tools: tuple[Tool, ...], shards: int) -> "RolloutShape":
        """Returns the shape, in which observations have no more patches than can be cut out of the prompts' images."""
        shape, buffer = cls(prompts, tools, shards), (prompts.height, prompts.width)
        if any(tool.picture for tool in shape.showing):
            return shape  # a picture from the host may be larger than any region of the buffer
        if any(tool.draw is not None for tool in shape.showing):
            buffer = (max(buffer), max(buffer))  # a tool may draw an image whose height is the longest width
        return shape._replace(
            observed=max(
                (most_patches(buffer, tool.budget, config) for tool in shape.showing), default=config.merge_unit
            )
        )

    @property
    def showing(self) -> tuple[Tool, ...]:
        """The tools that can show images of these prompts."""
        tools = (tool for tool in self.tools if self.prompts.video or not tool.of_videos)
        return tuple(tool for tool in tools if any(outcome.images for outcome in tool.outcomes))

    @property
    def views(self) -> int:
        """V, the most images of one observation."""
        return max((outcome.images for tool in self.showing for outcome in tool.outcomes), default=1)


class ViewBudget(NamedTuple):
    """Static bounds of the images that are shown: area, longest side, and number of patches."""

    max_pixels: int
    max_side: int
    patches: int
    patch_size: int = 14
    merge_size: int = 2
    square: int | None = None  # as in `RolloutConfig`

    @property
    def buffer(self) -> tuple[int, int]:
        """The smallest static buffer that holds every size within the budget, both sides multiples of those of a token."""
        factor = self.patch_size * self.merge_size
        side = min(self.max_pixels // factor, self.max_side // factor * factor)
        return side, side


def budgets(config: RolloutConfig, shape: RolloutShape) -> tuple[ViewBudget, ViewBudget]:
    """Returns the budgets of images (or frames) of prompts, and of images of observations.

    They differ, because a crop may have a quarter of the pixels of an overview.
    """
    observed, token, unit = shape.observed, config.factor**2, config.merge_unit
    if observed is None:
        observed = unit * (max((budget_of(tool, config) for tool in shape.showing), default=token) // token)
    prompt, observation = (
        ViewBudget(x // unit * token, config.sizes().max_side, x, config.patch_size, config.merge_size, config.square)
        for x in (shape.prompts.patches, observed)
    )
    return prompt, observation


def budget_of(tool: Tool, config: RolloutConfig) -> int:
    """Returns the largest area, in pixels, of an image that `tool` shows."""
    return config.sizes(tool.budget).max_pixels
