"""Prompts' images as the host keeps them: without the room around them that compiled programs need."""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Those of one prompt; its rows, and what is replayed of them, share the object."""

    arrays: tuple[np.ndarray, ...]  # uint8 [h, w, 3] each
    returned: dict[bytes, np.ndarray] = dataclasses.field(
        default_factory=dict
    )  # by tools of the host, by digest (`keep`)

    def keep(self, picture: np.ndarray) -> np.ndarray:
        """Keeps what a call of a row returned, uint8 [h, w, 3], once; its SHA-256 (of shape and pixels) as uint32 [8]."""
        digest = hashlib.sha256(np.array(picture.shape, "<i4").tobytes() + picture.tobytes()).digest()
        self.returned.setdefault(digest, picture)
        return np.frombuffer(digest, "<u4").astype(np.uint32)

    def find(self, digest: np.ndarray) -> np.ndarray:
        """The picture of a digest uint32 [8]. KeyError: it is not kept here."""
        return self.returned[np.asarray(digest).astype("<u4").tobytes()]


class Canvases:
    """To NumPy an array uint8 [B, C, H, W, 3], of which only the images are in memory; rows that are taken are made then."""

    dtype = np.dtype(np.uint8)

    def __init__(self, images: Iterable[Images], room: tuple[int, int, int]):
        """`room`: C, H and W, which the images fit."""
        images = list(images)
        self.images = np.empty(len(images), object)  # [B]
        self.images[:] = images
        self.room = room

    @classmethod
    def concatenate(cls, parts: Sequence["Canvases"]) -> "Canvases":
        return cls([images for part in parts for images in part.images], parts[0].room)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.images), *self.room, 3)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows) -> np.ndarray:
        """The rows `rows` (a slice or indices), padded with zeros."""
        images = self.images[rows]
        padded = np.zeros((len(images), *self.room, 3), np.uint8)
        for row, of_row in zip(padded, images, strict=True):
            for canvas, image in zip(row, of_row.arrays, strict=False):
                canvas[: image.shape[0], : image.shape[1]] = image
        return padded

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype or np.uint8, copy=False)
