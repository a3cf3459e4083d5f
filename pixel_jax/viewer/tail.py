"""Readers of files that a run is still writing: what has been read is not read again, and an incomplete line waits."""

import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any, TypeVar

from pixel_jax.files import MAX_BYTES, FileError, open_regular, parse_json

T = TypeVar("T")
Signature = tuple[int, int, int]  # inode, size, time of the last change: another one is another content


def signature(path: str | os.PathLike) -> Signature | None:
    """The signature of a file; None: there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def recently(load: Callable[[pathlib.Path], T], most: int = 4) -> Callable[[pathlib.Path], T]:
    """Makes a reader that keeps the content of the files read last, until they change."""
    kept = functools.lru_cache(most)(lambda path, _: load(path))
    return lambda path: kept(path, signature(path))


class Tail:
    """The objects of a growing file of JSON lines.

    A last line without a line feed is still being written and is left for the next look. Any other line that is no object with
    the fields is left out and named in `problems`. A file that was replaced, as a run does when it goes on, is read anew.
    """

    def __init__(self, path: pathlib.Path, **fields: Any):
        """Prepares reading.

        Args:
            path: of the file, which need not be there yet.
            **fields: the type of each field that an object must have.
        """
        self.path, self.fields = path, fields
        self.generation = 0  # how often the file was read from its beginning
        self._begin()

    def _begin(self) -> None:
        self.generation += 1
        self.lines: list[tuple[int, int, dict[str, Any]]] = []  # first byte, length, object
        self.problems: list[str] = []
        self.count = self.read = 0  # lines and bytes
        self.seen: Signature | None = None

    def refresh(self) -> bool:
        """Reads what has been added. Returns whether anything has changed."""
        now = signature(self.path)
        if now == self.seen:
            return False
        if now is None or (self.seen is not None and now[0] != self.seen[0]) or now[1] < self.read:
            self._begin()
        self.seen = now
        if now is None:
            return True
        try:
            with open_regular(self.path) as file:
                file.seek(self.read)
                data = file.read(MAX_BYTES)
        except (FileError, OSError) as error:
            self.problems = [str(error)]
            return True
        for line in data.split(b"\n")[:-1]:
            self._add(line)
        return True

    def _add(self, line: bytes) -> None:
        self.count += 1
        start, self.read = self.read, self.read + len(line) + 1
        where = f"{self.path}:{self.count}"
        try:
            value = parse_json(line, where)
            if not isinstance(value, dict) or not all(isinstance(value.get(x), y) for x, y in self.fields.items()):
                raise FileError(f"{where} does not hold what a run writes there")
        except FileError as error:
            self.problems.append(f"{str(error)[:300]}. The line is left out")
        else:
            self.lines.append((start, len(line), value))

    @property
    def values(self) -> list[dict[str, Any]]:
        """The objects, in order."""
        return [value for _, _, value in self.lines]
