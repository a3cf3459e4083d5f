"""Settings of a rollout. Defaults are the released recipe (Pixel Reasoner §4.2, App., and its code)."""

import dataclasses
from typing import Literal

from pixel_jax.config import positive

PATCH = 14  # pixels a side, Qwen2.5-VL
FACTOR = 28  # pixels a side of a merged token, which is 2 x 2 patches


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Settings of a rollout, static in compiled programs. Pixel budgets are areas, inclusive, before rounding to `FACTOR`."""

    group_size: int = 8  # rows of one prompt (n of the paper)
    temperature: float = 1.0  # 0 decodes greedily
    later_temperature: float | None = None  # after the first call; None: the same (the released code: 0.9)
    top_p: float = 0.95  # tokens are drawn from the likeliest whose probabilities add up to this; 1: off
    top_k: int = 40  # 0: off
    min_tokens: int = 1  # of one turn, before a token that ends it
    max_new_tokens: int = 2048  # of one turn
    max_calls: int = 4  # carried out; one more is counted and ends the row
    max_images: int = 16  # images of a row; a video counts as one
    # Prompt and response together: 12 * 1024 - 200, where the released loop stops a row. (Its training is shorter: `recipe`.)
    max_tokens: int = 12_088
    max_response: int = 10_000  # room kept for what follows the prompt, observations included
    min_pixels: int = 4 * FACTOR**2  # of an image, shown in at least this area
    max_pixels: int = 2000 * FACTOR**2  # of an image, at most
    crop_min_pixels: int = 4 * FACTOR**2  # of a crop, at least
    crop_max_pixels: int = 1000 * FACTOR**2  # of a crop, at most
    select_min_pixels: int = 4 * FACTOR**2  # of a selected frame, at least
    select_max_pixels: int = 400 * FACTOR**2  # of a selected frame, at most
    video_min_pixels: int = 4 * FACTOR**2  # of a frame of a video in the prompt, at least
    video_max_pixels: int = 512 * FACTOR**2  # of a frame of a video in the prompt, at most
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
    # Attention over prompts and images. None: chosen by size and platform, with memory linear in the number of patches.
    implementation: Literal["dense", "chunked", "kernel"] | None = None

    def __post_init__(self):
        if self.pad is not None and not 0 <= self.pad <= 1:
            raise ValueError(f"pad is a share of the image, in [0, 1]: {self.pad}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1]: {self.top_p}")
        positive(self, "group_size", "max_new_tokens", "max_tokens", "max_response", "max_side")
        positive(self, "in_flight", "observe_chunk", "tail_rows")
        for name in ("temperature", "top_k", "min_tokens", "max_calls", "max_images", "min_crop"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative: {getattr(self, name)}")
        for kind in ("", "crop_", "select_", "video_"):
            low, high = getattr(self, f"{kind}min_pixels"), getattr(self, f"{kind}max_pixels")
            if not 0 < low <= high:
                raise ValueError(f"{kind}min_pixels {low} and {kind}max_pixels {high} are not an interval")
