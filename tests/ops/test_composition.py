"""Every operation on pixels, with what it is given in every form and under every transform: the same pixels each time."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pixel_jax.ops import crop_resize, gather_frames, patchify, smart_resize

IMAGE = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
VIDEO = np.random.default_rng(1).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)


def crop(numbers):
    return crop_resize(IMAGE, numbers[:4], numbers[4:], (28, 42))


def frames(numbers):
    return gather_frames(VIDEO, numbers)


def patches(numbers):
    return patchify(jnp.asarray(IMAGE), numbers, max_patches=24)


def sizes(numbers):
    half = len(numbers) // 2
    return jnp.stack(smart_resize(numbers[:half], numbers[half:], min_pixels=784, max_pixels=50 * 784))


def one_size(numbers):
    return jnp.stack(smart_resize(numbers[0], numbers[1], min_pixels=784, max_pixels=50 * 784))


def expected_crop(x1, y1, x2, y2, height, width):
    out = np.zeros((28, 42, 3), np.uint8)
    crop = Image.fromarray(IMAGE).crop((x1, y1, x2, y2))
    # Horizontally first, as Pillow up to 12.
    crop = crop.resize((width, crop.height), Image.BICUBIC).resize((width, height), Image.BICUBIC)
    out[:height, :width] = np.asarray(crop)
    return out


def expected_patches(height, width):
    """By the definition: for each merged token its four patches, each (channel, row, column)."""
    out, at = np.zeros((24, 588), np.uint8), 0
    for y in range(0, height, 28):
        for x in range(0, width, 28):
            for top, left in ((y, x), (y, x + 14), (y + 14, x), (y + 14, x + 14)):
                out[at] = IMAGE[top : top + 14, left : left + 14].transpose(2, 0, 1).reshape(-1)
                at += 1
    return out


def expected_sizes(*numbers):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference

    pairs = zip(numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :], strict=True)
    found = [reference(*pair, factor=28, min_pixels=784, max_pixels=50 * 784) for pair in pairs]
    return np.array(found).T


# operation, what it computes by another's account, and two of what it may be given
OPERATIONS = {
    "crop_resize": (crop, expected_crop, [3, 5, 60, 50, 20, 40], [0, 0, 84, 56, 28, 42]),
    "gather_frames": (frames, lambda *i: VIDEO[list(i)], [2, 0, 3], [1, 1, 1]),
    "patchify": (patches, expected_patches, [28, 56], [56, 84]),
    "smart_resize of arrays": (sizes, expected_sizes, [100, 33, 2000, 30], [1, 28, 28, 700]),
    "smart_resize": (one_size, lambda *x: expected_sizes(*x)[:, 0], [100, 2000], [33, 30]),
}
FORMS = {
    "list": list,
    "tuple": tuple,
    "NumPy": lambda x: np.array(x),
    "NumPy int32": lambda x: np.array(x, np.int32),
    "JAX": lambda x: jnp.array(x, jnp.int32),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_form_outside_and_closed_over_inside_every_transform(operation, form):
    run, reference, given, _ = OPERATIONS[operation]
    given, expected = FORMS[form](given), reference(*given)
    np.testing.assert_array_equal(run(given), expected)
    # The form is a constant of these; what is mapped over is something else.
    np.testing.assert_array_equal(jax.jit(lambda: run(given))(), expected)
    several = np.stack([expected, expected])
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda _: run(given)))(jnp.zeros(2)), several)
    np.testing.assert_array_equal(jax.lax.map(lambda _: run(given), jnp.zeros(2)), several)
    assert jax.eval_shape(lambda: run(given)).shape == expected.shape


@pytest.mark.parametrize("operation", OPERATIONS)
def test_traced_under_every_transform(operation):
    run, reference, *given = OPERATIONS[operation]
    several, expected = jnp.array(given, jnp.int32), np.stack([reference(*x) for x in given])
    np.testing.assert_array_equal(jax.jit(run)(several[0]), expected[0])
    np.testing.assert_array_equal(jax.vmap(run)(several), expected)
    np.testing.assert_array_equal(jax.jit(jax.vmap(run))(several), expected)
    np.testing.assert_array_equal(jax.jit(lambda x: jax.lax.map(run, x))(several), expected)
    assert jax.eval_shape(run, several[0]).shape == expected[0].shape


@pytest.mark.parametrize("operation", ["crop_resize", "gather_frames", "patchify"])
def test_what_is_no_array_of_pixels(operation):
    run = {
        "crop_resize": lambda x: crop_resize(x, (0, 0, 9, 9), (28, 28), (28, 28)),
        "gather_frames": lambda x: gather_frames(x, [0]),
        "patchify": lambda x: patchify(x, (28, 28), max_patches=4),
    }[operation]
    for path in ("photo.jpg", pathlib.Path("photo.jpg")):
        with pytest.raises(
            ValueError, match=r"must be an array of pixels, not .*: pixel_jax.read_image\('photo.jpg'\) reads"
        ):
            run(path)
    with pytest.raises(
        ValueError, match=r"not Image: np.asarray\(image.convert\('RGB'\)\) .* pixel_jax.read_image\(path\)"
    ):
        run(Image.fromarray(IMAGE))
    with pytest.raises(ValueError, match="must be an array of pixels, not list: pixel_jax.read_image"):
        run(IMAGE.tolist())


@pytest.mark.parametrize("operation", OPERATIONS)
def test_fractions_are_no_integers(operation):
    """Not rounded in silence, in any form."""
    run, _, given, _ = OPERATIONS[operation]
    for fractions in ([x + 0.5 for x in given], np.array(given) + 0.5, jnp.array(given) + 0.5):
        with pytest.raises((ValueError, TypeError), match="integer"):
            run(fractions)
    with pytest.raises((ValueError, TypeError), match="integer"):
        jax.jit(run)(jnp.array(given) + 0.5)


def test_sizes_that_no_int32_holds():
    limits = {"min_pixels": 784, "max_pixels": 50 * 784}
    height, width = smart_resize(np.array([2**32 + 100, 100]), np.array([100, 100]), **limits)
    assert height.tolist() == [0, 112] and width.tolist() == [0, 112]
