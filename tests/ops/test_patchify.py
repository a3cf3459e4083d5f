"""Frame patches and pixel values against the Hugging Face image processor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pixel_jax.ops import IMAGE_MEAN, IMAGE_STD, crop_resize, patchify, pixel_values, smart_resize, temporal_slices

CANVAS = (112, 140)
PATCHES = 80
SIZES = [(28, 28), (112, 140), (56, 140), (112, 28), (84, 112)]
# Float32 has 24 bits, normalised values are below 2.7 and are rounded three times.
TOLERANCE = 5e-7


def frame(size, seed=0):
    """A frame in the corner of a canvas whose rest is noise too."""
    canvas = np.random.default_rng(seed).integers(0, 256, (*CANVAS, 3), dtype=np.uint8)
    return canvas, canvas[: size[0], : size[1]]


@pytest.mark.parametrize("size", SIZES)
def test_equals_the_image_processor(size):
    canvas, image = frame(size)
    expected = Qwen2VLImageProcessorPil(do_resize=False)(Image.fromarray(image), return_tensors="np")
    assert expected["image_grid_thw"].tolist() == [[1, size[0] // 14, size[1] // 14]]
    patches = patchify(canvas, jnp.array(size), max_patches=PATCHES)
    values = pixel_values(patches, patches)
    count = size[0] * size[1] // 196
    assert patches.dtype == jnp.uint8 and patches.shape == (PATCHES, 588)
    assert values.dtype == jnp.float32 and values.shape == (PATCHES, 1176)
    np.testing.assert_allclose(values[:count], expected["pixel_values"], rtol=0, atol=TOLERANCE)
    assert not patches[count:].any()


def test_resize_and_patches_equal_the_image_processor_from_file_to_values():
    """Everything together: smart_resize, crop_resize, patchify and pixel_values against one call of the processor."""
    image = np.random.default_rng(1).integers(0, 256, (131, 217, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=112 * 140)
    expected = processor(Image.fromarray(image), return_tensors="np")

    @jax.jit
    def run(image, box):
        size = jnp.stack(smart_resize(box[3] - box[1], box[2] - box[0], min_pixels=3136, max_pixels=112 * 140))
        patches = patchify(crop_resize(image, box, size, (112, 168)), size, max_patches=PATCHES)
        return size, pixel_values(patches, patches)

    size, values = run(image, jnp.array([0, 0, 217, 131]))
    assert (size // 14).tolist() == expected["image_grid_thw"][0, 1:].tolist()
    count = int(size.prod()) // 196
    np.testing.assert_allclose(values[:count], expected["pixel_values"], rtol=0, atol=TOLERANCE)


def test_patches_are_bytes_of_the_image():
    """The order of pixels checked exactly: each row of four is one merged token's patches."""
    canvas, image = frame((84, 112))
    patches = np.asarray(patchify(canvas, (84, 112), max_patches=48)).reshape(3, 4, 2, 2, 3, 14, 14)
    for row, column in np.ndindex(6, 8):
        patch = image[row * 14 :, column * 14 :][:14, :14]
        np.testing.assert_array_equal(patches[row // 2, column // 2, row % 2, column % 2], patch.transpose(2, 0, 1))


def test_two_frames_are_interleaved():
    first, second = (patchify(frame((56, 56), seed)[0], (56, 56), max_patches=16) for seed in (1, 2))
    values = np.asarray(pixel_values(first, second)).reshape(16, 3, 2, 196)
    for index, patches in enumerate((first, second)):
        levels = np.asarray(patches).reshape(16, 3, 196) / 255.0
        expected = (levels - np.array(IMAGE_MEAN)[:, None]) / np.array(IMAGE_STD)[:, None]
        np.testing.assert_allclose(values[:, :, index], expected, rtol=0, atol=TOLERANCE)


def test_video_layout_equals_the_video_processor():
    """Frame pairs and rows as the Hugging Face video processor's `patchify` lays them out, odd frame count included."""
    frames = np.stack([frame((56, 84), seed)[1] for seed in range(5)])
    # Its module needs torchvision; these are its view and permutation, batch and frames padded by the last one.
    levels = np.concatenate([frames, frames[-1:]]).transpose(0, 3, 1, 2).reshape(3, 2, 3, 2, 2, 14, 3, 2, 14)
    expected = levels.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(3, 24, 1176)
    patches = jax.vmap(lambda image: patchify(image, jnp.array([56, 84]), max_patches=24))(jnp.asarray(frames))
    slices = temporal_slices(5)
    values = np.asarray(pixel_values(patches[slices[:, 0]], patches[slices[:, 1]])).reshape(3, 24, 3, 392)
    values = values * np.array(IMAGE_STD)[:, None] + np.array(IMAGE_MEAN)[:, None]
    np.testing.assert_array_equal(np.round(values * 255).reshape(3, 24, 1176), expected)


def test_one_compilation_and_vmap_over_sizes():
    traces = []

    @jax.jit
    @jax.vmap
    def run(image, size):
        traces.append(1)
        return patchify(image, size, max_patches=PATCHES)

    canvases = np.stack([frame(size, seed)[0] for seed, size in enumerate(SIZES)])
    out = run(canvases, jnp.array(SIZES))
    out = run(canvases, jnp.array(SIZES[::-1])[::-1])
    for row, size in enumerate(SIZES):
        np.testing.assert_array_equal(out[row], patchify(canvases[row], size, max_patches=PATCHES))
    assert len(traces) == 1


@pytest.mark.parametrize(
    "size, message",
    [
        ((27, 28), "multiples of 28"),
        ((0, 28), "multiples of 28"),
        ((-28, 28), "multiples of 28"),
        ((140, 28), "exceeds the image"),
        ((28, 168), "exceeds the image"),
        ((112, 140), "more than 79 patches"),
    ],
)
def test_bad_sizes(size, message):
    canvas, _ = frame(size)
    with pytest.raises(ValueError, match=message):
        patchify(canvas, size, max_patches=79)
    assert not jax.jit(lambda size: patchify(canvas, size, max_patches=79))(jnp.array(size)).any()


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"multiples of 28, got \(30, 28, 3\)"):
        patchify(np.zeros((30, 28, 3), np.uint8), (28, 28), max_patches=4)
    with pytest.raises(ValueError, match=r"must be uint8 \[..., 588\], got float32 \(4, 588\)"):
        pixel_values(np.zeros((4, 588), np.uint8), np.zeros((4, 588), np.float32))


def test_explicit_axes():
    """On the mesh that `jax.make_mesh` makes, whose axes are Explicit."""
    mesh = jax.make_mesh((8,), ("data",))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    images = np.stack([frame((112, 140), seed)[0] for seed in range(8)])
    sizes = np.array([SIZES[i % len(SIZES)] for i in range(8)], np.int32)
    patch = jax.vmap(lambda image, size: patchify(image, size, max_patches=PATCHES))
    out = jax.jit(patch)(*jax.device_put((images, sizes), rows))
    assert out.sharding.is_equivalent_to(rows, 3)
    np.testing.assert_array_equal(out, patch(images, sizes))
