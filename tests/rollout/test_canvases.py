"""Images without the room around them are, to NumPy and to the devices, arrays with it."""

import jax
import numpy as np
import pytest

from pixel_jax.parallel import make_mesh
from pixel_jax.parallel.sharding import shard_batch
from pixel_jax.rollout.canvases import Canvases, Images
from pixel_jax.training.origins import origins
from tests.rollout import talker

SIZES = [[(5, 7)], [(8, 8), (3, 2)], [(1, 6)], [(4, 4), (4, 4), (2, 8)]]


@pytest.fixture
def both():
    """The canvases, and the array written by hand."""
    random = np.random.default_rng(0)
    images, padded = [], np.zeros((4, 3, 8, 9, 3), np.uint8)
    for row, sizes in zip(padded, SIZES, strict=True):
        images.append(Images(tuple(random.integers(1, 256, (*size, 3)).astype(np.uint8) for size in sizes)))
        for canvas, image in zip(row, images[-1].arrays, strict=False):
            canvas[: image.shape[0], : image.shape[1]] = image
    return Canvases(images, (3, 8, 9)), padded


@pytest.mark.parametrize("rows", [slice(None), slice(1, 3), np.array([3, 0, 3])])
def test_rows_are_padded_when_they_are_taken(both, rows):
    canvases, padded = both
    assert canvases.shape == padded.shape and canvases.dtype == padded.dtype and len(canvases) == 4
    np.testing.assert_array_equal(canvases[rows], padded[rows])
    np.testing.assert_array_equal(canvases, padded)
    joined = Canvases.concatenate([canvases, Canvases(canvases.images[:1], canvases.room)])
    np.testing.assert_array_equal(joined, np.concatenate([padded, padded[:1]]))


def test_devices_get_their_rows_and_the_host_never_has_all(both, monkeypatch):
    canvases, padded = both
    taken, take = [], Canvases.__getitem__
    monkeypatch.setattr(Canvases, "__getitem__", lambda self, rows: taken.append(rows) or take(self, rows))
    placed = shard_batch(canvases, make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    np.testing.assert_array_equal(jax.device_get(placed), padded)
    assert sorted({(part.start, part.stop) for part in taken}) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert len(taken) == 4  # of eight devices: neighbours share


def test_learning_says_what_it_cannot_do_without():
    prompts = talker.prompts(2)
    with pytest.raises(TypeError, match="Canvases.*build_prompts.*ndarray"):
        origins(prompts._replace(canvases=np.asarray(prompts.canvases)), None, talker.CONFIG, None)
