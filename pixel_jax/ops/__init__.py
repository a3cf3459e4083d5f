"""Pixels: cropping, resizing, frame selection and patches, each a pure function that works under `jit` and `vmap`."""

from pixel_jax.ops.crop_resize import crop_resize
from pixel_jax.ops.host_crop_resize import host_crop_resize
from pixel_jax.ops.patchify import FRAME_PATCH, IMAGE_MEAN, IMAGE_STD, MERGE, PATCH, patchify, pixel_values
from pixel_jax.ops.sizes import Sizes, square_window
from pixel_jax.ops.smart_resize import most_pixels, smart_resize
from pixel_jax.ops.video import gather_frames, sample_frames, temporal_slices, timestamps

__all__ = [
    "FRAME_PATCH",
    "IMAGE_MEAN",
    "IMAGE_STD",
    "MERGE",
    "PATCH",
    "Sizes",
    "crop_resize",
    "gather_frames",
    "host_crop_resize",
    "most_pixels",
    "patchify",
    "pixel_values",
    "sample_frames",
    "smart_resize",
    "square_window",
    "temporal_slices",
    "timestamps",
]
