"""The images of prompts on the host and on the devices."""

import jax
import numpy as np
import pytest

from pixel_jax.parallel import make_mesh
from pixel_jax.rollouts import images as module
from pixel_jax.rollouts.images import pad, ragged, shard_images
from pixel_jax.rollouts.prompts import PromptError, build_prompts
from pixel_jax.rollouts.shapes import BatchShape
from tests.rollouts import scripted_model

SIZES = [[(5, 7)], [(8, 8), (3, 2)], [(1, 6)], [(4, 4), (4, 4), (2, 8)]]
SHAPE = BatchShape(96, 3, 3, 16, 8, 9)


@pytest.fixture
def both():
    """The images, and the array written by hand."""
    random = np.random.default_rng(0)
    images, padded = [], np.zeros((4, 3, 8, 9, 3), np.uint8)
    for row, sizes in zip(padded, SIZES, strict=True):
        images.append([random.integers(1, 256, (*size, 3)).astype(np.uint8) for size in sizes])
        for buffer, image in zip(row, images[-1], strict=False):
            buffer[: image.shape[0], : image.shape[1]] = image
    return ragged(images), padded


@pytest.mark.parametrize("rows", [slice(None), slice(1, 3), np.array([3, 0, 3])])
def test_rows_are_padded_when_they_are_taken(both, rows):
    images, padded = both
    np.testing.assert_array_equal(pad(images[rows], SHAPE), padded[rows])


def test_devices_get_their_rows_and_the_host_never_has_all(both, monkeypatch):
    images, padded = both
    counts = []
    monkeypatch.setattr(module, "pad", lambda images, shape: counts.append(len(images)) or pad(images, shape))
    placed = shard_images(images, SHAPE, make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    np.testing.assert_array_equal(jax.device_get(placed), padded)
    assert counts == [1, 1, 1, 1]  # of eight devices: neighbours share
    np.testing.assert_array_equal(shard_images(images, SHAPE, None), padded)


@pytest.mark.parametrize(
    "video, shape, message",
    [
        (
            False,
            scripted_model.shape()._replace(height=64),
            "2 images of up to 150x136 pixels do not fit 96 tokens and 2 pic",
        ),
        (
            True,
            scripted_model.shape()._replace(images=3),
            "a video and pictures shown with up to 16 patches do not fit",
        ),
        (False, scripted_model.shape()._replace(patches=8), "pictures shown with up to 16 patches do not fit"),
    ],
)
def test_prompts_that_do_not_fit_their_shape_say_so(video, shape, message):
    with pytest.raises(PromptError, match=message):
        queries = scripted_model.queries(3, video=video)
        build_prompts(
            queries, scripted_model.vocabulary(), scripted_model.token_tables(), scripted_model.CONFIG, shape=shape
        )
