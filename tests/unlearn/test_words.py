"""Arrays as words: numpy's own view of the bytes is what a device makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unlearn_jax.words import WORD, Words, count_words, to_arrays, to_words

DTYPES = ["bool", "uint8", "int8", "uint16", "int32", "float16", "bfloat16", "float32", "int64", "float64"]


@pytest.mark.parametrize("name", DTYPES)
def test_every_element_comes_back(rng, x64, name):
    dtype = jnp.dtype(name)
    for shape in ((), (1,), (3,), (5, 2), (4, 3, 7), (0, 2)):
        x = rng.integers(0, 2, (6, 2, *shape)).astype(bool)
        if name != "bool":
            x = (300 * rng.normal(size=(6, 2, *shape))).astype(dtype)
        words = to_words(x, axes=2)
        assert isinstance(words, Words) and words.rows.dtype == np.uint32
        assert words.rows.shape == (6, 2, count_words(shape, dtype))
        assert words.rows.nbytes < x.nbytes + WORD * 12  # no row is a whole word too long
        found = jax.jit(to_arrays)({"x": words})["x"]
        assert found.dtype == dtype
        np.testing.assert_array_equal(np.asarray(found), x)


def test_a_slice_of_the_words_is_that_of_the_array(rng):
    x = rng.integers(0, 256, (6, 2, 5, 3)).astype(np.uint8)
    rows = jax.tree.map(lambda rows: rows[4], to_words(x, axes=2))
    np.testing.assert_array_equal(rows.array(), x[4])


def test_what_has_no_words_is_left_as_it_is(rng):
    x = rng.normal(size=(3, 2)).astype(np.complex64)
    assert to_words(x, axes=1) is x and to_arrays([x])[0] is x
