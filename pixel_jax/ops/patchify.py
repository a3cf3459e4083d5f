"""Images as the patches that a Qwen vision tower reads.

Frame patches stay uint8 until they enter the tower: a batch of them is an eighth of its float32 pixel values, in which
every frame of a still image would stand twice.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.arrays import AnyArray
from pixel_jax.ops.arguments import check_pixels, integers, is_concrete
from pixel_jax.ops.automatic import on_automatic_axes

PATCH = 14
MERGE = 2  # patches a side that the merger makes one token of
FRAME_PATCH = 3 * PATCH * PATCH
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, as in every Qwen2.5-VL checkpoint
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def patchify(image: AnyArray, size: AnyArray | Sequence[int], *, max_patches: int) -> jax.Array:
    """Cuts a frame into patches, in the order of the Qwen2-VL image processor: the 4 patches of a merged token in a row.

    Args:
      image: uint8 [H, W, 3], H and W multiples of 28; the frame fills its top left corner.
      size: int32 [2]: height and width of the frame in pixels, multiples of 28; traced or concrete.
      max_patches: static number of rows of the result.

    Returns:
      uint8 [max_patches, 588], each row (channel, 14, 14), zero from row height / 14 * width / 14 on. All are
      zero for a traced size that is no multiple of 28, exceeds the image or has more than `max_patches` patches.

    Raises:
      ValueError: a concrete size is such a one, or the image has another shape.
    """
    unit = PATCH * MERGE
    check_pixels("image", image)
    if image.ndim != 3 or image.shape[2] != 3 or image.shape[0] % unit or image.shape[1] % unit:
        raise ValueError(f"image must be [H, W, 3] with H and W multiples of {unit}, got {image.shape}")
    size = integers("size", size, 2)
    if is_concrete(size):
        height, width = (int(side) for side in np.asarray(size))
        if height < unit or width < unit or height % unit or width % unit:
            raise ValueError(f"size {(height, width)} is not made of positive multiples of {unit}")
        if height > image.shape[0] or width > image.shape[1]:
            raise ValueError(f"size {(height, width)} exceeds the image {image.shape[:2]}")
        if height * width > max_patches * PATCH * PATCH:
            raise ValueError(f"size {(height, width)} has more than {max_patches} patches")
    size = jnp.asarray(size, jnp.int32)
    return on_automatic_axes(functools.partial(_patchify, max_patches=max_patches), jnp.asarray(image), size)


def _patchify(image: jax.Array, size: jax.Array, max_patches: int) -> jax.Array:
    unit = PATCH * MERGE
    rows, columns = image.shape[0] // unit, image.shape[1] // unit
    # [rows, columns, MERGE, MERGE, 3, PATCH, PATCH], one leading index for each merged token of the whole canvas.
    patches = image.reshape(rows, MERGE, PATCH, columns, MERGE, PATCH, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    tokens = patches.reshape(rows * columns, MERGE * MERGE * FRAME_PATCH)

    height, width = size[0] // unit, size[1] // unit
    count = height * width
    fits = jnp.all((size > 0) & (size % unit == 0)) & (height <= rows) & (width <= columns)
    fits &= count * MERGE * MERGE <= max_patches
    group = jnp.arange(-(-max_patches // (MERGE * MERGE)), dtype=jnp.int32)
    source = group // jnp.maximum(width, 1) * columns + group % jnp.maximum(width, 1)
    valid = fits & (group < count)
    chosen = jnp.where(valid[:, None], tokens[jnp.where(valid, source, 0)], 0)
    return chosen.reshape(-1, FRAME_PATCH)[:max_patches]


def pixel_values(patches_a: jax.Array, patches_b: jax.Array) -> jax.Array:
    """Makes the input of the vision tower from two frames: rescaled to [0, 1], normalised, and interleaved.

    A still image is passed twice. The result is the `pixel_values` of the Hugging Face image processor, up to float32
    rounding.

    Args:
      patches_a: uint8 [..., P, 588], frame patches of the first frame of a temporal patch.
      patches_b: those of the second.

    Returns:
      float32 [..., P, 1176], each row (channel, frame, 14, 14).
    """
    for patches in (patches_a, patches_b):
        if patches.dtype != jnp.uint8 or patches.shape[-1] != FRAME_PATCH:
            raise ValueError(f"frame patches must be uint8 [..., {FRAME_PATCH}], got {patches.dtype} {patches.shape}")
    lead = patches_a.shape[:-1]
    frames = jnp.stack([patches.reshape(*lead, 3, PATCH * PATCH) for patches in (patches_a, patches_b)], axis=-2)
    # Rescaling and normalising in one multiplication and addition: within float32 rounding (3e-7) of doing them apart.
    scale = jnp.asarray(1 / (255 * np.array(IMAGE_STD)), jnp.float32)[:, None, None]
    shift = jnp.asarray(-np.array(IMAGE_MEAN) / np.array(IMAGE_STD), jnp.float32)[:, None, None]
    return (frames.astype(jnp.float32) * scale + shift).reshape(*lead, 2 * FRAME_PATCH)
