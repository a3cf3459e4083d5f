"""Doubles on integers against those of the machine, which Python computes with."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pixel_jax.ops import doubles

FLOATS = st.one_of(
    st.just(0.0),
    st.floats(2.0**-70, 2.0**40),
    st.integers(0, 10**6).map(lambda n: n / 10**6),
    st.integers(1, 2**53).map(lambda n: n * 2.0**-60),
)
PAIRS = st.lists(st.tuples(FLOATS, FLOATS), min_size=64, max_size=64)


def value(x: doubles.Double) -> list[float]:
    parts = (np.asarray(part).tolist() for part in x)
    return [math.ldexp(m, e) if m else 0.0 for m, e in zip(*parts, strict=True)]


@jax.jit
def compute(a: doubles.Double, b: doubles.Double, integers):
    with jax.enable_x64(True):
        one = doubles.where(b.mantissa == 0, doubles.constant(1.0), b)
        found = doubles.add(a, b), doubles.subtract(a, b), doubles.divide(a, one), doubles.multiply(integers, b)
        return found, doubles.round_half_even(b), doubles.double(integers)


def given_doubles(values) -> doubles.Double:
    parts = [math.frexp(x) for x in values]
    mantissa = np.array([int(m * 2**53) for m, _ in parts], np.int64)
    return doubles.Double(mantissa, np.array([e - 53 for _, e in parts], np.int64))


def check(pairs) -> None:
    a, b = zip(*pairs, strict=True)
    integers = [int(x * 2**20) % 2**24 for x in a]
    with jax.enable_x64(True):
        found, rounded, exact = compute(given_doubles(a), given_doubles(b), np.array(integers, np.int64))
    total, difference, quotient, product = map(value, found)
    for i, (x, y) in enumerate(pairs):
        assert total[i] == x + y, (x, y)
        assert difference[i] == max(x - y, 0.0), (x, y)
        assert quotient[i] == x / (y or 1.0), (x, y)
        assert product[i] == integers[i] * y, (integers[i], y)
        assert int(rounded[i]) == round(y), y
        assert value(exact)[i] == integers[i]


@settings(deadline=None, max_examples=150)
@given(PAIRS)
@example(
    [(0.35, 0.1), (0.1, 0.35), (0.1, 0.1), (1.0, 2.0**-60), (2.0**-60, 1.0), (1.0, 2.0**-53), (0.5, 2.5)] * 9
    + [(0.0, 0.0)]
)
def test_the_arithmetic_of_the_machine(pairs):
    check(pairs)


def test_constants():
    with jax.enable_x64(True):
        for x in (0.0, 0.1, 1.0, 0.25, 1e-9):
            assert value(doubles.Double(*(jnp.atleast_1d(part) for part in doubles.constant(x)))) == [x]
