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


def patchify(
    image: AnyArray,
    size: AnyArray | Sequence[int],
    *,
    max_patches: int,
    patch: int = PATCH,
    merge: int = MERGE,
) -> jax.Array:
    """Cuts a frame into patches, in the order of the Qwen2-VL image processor: the patches of a merged token in a row.

    Args:
      image: uint8 [H, W, 3], H and W multiples of patch * merge; the frame fills its top left corner.
      size: int32 [2]: height and width of the frame in pixels, multiples of patch * merge; traced or concrete.
      max_patches: static number of rows of the result.
      patch: pixels along a side of a patch.
      merge: patches along a side of a merged token.

    Returns:
      uint8 [max_patches, 3 * patch * patch], each row (channel, patch, patch), zero from the frame's last patch on. All are
      zero for a traced size that is no multiple of patch * merge, exceeds the image or has more than `max_patches` patches.

    Raises:
      ValueError: a concrete size is such a one, or the image has another shape.
    """
    unit = patch * merge
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
        if height * width > max_patches * patch * patch:
            raise ValueError(f"size {(height, width)} has more than {max_patches} patches")
    size = jnp.asarray(size, jnp.int32)
    cut = functools.partial(_patchify, max_patches=max_patches, patch=patch, merge=merge)
    return on_automatic_axes(cut, jnp.asarray(image), size)


def _patchify(image: jax.Array, size: jax.Array, max_patches: int, patch: int, merge: int) -> jax.Array:
    unit = patch * merge
    rows, columns = image.shape[0] // unit, image.shape[1] // unit
    # [rows, columns, merge, merge, 3, patch, patch], one leading index for each merged token of the whole buffer.
    patches = image.reshape(rows, merge, patch, columns, merge, patch, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    tokens = patches.reshape(rows * columns, merge * merge * 3 * patch * patch)

    height, width = size[0] // unit, size[1] // unit
    count = height * width
    fits = jnp.all((size > 0) & (size % unit == 0)) & (height <= rows) & (width <= columns)
    fits &= count * merge * merge <= max_patches
    group = jnp.arange(-(-max_patches // (merge * merge)), dtype=jnp.int32)
    source = group // jnp.maximum(width, 1) * columns + group % jnp.maximum(width, 1)
    valid = fits & (group < count)
    chosen = jnp.where(valid[:, None], tokens[jnp.where(valid, source, 0)], 0)
    return chosen.reshape(-1, 3 * patch * patch)[:max_patches]


def pixel_values(
    *frames: jax.Array,
    patch: int = PATCH,
    mean: tuple[float, float, float] = IMAGE_MEAN,
    std: tuple[float, float, float] = IMAGE_STD,
) -> jax.Array:
    """Makes the input of the vision tower from the frames of a temporal patch: rescaled to [0, 1], normalised, interleaved.

    A still image is passed as often as the temporal patch has frames. The result is the `pixel_values` of the Hugging Face
    image processor, up to float32 rounding.

    Args:
      frames: uint8 [..., P, 3 * patch * patch] each, the patches of the first frame, of the second, ...
      patch: pixels along a side of a patch.
      mean: of each channel, which is subtracted.
      std: of each channel, by which is divided.

    Returns:
      float32 [..., P, 3 * n * patch * patch] for n frames, each row (channel, frame, patch, patch).
    """
    size = 3 * patch * patch
    for patches in frames:
        if patches.dtype != jnp.uint8 or patches.shape[-1] != size:
            raise ValueError(f"frame patches must be uint8 [..., {size}], got {patches.dtype} {patches.shape}")
    lead = frames[0].shape[:-1]
    stacked = jnp.stack([patches.reshape(*lead, 3, patch * patch) for patches in frames], axis=-2)
    # Rescaling and normalising in one multiplication and addition: within float32 rounding (3e-7) of doing them apart.
    scale = jnp.asarray(1 / (255 * np.array(std)), jnp.float32)[:, None, None]
    shift = jnp.asarray(-np.array(mean) / np.array(std), jnp.float32)[:, None, None]
    return (stacked.astype(jnp.float32) * scale + shift).reshape(*lead, len(frames) * size)
