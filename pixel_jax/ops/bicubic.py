"""Pillow's bicubic weights (`src/libImaging/Resample.c`), once for the device and for the host.

Each weight is computed in double precision and rounded to 22-bit fixed point; sums of products are rounded to 8 bits.
The functions work on NumPy and on JAX arrays alike, the latter inside `jax.enable_x64`.
"""

from typing import Any, NamedTuple

import numpy as np

FRACTION_BITS = 22  # Pillow's PRECISION_BITS: 32 bits less 8 for the pixel and 2 for overshoot


class Window(NamedTuple):
    """The pixels of the crop that outputs are computed from: `first` to `last` (exclusive), weighted around `centre`."""

    centre: Any  # float64 [...]
    filter_scale: Any  # float64 []
    first: Any  # int32 [...]
    last: Any  # int32 [...]


def window(outputs, length, out_length) -> Window:
    """Returns the windows of `outputs` (int32 [...]) where `length` pixels are resized to `out_length` (int32 scalars)."""
    xp = outputs.__array_namespace__()
    scale = length.astype(np.float64) / xp.maximum(out_length, 1).astype(np.float64)
    filter_scale = xp.maximum(scale, 1.0)
    centre = (outputs.astype(np.float64) + 0.5) * scale
    support = 2.0 * filter_scale
    first = xp.maximum((centre - support + 0.5).astype(np.int32), 0)
    last = xp.minimum((centre + support + 0.5).astype(np.int32), length)
    return Window(centre, filter_scale, first, last)


def bicubic(pixels, window: Window):
    """Computes weights before normalisation (Keys' cubic with a = -1/2): float64, zero outside the window."""
    xp = pixels.__array_namespace__()
    x = xp.abs((pixels.astype(np.float64) - window.centre + 0.5) / window.filter_scale)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    weights = xp.where(x < 1.0, near, xp.where(x < 2.0, far, 0.0))
    return xp.where((pixels >= window.first) & (pixels < window.last), weights, 0.0)


def fixed_point(weights):
    """Rounds normalised weights to int32 multiples of 2 ** -FRACTION_BITS."""
    xp = weights.__array_namespace__()
    weights = weights * 2.0**FRACTION_BITS
    return (weights + xp.where(weights < 0, -0.5, 0.5)).astype(np.int32)
