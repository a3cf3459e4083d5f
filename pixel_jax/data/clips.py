"""Video files: some frames, spread evenly over the whole, as Qwen's own preprocessing takes them."""

from collections.abc import Collection
from typing import BinaryIO

import numpy as np

from pixel_jax.data.images import MAX_PIXELS, MAX_SIDE, ImageError

FRAMES = 16  # of a video (Pixel Reasoner §3); fewer if it has fewer
MAX_PACKETS = 1 << 18  # an hour and more at sixty frames a second

# By their first bytes. The demuxer is named, never guessed: playlists, which open other files, are not among them.
SIGNATURES = ((4, b"ftyp", "mp4"), (0, b"\x1a\x45\xdf\xa3", "matroska"), (0, b"RIFF", "avi"))


def container_of(head: bytes) -> str | None:
    for start, mark, container in SIGNATURES:
        if head[start : start + len(mark)] == mark and (container != "avi" or head[8:11] == b"AVI"):
            return container
    return None


def is_clip(head: bytes) -> bool:
    """Whether a file that begins with these (at least twelve) bytes is a video that `read_clip` reads."""
    return container_of(head) is not None


def read_clip(file: BinaryIO, name: str) -> tuple[list[np.ndarray], float]:
    """(`FRAMES` frames or all, evenly spread, uint8 [h, w, 3] each; the seconds that two neighbours cover).

    ImageError: no video, too large, too long, broken, or fewer frames than it promises.
    """
    with Clip(file, name) as clip:
        wanted = spread(clip.count)
        frames = clip.frames(wanted)
        missing = [i for i in wanted if i not in frames]
        if missing:
            raise ImageError(f"{name} ends before frame {missing[0]} of {clip.count}")
        return [frames[i] for i in wanted], float(2 * clip.count / clip.rate / len(wanted)) if clip.rate else 1.0


def clip_size(file: BinaryIO, name: str) -> list[tuple[int, int]]:
    """(height, width) of every frame that `read_clip` would return."""
    with Clip(file, name) as clip:
        return [clip.size] * len(spread(clip.count))


def spread(count: int) -> list[int]:
    """Numbers of the frames to be shown of `count`."""
    return np.linspace(0, count - 1, min(count, FRAMES)).round().astype(int).tolist()


class Clip:
    """An open video file: `size` (height, width) and `count` of its frames, `rate` a second (None: it does not say).

    ImageError: no video, too large, too long or broken, on opening or later.
    """

    def __init__(self, file: BinaryIO, name: str):
        self.file, self.name = file, name

    def __enter__(self) -> "Clip":
        try:
            import av
        except ImportError:
            # No ImageError: nothing is wrong with the video, and it shall not be left out as if there were.
            raise ValueError(f"{self.name} is a video file: `pip install -e .[data]` to read it") from None

        kind = container_of(self.file.read(16))
        self.file.seek(0)
        if kind is None:
            raise ImageError(f"{self.name} is no video file (MP4, Matroska, WebM or AVI)")
        try:
            self.container = av.open(self.file, format=kind)
            if not self.container.streams.video:
                raise ImageError(f"{self.name} has no video in it")
            self.stream = self.container.streams.video[0]
            self.stream.thread_type = "NONE"  # frames come from threads of our own
            self.size = self.stream.codec_context.height, self.stream.codec_context.width
            if not 0 < min(self.size) <= max(self.size) <= MAX_SIDE or self.size[0] * self.size[1] > MAX_PIXELS:
                raise ImageError(f"{self.name} has frames of {self.size[1]} x {self.size[0]} pixels")
            self.rate = self.stream.average_rate
            self.count = 0
            for packet in self.container.demux(self.stream):
                self.count += packet.size > 0
                if self.count > MAX_PACKETS:
                    raise ImageError(f"{self.name} has more than {MAX_PACKETS} frames")
            self.container.seek(0)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        if not self.count:
            raise ImageError(f"{self.name} has no frames")
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if hasattr(self, "container"):
            self.container.close()
        if isinstance(error, Exception) and not isinstance(error, ImageError):  # a decoder's own, of every kind
            raise ImageError(f"{self.name} cannot be read: {error}") from error

    def frames(self, wanted: Collection[int]) -> dict[int, np.ndarray]:
        """The frames of these numbers, uint8 [h, w, 3]; those that the file promises and does not have are missing."""
        found, last = {}, max(wanted)
        for i, frame in enumerate(self.container.decode(self.stream)):
            if i in wanted:
                if (frame.height, frame.width) != self.size:
                    raise ImageError(f"{self.name}: frame {i} is {frame.width} x {frame.height}, the first one is not")
                found[i] = frame.to_ndarray(format="rgb24")
            if i >= last:
                break
        return found
