"""`crop_resize` on the host: the same bits from NumPy, without a device and without a compilation for each size.

Instruction tuning must see the same pixels as a rollout, whatever release of Pillow is installed. Pillow 13 changed the order
of its two passes, between which the image is rounded to 8 bits; so Pillow itself is not used.
"""

from collections.abc import Sequence

import numpy as np

from pixel_jax.ops.bicubic import FRACTION_BITS, bicubic, fixed_point, window

BLOCK = 16  # outputs multiplied at once: a wider block multiplies more zeros, a narrower one is slower to call


def host_crop_resize(image: np.ndarray, box: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """Cuts `box` out of `image` and resizes it to `size`: the bits of `crop_resize` in its default order.

    Those are the bits of Pillow up to 12 (`Image.crop(box).resize((width, height), BICUBIC)`), which takes about half as long.

    Args:
      image: uint8 [h, w, channels].
      box: x1, y1, x2, y2 in pixels, x2 and y2 exclusive.
      size: height and width of the result.

    Returns:
      uint8 [height, width, channels].

    Raises:
      ValueError: the image has another type, the box is empty or outside it, or the size is empty.
    """
    if image.ndim != 3 or image.dtype != np.uint8:
        raise ValueError(f"image must be uint8 [h, w, channels], got {image.dtype} {image.shape}")
    x1, y1, x2, y2 = (int(edge) for edge in box)
    if not (0 <= x1 < x2 <= image.shape[1] and 0 <= y1 < y2 <= image.shape[0]):
        raise ValueError(
            f"box {(x1, y1, x2, y2)} is empty or outside the image of width {image.shape[1]}, height {image.shape[0]}"
        )
    height, width = (int(side) for side in size)
    if min(height, width) < 1:
        raise ValueError(f"size (height, width) {(height, width)} is empty")
    columns = image[y1:y2, x1:x2].transpose(1, 0, 2)
    return _resize_rows(_resize_rows(columns, width).transpose(1, 0, 2), height)


def _resize_rows(image: np.ndarray, out_length: int) -> np.ndarray:
    """Resizes the first axis: uint8 [rows, n, channels] -> uint8 [out_length, n, channels]."""
    length = image.shape[0]
    if length == out_length:  # every weight is 0 or 1
        return np.ascontiguousarray(image)
    flat = image.reshape(length, -1)
    out = np.empty((out_length, flat.shape[1]), np.uint8)
    for start in range(0, out_length, BLOCK):
        outputs = np.arange(start, min(start + BLOCK, out_length), dtype=np.int32)[:, None]
        seen = window(outputs, np.int32(length), np.int32(out_length))
        first, last = int(seen.first[0, 0]), int(seen.last[-1, 0])
        weights = bicubic(np.arange(first, last, dtype=np.int32), seen)
        weights = fixed_point(weights / weights.sum(axis=1, keepdims=True))
        # Doubles hold the sums exactly: 2 ** 23 times 255 times the taps stays far below 2 ** 53.
        sums = weights.astype(np.float64) @ flat[first:last].astype(np.float64)
        sums *= 2.0**-FRACTION_BITS
        sums += 0.5
        out[start : start + BLOCK] = np.clip(sums, 0, 255, out=sums)  # rounded down
    return out.reshape(out_length, *image.shape[1:])
