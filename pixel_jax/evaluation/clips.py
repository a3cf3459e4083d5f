"""Frames of a video, chosen as MVBench's own evaluation does."""

import os
import pathlib
from collections.abc import Sequence

import numpy as np

from pixel_jax.data.clips import Clip
from pixel_jax.data.images import ImageError, image_size, read_image
from pixel_jax.files import open_regular


def frame_indices(bound: tuple[float, float] | None, rate: float, last: int, count: int, first: int = 0) -> list[int]:
    """The middle frames of `count` equal stretches of a video, by the arithmetic of MVBench's released code.

    Args:
        bound: seconds between which frames are chosen; None: the whole video.
        rate: frames a second.
        last: index of the last frame.
        count: of frames.
        first: index of the first frame.
    """
    start, end = bound or (-1e5, 1e5)
    begin, finish = max(first, round(start * rate)), min(round(end * rate), last)
    step = (finish - begin) / count
    found = [int(begin + step / 2 + np.round(step * i)) for i in range(count)]
    return [min(max(index, first), last) for index in found]


def size_of(path: str | os.PathLike) -> tuple[int, int]:
    """(height, width) of a video file, or of the first frame of a folder of frames."""
    path = pathlib.Path(path)
    if path.is_dir():
        return image_size(_listed(path)[0])
    with open_regular(path, ImageError) as file, Clip(file, str(path)) as clip:
        return clip.size


def load_clip(
    path: str | os.PathLike, bound: tuple[float, float] | None = None, *, count: int = 16, folder_rate: float = 3.0
) -> list[np.ndarray]:
    """Frames, uint8 [h, w, 3] each, of a video file or of a folder of frames (TVQA's).

    Args:
        path: of the file or folder.
        bound: seconds between which frames are chosen; None: the whole video.
        count: of frames.
        folder_rate: frames a second in a folder.

    Raises:
        ImageError: there is no video, or it is broken.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        files = _listed(path)
        # Frames of a folder are numbered from 1.
        wanted = frame_indices(bound, folder_rate, len(files), count, first=1)
        return [read_image(files[index - 1]) for index in wanted]
    with open_regular(path, ImageError) as file, Clip(file, str(path), count) as clip:
        return list(clip.show(lambda frames: frame_indices(bound, float(clip.rate or 25), frames - 1, count)))


def _listed(path: pathlib.Path) -> Sequence[pathlib.Path]:
    files = sorted(path.glob("*.jpg"))
    if not files:
        raise ImageError(f"{path} holds no frames (*.jpg)")
    return files
