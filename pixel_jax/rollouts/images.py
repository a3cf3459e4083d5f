"""The images of prompts as the host keeps them, each at its own size, and their way to the devices.

Compiled programs read them out of arrays with room for the largest. The host never has those but for the rows of one device.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from pixel_jax.parallel.sharding import shard_rows
from pixel_jax.rollouts.shapes import BatchShape


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Those of one prompt; its rows, and what is replayed of them, share the object."""

    arrays: tuple[np.ndarray, ...]  # uint8 [h, w, 3] each
    # By tools of the host, by digest (`keep`).
    returned: dict[bytes, np.ndarray] = dataclasses.field(default_factory=dict)

    def keep(self, picture: np.ndarray) -> np.ndarray:
        """Keeps what a call of a row returned, uint8 [h, w, 3], once; its SHA-256 (of shape and pixels) as uint32 [8]."""
        digest = hashlib.sha256(np.array(picture.shape, "<i4").tobytes() + picture.tobytes()).digest()
        self.returned.setdefault(digest, picture)
        return np.frombuffer(digest, "<u4").astype(np.uint32)

    def find(self, digest: np.ndarray) -> np.ndarray:
        """The picture of a digest uint32 [8]. KeyError: it is not kept here."""
        return self.returned[np.asarray(digest).astype("<u4").tobytes()]


def ragged(prompts: Iterable[Sequence[np.ndarray]]) -> np.ndarray:
    """The images of B prompts as an array of objects, `Images` [B], of which rows are taken as of any other array."""
    images = [Images(tuple(x)) for x in prompts]
    found = np.empty(len(images), object)
    found[:] = images
    return found


def pad(images: np.ndarray, shape: BatchShape) -> np.ndarray:
    """`Images` [B] -> uint8 [B, images, height, width, 3] of `shape`, zero beyond each."""
    padded = np.zeros((len(images), shape.images, shape.height, shape.width, 3), np.uint8)
    for row, of_row in zip(padded, images, strict=True):
        for buffer, image in zip(row, of_row.arrays, strict=False):
            buffer[: image.shape[0], : image.shape[1]] = image
    return padded


def shard_images(images: np.ndarray, shape: BatchShape, mesh: Mesh | None) -> jax.Array:
    """`pad` on the devices, split by rows; each device's rows are padded when their turn comes."""
    return shard_rows(lambda rows: pad(images[rows], shape), len(images), mesh)
