"""How large things are, before anything is compiled: a batch of rows, and all that is static about a rollout of them."""

from typing import NamedTuple

import jax

from pixel_jax.ops import most_pixels
from pixel_jax.rollouts.config import FACTOR, RolloutConfig
from pixel_jax.tools.tool import Tool


@jax.tree_util.register_static
class BatchShape(NamedTuple):
    """Room that every row of a batch has; or, of one example, what it takes. In a tree it is static, not a leaf."""

    tokens: (
        int  # of a prompt; of a trace, or the traces that are packed in a row; of a rollout's row, prompt and response
    )
    images: int  # pictures of a row: a prompt's images or frames, or all that is looked at in a row that is tuned on
    slices: int  # of them that the vision tower is given, two frames of a video together
    patches: int  # of one picture, as it is shown
    height: int = 0  # of the largest picture, in pixels. 0: the row holds patches, which were cut on the host
    width: int = 0
    video: bool = False  # whether prompts may be videos

    def holds(self, need: "BatchShape") -> bool:
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
    """Of prompts with at most so many images, or frames, of at most this size, and so many tokens.

    Args:
      video: whether any is about a video; still: whether any is about images. None: if none is about a video.
    """
    budgets = [""] * ((not video) if still is None else still) + ["video"] * video
    patches = max(most_patches((height, width), budget, config) for budget in budgets)
    return BatchShape(tokens, images, images, patches, height, width, video)


def most_patches(buffer: tuple[int, int], budget: str, config: RolloutConfig) -> int:
    """Of what is cut out of a buffer (height, width), within a budget: "crop", "select", "video"; "" of an image."""
    low, high = (getattr(config, f"{budget}{'_' if budget else ''}{bound}_pixels") for bound in ("min", "max"))
    return 4 * (most_pixels(*buffer, min_pixels=low, max_pixels=high) // FACTOR**2)


class RolloutShape(NamedTuple):
    """What is static about a rollout besides its config."""

    prompts: BatchShape
    tools: tuple[Tool, ...]
    shards: int  # parts of the mesh that rows are split over
    observed: int | None = None  # room for the patches of one image of an observation; None: the most the config allows

    @classmethod
    def of(cls, prompts: BatchShape, config: RolloutConfig, tools: tuple[Tool, ...], shards: int) -> "RolloutShape":
        """With no room in observations for what cannot be cut out of the prompts' images."""
        shape, buffer = cls(prompts, tools, shards), (prompts.height, prompts.width)
        if any(tool.picture for tool in shape.showing):
            return shape  # what the host returns may be larger than anything that can be cut out of the buffer
        if any(tool.draw is not None for tool in shape.showing):
            buffer = (max(buffer), max(buffer))  # what a tool has drawn may be as long either way
        return shape._replace(
            observed=max((most_patches(buffer, tool.budget, config) for tool in shape.showing), default=4)
        )

    @property
    def showing(self) -> tuple[Tool, ...]:
        """The tools that can show something here."""
        shows = lambda tool: any(x.images for x in tool.outcomes) and (self.prompts.video or not tool.of_videos)
        return tuple(filter(shows, self.tools))

    @property
    def views(self) -> int:
        """V, most images of one observation."""
        return max((outcome.images for tool in self.showing for outcome in tool.outcomes), default=1)


class Budget(NamedTuple):
    """Static bounds of what is shown: its area, its longest side, and the patches room is kept for."""

    max_pixels: int
    max_side: int
    patches: int

    @property
    def buffer(self) -> tuple[int, int]:
        """The smallest static buffer that holds every size within the budget, both sides multiples of `FACTOR`."""
        side = min(self.max_pixels // FACTOR, self.max_side)
        return side, side


def budgets(config: RolloutConfig, shape: RolloutShape) -> tuple[Budget, Budget]:
    """The budgets of what prompts show, images or frames of videos, and of observations."""
    observed = shape.observed
    if observed is None:
        observed = 4 * (max((budget_of(tool, config) for tool in shape.showing), default=FACTOR**2) // FACTOR**2)
    # Room of their own: a crop may show a quarter of what an overview does.
    return tuple(Budget(x // 4 * FACTOR**2, config.max_side, x) for x in (shape.prompts.patches, observed))


def budget_of(tool: Tool, config: RolloutConfig) -> int:
    """The largest area, in pixels, of a picture that `tool` shows."""
    return getattr(config, f"{tool.budget}_max_pixels")
