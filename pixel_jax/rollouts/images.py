"""The images of prompts: on the host each at its own size, on the devices in image buffers of one size.

The host pads the images of one device at a time, so that it never has the buffers of all.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from pixel_jax.arrays import AnyArray
from pixel_jax.parallel.sharding import shard_rows
from pixel_jax.rollouts.shapes import BatchShape


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """The images of one prompt. Its rows share the object, also in a replay buffer."""

    arrays: tuple[np.ndarray, ...]  # uint8 [h, w, 3] each
    # Pictures that host tools have returned to rows of the prompt, by digest (`keep`).
    returned: dict[bytes, np.ndarray] = dataclasses.field(default_factory=dict)

    def keep(self, picture: np.ndarray) -> np.ndarray:
        """Stores a picture uint8 [h, w, 3] of a host tool, once; returns its SHA-256 (of shape and pixels), uint32 [8]."""
        digest = hashlib.sha256(np.array(picture.shape, "<i4").tobytes() + picture.tobytes()).digest()
        self.returned.setdefault(digest, picture)
        return np.frombuffer(digest, "<u4").astype(np.uint32)

    def find(self, digest: AnyArray) -> np.ndarray:
        """Returns the picture of a digest uint32 [8].

        Raises:
          KeyError: it is not stored here.
        """
        return self.returned[np.asarray(digest).astype("<u4").tobytes()]


def ragged(prompts: Iterable[Sequence[np.ndarray]]) -> np.ndarray:
    """Returns the images of B prompts as an array of objects, `Images` [B], which is indexed like any other array."""
    images = [Images(tuple(x)) for x in prompts]
    array = np.empty(len(images), object)
    array[:] = images
    return array


def pad(images: np.ndarray, shape: BatchShape) -> np.ndarray:
    """Makes image buffers of `shape`: `Images` [B] -> uint8 [B, images, height, width, 3], zero beyond each image."""
    padded = np.zeros((len(images), shape.images, shape.height, shape.width, 3), np.uint8)
    for row, of_row in zip(padded, images, strict=True):
        for buffer, image in zip(row, of_row.arrays, strict=False):
            buffer[: image.shape[0], : image.shape[1]] = image
    return padded


def shard_images(images: np.ndarray, shape: BatchShape, mesh: Mesh | None) -> jax.Array:
    """Puts the image buffers on the devices, split by rows; the rows of one device are padded at a time."""
    return shard_rows(lambda rows: pad(images[rows], shape), len(images), mesh)
