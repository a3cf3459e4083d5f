"""Brightness and contrast, as Pillow's `ImageEnhance`: to the bit, so its single precision is worked out on integers."""

import jax
import jax.numpy as jnp
from jax import lax

from pixel_jax.ops import doubles
from pixel_jax.tools.drawing import drawing_tool
from pixel_jax.tools.tool import Choice, Number

QUALITIES = ("brightness", "contrast")
SINGLE = 24  # bits of a mantissa


def rounded(value: jax.Array) -> jax.Array:
    """An integer with the bits below its 24 highest rounded away, half to even."""
    size = jnp.abs(value)
    drop = jnp.maximum(64 - SINGLE - lax.clz(size), 0)
    whole, rest = size >> drop, size & ((jnp.int64(1) << drop) - 1)
    half = (jnp.int64(1) << drop) >> 1
    up = (rest > half) | ((rest == half) & (drop > 0) & (whole & 1 == 1))
    return jnp.sign(value) * ((whole + up) << drop)


def grey(pixels: jax.Array, size: jax.Array) -> jax.Array:
    """The mean of a picture's luma, rounded as `ImageEnhance.Contrast` does: int64."""
    luma = (jnp.sum(pixels.astype(jnp.int32) * jnp.array([19595, 38470, 7471]), axis=-1) + 0x8000) >> 16
    total, count = jnp.sum(luma.astype(jnp.int64)), size[0].astype(jnp.int64) * size[1]
    return (2 * total + count) // jnp.maximum(2 * count, 1)


def draw(arguments, pixels: jax.Array, size: jax.Array) -> jax.Array:
    factor = arguments["factor"]
    with jax.enable_x64(True):
        middle = jnp.where(arguments["quality"] == QUALITIES.index("contrast"), grey(pixels, size), 0)
        millionths = factor.units.astype(jnp.int64) * 1_000_000 + factor.micros
        share = doubles.divide(doubles.double(millionths), doubles.constant(1e6))
        alpha, places = rounded(share.mantissa), jnp.clip(-share.exponent, 40, 80)
        alpha, places = alpha >> (doubles.MANTISSA - SINGLE), places - (doubles.MANTISSA - SINGLE)
        away = jnp.arange(256, dtype=jnp.int64) - middle
        value = rounded((middle << places) + rounded(alpha * away)) >> places
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
