"""Limits on the size of a picture or video, and on the memory that reading takes in all threads of the process together."""

import contextlib
import ctypes
import dataclasses
import threading
from collections.abc import Iterator

from pixel_jax.pictures import ImageError

# Bytes that decoding a pixel takes at most, the array that is returned included: WebP, which is decoded into two buffers
# of 4 bytes and copied twice, and photographs turned by their EXIF. Measured: up to 20.
PICTURE_BYTES = 24


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits on what is read. Sizes are those in the file's header, which is read before anything is decoded.

    Threads wait until enough of `memory` is left for the sizes in the headers. It bounds what reading takes, not the pixels that
    are returned: each thread holds those of one question.
    """

    side: int = 65_535  # pixels of a picture or a frame; what JPEG can hold
    pixels: int = 1 << 26  # of a picture or a frame; Pillow itself stops pictures at 178,956,970
    memory: int = 4 << 30  # bytes: a quarter for the content of files, the rest for decoding

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} must be positive, not {getattr(self, field.name)}")

    def check(self, width: int, height: int, name: str) -> None:
        """Raises an ImageError if a picture or a frame of this size is too large."""
        if max(width, height) > self.side:
            raise ImageError(f"{name} is {width} x {height} pixels, more than {self.side} on a side (limits.side)")
        if width * height > self.pixels:
            raise ImageError(f"{name} is {width} x {height} pixels, more than {self.pixels} in all (limits.pixels)")


def _give_back() -> None:
    """Returns freed memory to the system: glibc, unlike other allocators, keeps what a thread has freed for that thread."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Budget:
    """A number of bytes that all threads share."""

    def __init__(self, total: int):
        self.total, self._used, self._changed = total, 0, threading.Condition()

    @contextlib.contextmanager
    def reserve(self, size: int, name: str) -> Iterator[None]:
        """Waits until `size` bytes are free, and reserves them. ImageError: the whole budget is smaller."""
        if size > self.total:
            raise ImageError(
                f"{name} takes {size:,} bytes to read, more than the {self.total:,} there are (limits.memory)"
            )

        def fits() -> bool:
            return self._used + size <= self.total

        with self._changed:
            waited = not fits()
            self._changed.wait_for(fits)
            self._used += size
        if waited:
            _give_back()
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


class _Process:
    """The limits of this process, and what is left of its memory.

    A thread reserves memory for content before memory for decoding, and each at most once, so threads cannot deadlock.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.content = Budget(limits.memory // 4)
        self.decoding = Budget(limits.memory - limits.memory // 4)


_process = _Process(Limits())


def use_limits(limits: Limits) -> None:
    """Sets the limits of this process. Files that are being read keep the limits with which they were opened."""
    global _process
    _process = _Process(limits)


def limits() -> Limits:
    """The limits of this process."""
    return _process.limits


def reserve_content(size: int, name: str) -> contextlib.AbstractContextManager[None]:
    """Reserves memory for `size` bytes of a file."""
    return _process.content.reserve(size, name)


def reserve_decoding(size: int, name: str, *, wary: int = 0) -> contextlib.AbstractContextManager[None]:
    """Reserves memory for pixels and for decoding them: `size` bytes, or `wary` bytes (at most the whole budget) if more."""
    budget = _process.decoding
    return budget.reserve(max(size, min(wary, budget.total)), name)
