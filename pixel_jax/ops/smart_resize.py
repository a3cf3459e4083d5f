"""The size at which a Qwen vision tower sees an image of a given size.

The reference computes in double precision and floors quotients that are often exact integers (a square image with a
square pixel limit, say), so that its result hangs on the last bit of each rounding. Compilers merge and reorder
floating-point operations, and some devices have no doubles; the traced form therefore carries out the reference's few
IEEE operations on integers.
"""

import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

MAX_RATIO = 200
MAX_SIDE = 1 << 24

MANTISSA = 53
LIMB = 26
DIGIT = 9  # bits of a quotient found at once: all the room that a remainder of 53 bits leaves in a signed word


def smart_resize(height, width, *, factor: int = 28, min_pixels: int, max_pixels: int):
    """Height and width, multiples of `factor`, of about the same shape and with an allowed number of pixels.

    Equal to `smart_resize` of the Qwen2-VL image processor for every size with sides up to 2 ** 24.

    Args:
      height, width: Python ints, or int32 arrays of equal shape, which may be traced.
      factor: side of a merged token in pixels.
      min_pixels, max_pixels: limits of height * width; they yield to `factor` where both cannot be had.

    Returns:
      (height, width), ints for ints and int32 arrays for arrays. Sides that are not positive or have a ratio over 200
      raise ValueError if they are ints and give zeros if they are arrays.
    """
    if factor < 1 or not 1 <= min_pixels <= max_pixels:
        raise ValueError(
            f"need factor >= 1 and 1 <= min_pixels <= max_pixels, got {factor}, {min_pixels}, {max_pixels}"
        )
    if isinstance(height, jax.Array) or isinstance(width, jax.Array):
        height, width = jnp.broadcast_arrays(jnp.asarray(height, jnp.int32), jnp.asarray(width, jnp.int32))
        return _traced(height, width, factor, min_pixels, max_pixels)
    return _host(operator.index(height), operator.index(width), factor, min_pixels, max_pixels)


def _host(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    if min(height, width) < 1 or max(height, width) > MAX_SIDE:
        raise ValueError(f"sides must be between 1 and {MAX_SIDE} pixels, got {height} x {width}")
    if max(height, width) > MAX_RATIO * min(height, width):
        raise ValueError(f"aspect ratio must be at most {MAX_RATIO}, got {height} x {width}")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        beta = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif new_height * new_width < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    return new_height, new_width


@jax.jit(static_argnames=("factor", "min_pixels", "max_pixels"))
def _traced(height, width, factor, min_pixels, max_pixels):
    smaller, larger = jnp.minimum(height, width), jnp.maximum(height, width)
    allowed = (smaller >= 1) & (larger <= MAX_SIDE)
    with jax.enable_x64(True):
        height, width = (jnp.where(allowed, side, 1).astype(jnp.int64) for side in (height, width))
        allowed &= jnp.maximum(height, width) <= MAX_RATIO * jnp.minimum(height, width)
        sides = jnp.stack([height, width])
        area = jnp.broadcast_to(height * width, sides.shape)
        rounded = _round_half_even(sides, factor) * factor
        too_large, too_small = rounded[0] * rounded[1] > max_pixels, rounded[0] * rounded[1] < min_pixels
        beta = _sqrt(
            _divide(
                _double(jnp.where(too_large, area, min_pixels)),
                _double(jnp.where(too_large, jnp.full_like(area, max_pixels), area)),
            )
        )
        scaled = jax.tree.map(
            lambda shrunk, grown: jnp.where(too_large, shrunk, grown),
            _divide(_double(sides), beta),
            _multiply(sides, beta),
        )
        whole, inexact = _floor(_divide(scaled, _double(jnp.full_like(sides, factor))))
        shrunk, grown = jnp.maximum(whole, 1) * factor, (whole + inexact) * factor
        sides = jnp.where(too_large, shrunk, jnp.where(too_small, grown, rounded))
        height, width = jnp.where(allowed, sides, 0).astype(jnp.int32)
    return height, width


def _round_half_even(value, divisor):
    quotient, twice = value // divisor, 2 * (value % divisor)
    return quotient + ((twice > divisor) | ((twice == divisor) & (quotient % 2 == 1)))


# Positive IEEE doubles as integers; everything below is int64, and called inside `jax.enable_x64`.


class _Double(NamedTuple):
    """mantissa * 2 ** exponent with a mantissa of 53 bits."""

    mantissa: jax.Array
    exponent: jax.Array


def _double(value) -> _Double:
    shift = lax.clz(value) - (64 - MANTISSA)
    return _Double(value << shift, -shift)


def _round_to_double(value, exponent, rest) -> _Double:
    """Rounds a 54-bit integer to 53 bits, to nearest and half to even; `rest`: whether more follows below its last bit."""
    half, value = value & 1, value >> 1
    value = value + (half & (rest | (value & 1)))
    carry = value >> MANTISSA
    return _Double(value >> carry, exponent + 1 + carry)


def _divide(a: _Double, b: _Double) -> _Double:
    borrow = (a.mantissa < b.mantissa).astype(jnp.int64)

    def add_digit(_, carry):  # a loop, for a chain of quotients takes compilers seconds
        quotient, remainder = carry
        remainder = remainder << DIGIT
        digit = lax.div(remainder, b.mantissa)
        return (quotient << DIGIT) | digit, remainder - digit * b.mantissa

    remainder = (a.mantissa << borrow) - b.mantissa
    digits = -(-MANTISSA // DIGIT)
    quotient, remainder = lax.fori_loop(0, digits, add_digit, (jnp.ones_like(remainder), remainder))
    more = digits * DIGIT - MANTISSA
    rest = ((quotient & ((1 << more) - 1)) | remainder) != 0
    exponent = a.exponent - b.exponent - borrow - MANTISSA
    return _round_to_double(quotient >> more, exponent, rest.astype(jnp.int64))


def _sqrt(a: _Double) -> _Double:
    odd = a.exponent & 1
    radicand = a.mantissa << odd

    def add_bit(step, carry):
        # Two more bits of the radicand, of which 2 * 27 are followed by as many zeros, give one of the root.
        root, remainder = carry
        pair = jnp.where(step <= LIMB, (radicand >> jnp.maximum(2 * (LIMB - step), 0)) & 3, 0)
        remainder, trial = (remainder << 2) | pair, (root << 2) | 1
        bit = (remainder >= trial).astype(jnp.int64)
        return (root << 1) | bit, remainder - bit * trial

    steps = MANTISSA + 1
    root, remainder = lax.fori_loop(0, steps, add_bit, (jnp.zeros_like(radicand), jnp.zeros_like(radicand)))
    return _round_to_double(root, (a.exponent - odd - steps) >> 1, (remainder != 0).astype(jnp.int64))


def _multiply(value, a: _Double) -> _Double:
    """Product of an integer up to MAX_SIDE and a double."""
    value = value << 2  # so that the product has more than 54 bits
    mask = (1 << LIMB) - 1
    low = value * (a.mantissa & mask)
    high, low = value * (a.mantissa >> LIMB) + (low >> LIMB), low & mask
    drop = (64 - lax.clz(high)) + LIMB - (MANTISSA + 1)
    rest = ((low & ((1 << drop) - 1)) != 0).astype(jnp.int64)
    return _round_to_double((high << (LIMB - drop)) | (low >> drop), a.exponent - 2 + drop, rest)


def _floor(a: _Double):
    """Largest integer not above `a` (which is below 2 ** 53), and 1 if it is not `a` itself."""
    shift = jnp.clip(-a.exponent, 0, 63)
    whole = a.mantissa >> shift
    return whole, (whole << shift != a.mantissa).astype(jnp.int64)
