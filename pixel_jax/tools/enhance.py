"""Brightness and contrast, with the bits of Pillow's `ImageEnhance`, whose single precision is computed on integers."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pixel_jax.ops import doubles
from pixel_jax.tools.drawing import drawing_tool
from pixel_jax.tools.tool import Choice, Number

QUALITIES = ("brightness", "contrast")
SINGLE = 24  # bits of a mantissa


def rounded(value: jax.Array) -> jax.Array:
    """Rounds integers (int64 [...]) to their 24 highest bits, half to even, as single precision does."""
    size = jnp.abs(value)
    drop = jnp.maximum(64 - SINGLE - lax.clz(size), 0)
    whole, rest = size >> drop, size & ((jnp.int64(1) << drop) - 1)
    half = (jnp.int64(1) << drop) >> 1
    up = (rest > half) | ((rest == half) & (drop > 0) & (whole & 1 == 1))
    return jnp.sign(value) * ((whole + up) << drop)


def grey(pixels: jax.Array, size: jax.Array) -> jax.Array:
    """Computes the mean luma of pixels uint8 [S, S, 3] of `size` int32 [2], rounded as in `ImageEnhance.Contrast`: int64 []."""
    luma = (jnp.sum(pixels.astype(jnp.int32) * jnp.array([19595, 38470, 7471]), axis=-1) + 0x8000) >> 16
    total, count = jnp.sum(luma.astype(jnp.int64)), size[0].astype(jnp.int64) * size[1]
    return (2 * total + count) // jnp.maximum(2 * count, 1)


def draw(arguments: Mapping[str, Any], pixels: jax.Array, size: jax.Array) -> jax.Array:
    """Changes brightness or contrast of pixels uint8 [S, S, 3] of `size` int32 [2]."""
    factor = arguments["factor"]
    with jax.enable_x64(True):
        middle = jnp.where(arguments["quality"] == QUALITIES.index("contrast"), grey(pixels, size), 0)
        millionths = factor.units.astype(jnp.int64) * 1_000_000 + factor.micros
        share = doubles.divide(doubles.double(millionths), doubles.constant(1e6))
        alpha, shift = rounded(share.mantissa), jnp.clip(-share.exponent, 40, 80)
        alpha, shift = alpha >> (doubles.MANTISSA - SINGLE), shift - (doubles.MANTISSA - SINGLE)
        away = jnp.arange(256, dtype=jnp.int64) - middle
        value = rounded((middle << shift) + rounded(alpha * away)) >> shift
        table = jnp.clip(value, 0, 255).astype(jnp.uint8)
    return table[pixels.astype(jnp.int32)]


ENHANCE = drawing_tool(
    "enhance",
    "Change the brightness or the contrast of the image. It is useful when the image is too dark, too bright or too flat.",
    (
        Choice("quality", "What to change.", options=QUALITIES),
        Number(
            "factor", "How much there is to be of it: 1.0 leaves the image as it is, 2.0 doubles it.", low=0, high=8
        ),
    ),
    draw,
    shows="Here is the enhanced image",
)
