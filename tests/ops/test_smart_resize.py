"""smart_resize against the Hugging Face function, on the host and traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference

from pixel_jax.ops import smart_resize

# Factor and limits: the class default, released checkpoints, squares of a side (quotients that are exact integers),
# limits that meet, a limit below one token, a large one that grows nearly everything, Qwen3-VL's factor.
SETTINGS = [
    (28, 56 * 56, 28 * 28 * 1280),
    (28, 56 * 56, 12845056),
    (28, 256 * 28 * 28, 5120 * 28 * 28),
    (28, 56 * 56, 336 * 336),
    (28, 56 * 56, 56 * 56),
    (28, 1, 500),
    (28, 10**7, 10**8),
    (32, 256 * 256, 1024 * 1024),
]


def compare(heights, widths, setting):
    factor, low, high = setting
    limits = {"factor": factor, "min_pixels": low, "max_pixels": high}
    allowed = np.maximum(heights, widths) <= 200 * np.minimum(heights, widths)
    heights, widths = heights[allowed], widths[allowed]
    traced = np.stack(smart_resize(jnp.asarray(heights, jnp.int32), jnp.asarray(widths, jnp.int32), **limits), axis=1)
    assert traced.dtype == np.int32
    for height, width, size in zip(heights.tolist(), widths.tolist(), traced.tolist(), strict=True):
        expected = reference(height, width, factor, low, high)
        assert tuple(size) == expected, (height, width)
        assert smart_resize(height, width, **limits) == expected


@pytest.mark.parametrize("setting", SETTINGS)
def test_equals_the_reference(setting):
    random = np.random.default_rng(0)
    sides = random.integers(1, 3000, (2, 3000))
    squares = np.arange(1, 3000)
    # Sides in simple ratios put square roots on integers.
    unit, ratio = random.integers(1, 300, 2000), random.integers(1, 10, (2, 2000)) ** 2
    compare(
        np.concatenate([sides[0], squares, unit * ratio[0]]),
        np.concatenate([sides[1], squares, unit * ratio[1]]),
        setting,
    )


@pytest.mark.parametrize("setting", SETTINGS)
def test_equals_the_reference_up_to_the_largest_images(setting):
    random = np.random.default_rng(1)
    heights = 2 ** random.uniform(0, 24, 3000)
    widths = np.clip(heights * 200 ** random.uniform(-1, 1, 3000), 1, 1 << 24)
    compare(heights.astype(np.int64), widths.astype(np.int64), setting)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_equals_the_reference_for_a_whole_range(setting):
    heights, widths = np.meshgrid(np.arange(1, 4000, 3), np.arange(1, 1300, 5))
    compare(heights.ravel(), widths.ravel(), setting)


def test_plain_float32_would_fail_these_tests():
    """The sizes above include those on which the obvious traced form is wrong."""
    side = jnp.arange(1, 3000, dtype=jnp.float32)
    sides = jax.jit(lambda side: jnp.floor(side / jnp.sqrt(side * side / (336 * 336)) / 28) * 28)(side)
    expected = [reference(int(value), int(value), 28, 3136, 336 * 336)[0] for value in side]
    large = np.asarray(side) > 400
    assert (np.asarray(sides)[large] != np.array(expected)[large]).any()


def test_under_jit_and_vmap():
    limits = {"factor": 28, "min_pixels": 3136, "max_pixels": 1003520}
    sizes = jnp.array([[1080, 1920], [30, 20], [448, 448]], jnp.int32)
    out = jax.jit(jax.vmap(lambda size: jnp.stack(smart_resize(size[0], size[1], **limits))))(sizes)
    assert out.dtype == jnp.int32
    assert out.tolist() == [list(reference(*size, 28, 3136, 1003520)) for size in sizes.tolist()]


def test_shapes_that_are_not_allowed():
    limits = {"factor": 28, "min_pixels": 3136, "max_pixels": 1003520}
    for height, width, message in [
        (1, 201, "aspect ratio must be at most 200, got 1 x 201"),
        (40_200, 200, "aspect ratio must be at most 200, got 40200 x 200"),
        (0, 5, "got 0 x 5"),
        (5, -1, "got 5 x -1"),
        ((1 << 24) + 1, 1 << 24, "got 16777217 x 16777216"),
    ]:
        with pytest.raises(ValueError, match=message):
            smart_resize(height, width, **limits)
        out = smart_resize(jnp.int32(height), jnp.int32(width), **limits)
        assert (int(out[0]), int(out[1])) == (0, 0)
    assert smart_resize(1, 200, **limits) == reference(1, 200, 28, 3136, 1003520)
    with pytest.raises(ValueError, match="min_pixels <= max_pixels, got 28, 200, 100"):
        smart_resize(9, 9, factor=28, min_pixels=200, max_pixels=100)
