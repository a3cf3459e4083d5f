"""Readers and writers of the files in which a run records its state (`pixel_jax.files` underneath).

They are written whole or not at all. A file that is damaged nevertheless does not end the program: it counts as not written,
with a warning on standard error.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pixel_jax.files import FileError, parse_json, read_bytes, read_json, write_file
from pixel_jax.terminal import warn

Check = Callable[[Any], bool]
MAX_LINES_SAID = 3  # damaged lines of one file that are named; the rest are counted


def is_object(value: Any) -> bool:
    """Whether a JSON value is an object."""
    return isinstance(value, dict)


def to_json(value: Any, indent: int | None = None) -> str:
    """Writes a value as JSON, for `parse_json`; a number that is not finite becomes null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a value as a JSON file, whole or not at all."""
    write_file(path, to_json(value, indent=1) + "\n")


def read_note(path: str | os.PathLike, check: Check = is_object) -> Any:
    """Reads the value of a JSON file that `write_json` wrote.

    Args:
        path: the path of the file.
        check: tells whether such a file can hold a value; by default, whether it is an object.

    Returns:
        None if there is no such file, or, with a warning, if it is damaged.
    """
    if not os.path.lexists(path):
        return None
    try:
        value = read_json(path)
        if not check(value):
            raise FileError(f"{os.fspath(path)} does not hold what a run writes there")
    except FileError as error:
        warn(f"{error}. It counts as not written")
        return None
    return value


def read_json_lines(path: str | os.PathLike, **fields: Any) -> list[dict[str, Any]]:
    """Reads the objects of a file of JSON lines, in order.

    A last line without a line feed is left out: it is still being written, or its process was killed. Any other line that is no
    object with the fields is dropped with a warning.

    Args:
        path: the path of the file.
        **fields: the type of each field.
    """
    if not os.path.lexists(path):
        return []
    objects, wrong = [], []
    for number, line in enumerate(read_bytes(path).split(b"\n")[:-1], 1):
        where = f"{os.fspath(path)}:{number}"
        try:
            value = parse_json(line, where)
            if not _has(value, fields):
                raise FileError(f"{where} does not hold what a run writes there")
        except FileError as error:
            wrong.append(str(error))
        else:
            objects.append(value)
    for error in wrong[:MAX_LINES_SAID]:
        warn(f"{error}. The line is dropped")
    if len(wrong) > MAX_LINES_SAID:
        warn(f"{os.fspath(path)}: {len(wrong) - MAX_LINES_SAID} more damaged lines are dropped")
    return objects


def filter_json_lines(
    path: str | os.PathLike, keep: Callable[[dict[str, Any]], bool], **fields: Any
) -> list[dict[str, Any]]:
    """Rewrites a file of JSON lines (`read_json_lines`) without the lines that `keep` refuses, and returns the others."""
    lines = [line for line in read_json_lines(path, **fields) if keep(line)]
    write_file(path, "".join(to_json(line) + "\n" for line in lines))
    return lines


def _has(value: Any, fields: Mapping[str, Any]) -> bool:
    """Whether a value is an object with fields of these types."""
    return isinstance(value, dict) and all(key in value and isinstance(value[key], fields[key]) for key in fields)


class LineLog:
    """A file of JSON lines to which lines are appended. An incomplete last line, left by a kill, is cut off."""

    def __init__(self, path: str | os.PathLike, *, durable: bool = True):
        """Opens a log.

        Args:
            path: the path of the file.
            durable: whether each append is synchronised to the disk, to survive a loss of power.
        """
        self.durable = durable
        path = pathlib.Path(path)
        self.file = path.open("ab")
        content = read_bytes(path)
        self.file.truncate(content.rfind(b"\n") + 1)

    def append(self, values: Iterable[Mapping[str, Any]]) -> None:
        """Appends a line for each value."""
        self.file.write("".join(to_json(value) + "\n" for value in values).encode())
        self.file.flush()
        if self.durable:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self.file.close()

    def __enter__(self) -> "LineLog":
        return self

    def __exit__(self, *error) -> None:
        self.close()
