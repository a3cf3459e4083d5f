"""IEEE double precision on integers: the same bits on every device, whatever its compiler merges and reorders.

It serves the few places where the last bit of a double decides a size or an edge. Doubles are non-negative; all arrays are
int64, and the functions are called inside `jax.enable_x64`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pixel_jax.arrays import AnyArray

MANTISSA = 53
LIMB = 26
DIGIT = 9  # bits of a quotient computed at once: as many as a remainder of 53 bits can be shifted by in a signed word
GUARD = 8  # bits that a sum keeps below the last of its larger part
LEAST = -1200  # an exponent below that of any double


class Double(NamedTuple):
    """mantissa * 2 ** exponent with a mantissa of exactly 53 bits, or zero for the number zero."""

    mantissa: jax.Array  # int64 [...]
    exponent: jax.Array  # int64 [...]


def double(value: AnyArray) -> Double:
    """Converts integers from 0 to 2 ** 53 (int64 [...])."""
    shift = lax.clz(value) - (64 - MANTISSA)
    return Double(jnp.asarray(value) << shift, -shift)


def constant(value: float) -> Double:
    """Converts a Python float that is not negative."""
    fraction, exponent = math.frexp(value)
    return Double(jnp.int64(int(fraction * 2**MANTISSA)), jnp.int64(exponent - MANTISSA))


def where(condition: AnyArray, a: Double, b: Double) -> Double:
    """Selects `a` where `condition` (bool [...]) holds, else `b`."""
    return Double(*(jnp.where(condition, x, y) for x, y in zip(a, b, strict=True)))


def at_least_one(a: Double) -> jax.Array:
    """Whether numbers are 1 or more: bool [...]."""
    return (a.mantissa > 0) & (a.exponent > -MANTISSA)


def _round_to_double(value: jax.Array, exponent: jax.Array, rest: jax.Array) -> Double:
    """Rounds a 54-bit integer to 53 bits, to nearest and half to even; `rest` is 1 where the exact value has lower bits."""
    half, value = value & 1, value >> 1
    value = value + (half & (rest | (value & 1)))
    carry = value >> MANTISSA
    return Double(value >> carry, exponent + 1 + carry)


def divide(a: Double, b: Double) -> Double:
    """Divides `a` by `b`, which is not zero."""
    borrow = (a.mantissa < b.mantissa).astype(jnp.int64)

    def add_digit(_, carry):  # in a loop, because compilers take seconds for a chain of quotients
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
    rounded = _round_to_double(quotient >> more, exponent, rest.astype(jnp.int64))
    return rounded._replace(mantissa=jnp.where(a.mantissa == 0, 0, rounded.mantissa))


def sqrt(a: Double) -> Double:
    """Takes the square root."""
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


def multiply(value: jax.Array, a: Double) -> Double:
    """Multiplies integers of up to 2 ** 24 (int64 [...]) by doubles."""
    value = value << 2  # so that the product has more than 54 bits
    mask = (1 << LIMB) - 1
    low = value * (a.mantissa & mask)
    high, low = value * (a.mantissa >> LIMB) + (low >> LIMB), low & mask
    drop = (64 - lax.clz(high)) + LIMB - (MANTISSA + 1)
    rest = ((low & ((1 << drop) - 1)) != 0).astype(jnp.int64)
    return _round_to_double((high << (LIMB - drop)) | (low >> drop), a.exponent - 2 + drop, rest)


def add(a: Double, b: Double) -> Double:
    """Adds two doubles."""
    return _add(a, b, 1)


def subtract(a: Double, b: Double) -> Double:
    """Subtracts `b` from `a`; the result is zero where `b` is larger."""
    return _add(a, b, -1)


def _add(a: Double, b: Double, sign: int) -> Double:
    rank = lambda x: jnp.where(x.mantissa == 0, LEAST, x.exponent)
    swap = (rank(a) < rank(b)) | ((rank(a) == rank(b)) & (a.mantissa < b.mantissa))
    large, small = where(swap, b, a), where(swap, a, b)
    shift = jnp.clip(rank(large) - rank(small), 0, 63)
    value = small.mantissa << GUARD
    aligned = value >> shift
    rest = (aligned << shift != value).astype(jnp.int64)
    total = (large.mantissa << GUARD) + sign * aligned
    # Bits of `b` below the last bit of the difference are subtracted, too: that gives the next lower integer, and a rest.
    total = total - rest if sign < 0 else total
    drop = (64 - lax.clz(total)) - (MANTISSA + 1)
    high = total >> jnp.maximum(drop, 0)
    rest |= (high << jnp.maximum(drop, 0) != total).astype(jnp.int64)
    rounded = _round_to_double(high << jnp.maximum(-drop, 0), large.exponent - GUARD + drop, rest)
    zero = (total == 0) | swap if sign < 0 else total == 0
    return rounded._replace(mantissa=jnp.where(zero, 0, rounded.mantissa))


def round_half_even(a: Double) -> jax.Array:
    """Rounds doubles below 2 ** 52 to integers as Python's `round` does: int64 [...]."""
    shift = jnp.clip(-a.exponent, 1, 63)
    whole, half = a.mantissa >> shift, 1 << (shift - 1)
    rest = a.mantissa & (2 * half - 1)
    return whole + ((rest > half) | ((rest == half) & (whole & 1 == 1)))


def floor(a: Double) -> tuple[jax.Array, jax.Array]:
    """Returns the largest integer not above `a`, which is below 2 ** 53, and 1 where `a` is no integer, else 0: int64 [...]."""
    shift = jnp.clip(-a.exponent, 0, 63)
    whole = a.mantissa >> shift
    return whole, (whole << shift != a.mantissa).astype(jnp.int64)
