"""Settings of a rollout. Defaults are the released recipe (Pixel Reasoner §4.2, App., and its code)."""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from pixel_jax.config import positive

if TYPE_CHECKING:  # importing them takes seconds, and configurations are read by commands that need no model
    from pixel_jax.models.config import ModelConfig
    from pixel_jax.ops import Sizes

GRID = (1, 2, 2)  # of any image, in patches
TOKEN_PIXELS = 28**2  # of a visual token of Qwen2.5-VL: the unit of the released budgets


@dataclasses.dataclass(frozen=True)
class RolloutBudget:
    """What ends a call of a rollout before all its rows are done: whichever of the limits is reached first."""

    tokens: int | None = None  # that a slot writes in a call, without observations and prompts. None: no limit
    # Of the rows that the call begins with unfinished, the share after whose end it stops, in (0, 1]. None: no limit.
    share: float | None = None

    def __post_init__(self):
        if self.tokens is not None and (type(self.tokens) is not int or self.tokens < 1):
            raise ValueError(f"a rollout budget of {self.tokens!r} tokens: give a whole number of at least 1, or None")
        share = self.share
        if share is not None and (type(share) not in (int, float) or not 0 < share <= 1):
            raise ValueError(f"a rollout budget of the share {share!r} of the rows: give a number in (0, 1], or None")

    @property
    def limits(self) -> bool:
        """Whether there is any limit."""
        return self.tokens is not None or self.share is not None


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Settings of a rollout, static in compiled programs. Pixel budgets are areas, inclusive, before rounding to `factor`."""

    group_size: int = 8  # rows of one prompt (n of the paper)
    temperature: float = 1.0  # 0 decodes greedily
    later_temperature: float | None = None  # after the first call; None: the same (the released code: 0.9)
    top_p: float = 0.95  # tokens are drawn from the likeliest whose probabilities add up to this; 1: off
    top_k: int = 40  # 0: off
    min_tokens: int = 1  # of one turn, before a token that ends it
    max_new_tokens: int = 2048  # of one turn
    max_calls: int = 4  # carried out; one more is counted and ends the row
    max_images: int = 16  # images of a row; a video counts as one. 0: prompts are text only
    # Prompt and response together: 12 * 1024 - 200, where the released loop stops a row. (Its training is shorter: `recipe`.)
    max_tokens: int = 12_088
    max_response: int = 10_000  # capacity for the tokens after the prompt, observations included
    min_pixels: int = 4 * TOKEN_PIXELS  # of an image, shown in at least this area
    max_pixels: int = 2000 * TOKEN_PIXELS  # of an image, at most
    crop_min_pixels: int = 4 * TOKEN_PIXELS  # of a crop, at least
    crop_max_pixels: int = 1000 * TOKEN_PIXELS  # of a crop, at most
    select_min_pixels: int = 4 * TOKEN_PIXELS  # of a selected frame, at least
    select_max_pixels: int = 400 * TOKEN_PIXELS  # of a selected frame, at most
    video_min_pixels: int = 4 * TOKEN_PIXELS  # of a frame of a video in the prompt, at least
    video_max_pixels: int = 512 * TOKEN_PIXELS  # of a frame of a video in the prompt, at most
    patch_size: int = 14  # of the model's vision tower, as is the next (`for_model`); pixels along a side
    merge_size: int = 2  # patches along a side of a visual token
    # Pixels along a side of every picture, where the model's vision tower has one size (`for_model`): the middle of an image, of
    # which the shorter side is resized to this, whatever the budgets are. None: sizes within the budgets.
    square: int | None = None
    # Whether each temporal patch of a video is an item of its own behind its time in the text (`for_model`).
    split_videos: bool = False
    max_side: int = 3584  # longest side of any image that is shown, in pixels
    pad: float | None = None  # added on each side of a box, as a share of the image; None: what the call format says
    min_crop: int = 28  # a crop must have more pixels than this on both sides, before it is resized
    call_format: str = "pixel_reasoner"  # how calls are written: a name of `pixel_jax.dialog.formats`, or module:name
    one_is_absolute: bool = False  # the released code reads a box with a coordinate of exactly 1 as pixels
    blank: bool = False  # operations show uniformly grey images: to measure whether the model uses them
    # Prompts whose rows are written at the same time; the others wait for slots of rows that finish. None: all, or as many as fit
    # into the devices' memory.
    in_flight: int | None = None
    observe_chunk: int = 8  # waiting rows (per data shard) whose images are cropped and encoded at a time
    # For CPUs, where decoding is bound by computation: all rows end their turns before any is answered, and once no more than
    # this (per data shard) are writing, only those are computed. None: rows are answered while others write
    # (`decode_loop.writes_on`).
    tail_rows: int | None = None
    # Eight bits, for rollouts that wait for memory, with a scale for each output channel (`models.int8`): of the layers' weights
    # while rows are written. Prompts, the embedding and the head stay as they are. The policy that writes then differs a little
    # from the one that is trained: `loss.importance_cap` corrects it, and the metric `sampler_trainer_mismatch` shows it. None:
    # the type of the model.
    weights: Literal["int8"] | None = None
    # The same for the rows' own keys and values, with a scale for each head and token; those of prompts keep the model's type.
    caches: Literal["int8"] | None = None
    # Attention over prompts and images. None: chosen by size and platform, with memory linear in the number of patches.
    implementation: Literal["dense", "chunked", "kernel"] | None = None

    def __post_init__(self):
        if self.pad is not None and not 0 <= self.pad <= 1:
            raise ValueError(f"pad is a share of the image, in [0, 1]: {self.pad}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1]: {self.top_p}")
        positive(self, "group_size", "max_new_tokens", "max_tokens", "max_response", "max_side")
        positive(self, "in_flight", "observe_chunk", "tail_rows", "patch_size", "merge_size", "square")
        for name in ("temperature", "top_k", "min_tokens", "max_calls", "max_images", "min_crop"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative: {getattr(self, name)}")
        for kind in ("", "crop_", "select_", "video_"):
            low, high = getattr(self, f"{kind}min_pixels"), getattr(self, f"{kind}max_pixels")
            if not 0 < low <= high:
                raise ValueError(f"{kind}min_pixels {low} and {kind}max_pixels {high} are not an interval")

    @property
    def factor(self) -> int:
        """Pixels along a side of a visual token: the sides of what is shown are multiples of it."""
        return self.patch_size * self.merge_size

    @property
    def merge_unit(self) -> int:
        """Patches of a visual token."""
        return self.merge_size**2

    @property
    def patch_bytes(self) -> int:
        """Bytes of a patch of one frame."""
        return 3 * self.patch_size**2

    def sizes(self, kind: str = "") -> "Sizes":
        """Returns the sizes at which images of a kind are shown: "" (of the prompt), "video", or a `Tool.budget`."""
        from pixel_jax.ops import Sizes

        if self.square is not None:
            return Sizes(self.factor, self.square**2, self.square**2, self.square, square=True)
        low, high = (getattr(self, f"{kind}{'_' if kind else ''}{bound}_pixels") for bound in ("min", "max"))
        return Sizes(self.factor, low, high, self.max_side)

    def for_model(self, network: "ModelConfig") -> "RolloutConfig":
        """Returns these settings with what a model's vision tower takes; without one, rows have no images."""
        if network.vision is None:
            return dataclasses.replace(self, max_images=0)
        return dataclasses.replace(self, **_settings_of(network))

    def check_model(self, network: "ModelConfig", *, videos: bool) -> None:
        """Checks that a model sees what these settings show.

        Raises:
            ValueError: it has other patches, or no vision tower for videos as one item.
        """
        vision = network.vision
        if vision is None and self.max_images:
            raise ValueError(
                f"a model of the family {network.model_type!r} sees no images, but rows may have {self.max_images}: take "
                "config.for_model(model.config), which sets max_images to 0"
            )
        needed = {} if vision is None else _settings_of(network)
        if wrong := {name: getattr(self, name) for name, value in needed.items() if getattr(self, name) != value}:
            has, needs = (", ".join(f"{name}={values[name]}" for name in wrong) for values in (wrong, needed))
            raise ValueError(f"the rollout has {has}; the model needs {needs}: take config.for_model(model.config)")
        if vision is not None and vision.token_grid(GRID) != GRID:
            raise ValueError(
                f"this model of the family {network.model_type!r} reads the class token beside the patches "
                "(vision_feature_select_strategy 'full'), which rollouts do not show"
            )
        if videos and len(network.placeholders) < 2:
            raise ValueError(f"the family {network.model_type!r} sees images and no videos: ask about their frames")


def _settings_of(network: "ModelConfig") -> dict[str, Any]:
    """Returns the fields that follow from what a model with a vision tower takes."""
    vision = network.vision
    assert vision is not None
    return {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "square": None if vision.fixed_grid is None else vision.fixed_grid[0] * vision.patch_size,
        "split_videos": network.splits_videos,
    }
