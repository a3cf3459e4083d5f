"""The paper's crop, with the schema of the released checkpoints (Pixel Reasoner code, `experience_maker.py`).

Three faults of the released code are mended: a coordinate of exactly 1 is relative, indices below 1 are out of range, and crops
are cut from the full-resolution image.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pixel_jax.tools.boxes import box_in_region
from pixel_jax.tools.device import Answer, Seen, find_target, no_such_image, region_size, shown_size
from pixel_jax.tools.tool import IN_SHARES, Box, Number, Outcome, Tool

if TYPE_CHECKING:
    from pixel_jax.rollouts.config import RolloutConfig

NAME = "crop_image_normalized"
SHOWN = Outcome("shown", "\nHere is the cropped image (Image Size: {0}x{1}):", images=1)
TOO_SMALL = Outcome("too small", "\nExecution error:\nCropped image is too small: {0}x{1}\n")
MISSING = no_such_image(NAME)


def execute(arguments: Mapping[str, Any], seen: Seen, limits: "RolloutConfig") -> Answer:
    """Decides what a crop shows (`pixel_jax.tools.device`)."""
    assert limits.pad is not None  # where a config leaves it open, it is the call format's
    target = find_target(arguments["target_image"], seen, MISSING)
    region = box_in_region(
        arguments["bbox_2d"],
        target.region,
        target.size,
        coordinates=seen.coordinates,
        pad=limits.pad,
        one_is_absolute=limits.one_is_absolute,
    )
    height, width = region_size(region)
    size, fits = shown_size(region, limits.sizes("crop"))
    small = (width <= limits.min_crop) | (height <= limits.min_crop)
    return Answer(
        outcomes=(
            *target.outcomes,
            ((width < 0) | (height < 0), None, ()),
            (small, TOO_SMALL, (width, height)),
            (~fits, None, ()),
        ),
        last=(SHOWN, (size[1], size[0], seen.history.length - 1, seen.history.length)),
        image=target.image[None],
        region=region[None],
        size=size[None],
    )


CROP_IMAGE = Tool(
    NAME,
    "Zoom in on the image based on the bounding box coordinates. It is useful when the object or text in the image is "
    "too small to be seen.",
    (
        Box(
            "bbox_2d",
            "coordinates for bounding box of the area you want to zoom in. " + IN_SHARES,
        ),
        Number(
            "target_image",
            "The index of the image to crop. Index from 1 to the number of images. Choose 1 to operate on original image.",
        ),
    ),
    outcomes=(SHOWN, *MISSING, TOO_SMALL),
    execute=execute,
    usage="`bbox_2d`, four numbers [x1, y1, x2, y2], and `target_image`, the number of an image",
)
