"""Tools that make pictures: the bits of Pillow."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance

from pixel_jax.tools import DRAW_BOX, ENHANCE, ROTATE
from pixel_jax.tools.calls import Numbers
from pixel_jax.tools.device import size_of_drawing
from pixel_jax.tools.draw_box import COLOURS, PIXELS_A_LINE, THINNEST, accepts
from pixel_jax.tools.rotate import BY

SIDE = 96
SIZES = st.tuples(st.integers(1, SIDE), st.integers(1, SIDE))
MILLION = 1_000_000


def decimals(*millionths: int) -> Numbers:
    """Numbers as they are read; a single one has no axis."""
    numbers = np.array(millionths if len(millionths) > 1 else millionths[0])
    size = np.abs(numbers)
    return Numbers(
        (size // MILLION).astype(np.int32), (size % MILLION).astype(np.int32), numbers < 0, size % MILLION == 0
    )


@functools.partial(jax.jit, static_argnames="tool")
def drawn(tool, arguments, pixels, size):
    return tool.draw(arguments, pixels, size), size_of_drawing(tool, arguments, size)


def made(tool, arguments, image):
    room = np.zeros((SIDE, SIDE, 3), np.uint8)
    room[: image.shape[0], : image.shape[1]] = image
    pixels, size = drawn(tool, arguments, room, np.array(image.shape[:2], np.int32))
    return np.asarray(pixels)[: int(size[0]), : int(size[1])]


def picture(size, seed, low=0, high=256):
    return np.random.default_rng(seed).integers(low, high, (*size, 3), np.uint8)


TRANSPOSED = {  # Pillow counts counterclockwise
    "90": Image.Transpose.ROTATE_270,
    "180": Image.Transpose.ROTATE_180,
    "270": Image.Transpose.ROTATE_90,
    "mirror": Image.Transpose.FLIP_LEFT_RIGHT,
    "flip": Image.Transpose.FLIP_TOP_BOTTOM,
}


@pytest.mark.parametrize("by", BY)
@settings(max_examples=15)
@given(size=SIZES)
def test_rotate(by, size):
    image = picture(size, 0)
    found = made(ROTATE, {"by": np.int32(BY.index(by))}, image)
    np.testing.assert_array_equal(found, Image.fromarray(image).transpose(TRANSPOSED[by]))


@settings(max_examples=60)
@given(
    SIZES,
    st.integers(0, 10**6),
    st.integers(0, 1),
    st.one_of(st.integers(0, 8 * MILLION), st.sampled_from([0, 1, MILLION // 2, MILLION, MILLION + 1, 8 * MILLION])),
    st.sampled_from([(0, 256), (0, 40), (200, 256), (127, 128)]),
)
def test_enhance(size, seed, quality, factor, values):
    image = picture(size, seed, *values)
    pillow = (ImageEnhance.Brightness, ImageEnhance.Contrast)[quality](Image.fromarray(image)).enhance(factor / MILLION)
    found = made(ENHANCE, {"quality": np.int32(quality), "factor": decimals(factor)}, image)
    np.testing.assert_array_equal(found, pillow)


@pytest.mark.parametrize("quality", [0, 1])
def test_enhance_of_every_value(quality):
    """Every level of a channel, beside many greys and factors."""
    random = np.random.default_rng(quality)
    for factor in random.integers(0, 8 * MILLION, 120):
        image = np.broadcast_to(np.arange(256, dtype=np.uint8)[: 8 * 32].reshape(8, 32, 1), (8, 32, 3)).copy()
        image[0] = random.integers(0, 256)
        enhancer = (ImageEnhance.Brightness, ImageEnhance.Contrast)[quality](Image.fromarray(image))
        found = made(ENHANCE, {"quality": np.int32(quality), "factor": decimals(int(factor))}, image)
        np.testing.assert_array_equal(found, enhancer.enhance(int(factor) / MILLION), err_msg=str(factor))


DRAW_BOX_ACCEPTS = jax.jit(accepts)


@settings(max_examples=60)
@given(SIZES, st.lists(st.integers(0, MILLION), min_size=4, max_size=4), st.integers(0, len(COLOURS) - 1))
def test_draw_box(size, corners, colour):
    x1, x2, y1, y2 = (*sorted(corners[:2]), *sorted(corners[2:]))
    arguments = {"bbox_2d": decimals(x1, y1, x2, y2), "colour": np.int32(colour)}
    height, width = size
    edges = [round(x / MILLION * side) for x, side in zip((x1, y1, x2, y2), (width, height) * 2, strict=True)]
    wide = THINNEST + max(size) // PIXELS_A_LINE
    fits = min(edges[2] - edges[0], edges[3] - edges[1]) >= 2 * wide
    assert bool(DRAW_BOX_ACCEPTS(arguments, np.array(size, np.int32))) == fits
    if not fits:
        return
    image = picture(size, 1)
    pillow = Image.fromarray(image)
    outline = list(COLOURS.values())[colour]
    last = (edges[0], edges[1], edges[2] - 1, edges[3] - 1)
    ImageDraw.Draw(pillow).rectangle(last, outline=outline, width=wide)
    np.testing.assert_array_equal(made(DRAW_BOX, arguments, image), pillow)
