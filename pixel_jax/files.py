"""Reads files with limits and with errors that name them, and writes them whole or not at all."""

import codecs
import json
import math
import os
import pathlib
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NoReturn

MAX_DEPTH = 100  # lists and objects inside one another
MAX_BYTES = 2**30  # of one document
MAX_INTEGER = 2**64  # beyond it a number is no count, size or identity

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # an escape that may be half a character


class FileError(ValueError):
    """A file with unexpected content. The message begins with its name."""


def open_regular(path: str | os.PathLike, error: Callable[[str], Exception] = FileError) -> BinaryIO:
    """Opens a regular file for reading. A folder, a device or a named pipe, on which reading may wait for ever, is refused.

    Raises:
        error: the path cannot be opened, or is no regular file. The message names it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as reason:
        raise error(f"{os.fspath(path)!r} cannot be opened: {getattr(reason, 'strerror', None) or reason}") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise error(f"{os.fspath(path)!r} is not a regular file" + ": it is a folder" * stat.S_ISDIR(mode))
    return open(descriptor, "rb")


def read_bytes(
    path: str | os.PathLike, *, limit: int = MAX_BYTES, error: Callable[[str], Exception] = FileError
) -> bytes:
    """Reads the content of a regular file of at most `limit` bytes.

    Raises:
        error: the file cannot be read, or is longer. The message names it.
    """
    with open_regular(path, error) as file:
        try:
            data = file.read(limit + 1)
        except OSError as reason:
            raise error(f"{os.fspath(path)!r} cannot be read: {reason.strerror or reason}") from None
    if len(data) > limit:
        raise error(f"{os.fspath(path)!r} has more than {limit:,} bytes")
    return data


def read_json(path: str | os.PathLike, *, limit: int = MAX_BYTES, error: Callable[[str], Exception] = FileError) -> Any:
    """Reads the value of a JSON file, as `parse_json` does.

    Raises:
        error: the file cannot be read, is too long, or is not JSON. The message names it.
    """
    return parse_json(read_bytes(path, limit=limit, error=error), os.fspath(path), error)


def parse_json(
    text: str | bytes, where: str, error: Callable[[str], Exception] = FileError, *, largest: int = MAX_INTEGER
) -> Any:
    """Parses a JSON document (RFC 8259); whatever two parsers may read differently is refused.

    Args:
        text: the document; bytes are UTF-8, with or without a byte order mark.
        where: what messages call it, such as `FILE:LINE`.
        error: the class of the errors.
        largest: the largest absolute value of an integer.

    Raises:
        error: the text is not UTF-8 or not JSON; an object has a key twice; a number is NaN, infinite, or an integer beyond
            `largest`; a text holds half a surrogate pair; or it is nested deeper than `MAX_DEPTH`.
    """
    if isinstance(text, bytes):
        _refuse_utf16(text, where, error)
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as reason:
            raise error(f"{where} is not UTF-8: {reason}") from None
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=lambda digits: _integer(digits, largest),
            parse_float=_number,
            parse_constant=_constant,
        )
    except RecursionError:
        raise error(f"{where} is nested deeper than {MAX_DEPTH} levels") from None
    except (ValueError, MemoryError) as reason:
        raise error(f"{where} is not JSON: {reason or 'too large'}") from None
    if wrong := _flaw(value, texts=bool(_SURROGATE.search(text)) or not _encodes(text)):
        raise error(f"{where} {wrong}")
    return value


def read_lines(
    path: str | os.PathLike, *, limit: int = MAX_BYTES, error: Callable[[str], Exception] = FileError
) -> Iterator[tuple[str, bytes]]:
    """Iterates over the lines of a file that are not blank, as pairs of `FILE:LINE` and the line, for `parse_json`.

    Only a line feed ends a line: U+2028 and U+0085 may stand in a JSON text as they are.

    Raises:
        error: the file cannot be read, is UTF-16, or has a line of more than `limit` bytes. The message names it.
    """
    name = os.fspath(path)
    with open_regular(path, error) as file:
        try:
            _refuse_utf16(file.read(2), repr(name), error)
            file.seek(0)
            for number, line in enumerate(iter(lambda: file.readline(limit + 1), b""), 1):
                if len(line) > limit:
                    raise error(f"{name}:{number} has more than {limit:,} bytes")
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield f"{name}:{number}", line
        except OSError as reason:
            raise error(f"{name!r} cannot be read: {reason.strerror or reason}") from None


def _refuse_utf16(data: bytes, where: str, error: Callable[[str], Exception]) -> None:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise error(f"{where} is UTF-16: save it as UTF-8")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice[:80]!r} occurs twice")
    return value


def _integer(digits: str, largest: int) -> int:
    value = int(digits) if len(digits) <= 100 else largest + 1
    if abs(value) > largest:
        raise ValueError(f"the number {digits[:24]}... has more than {largest.bit_length() - 1} bits")
    return value


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:24]} is too large")
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _encodes(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _flaw(value: Any, *, texts: bool) -> str:
    """Says what is wrong with a parsed document ("": nothing): its depth, or with `texts` a text that is not Unicode."""
    level, depth = [value], 0
    while level:
        if texts and not all(_encodes(x) for x in level if isinstance(x, str)):
            return "holds half a surrogate pair, which is no Unicode text"
        inner: list[Any] = []
        for x in level:
            if isinstance(x, dict):
                inner += x.values()
                inner += x.keys() if texts else ()
            elif isinstance(x, list):
                inner += x
        level = inner if texts else [x for x in inner if isinstance(x, dict | list)]
        depth += 1
        if depth >= MAX_DEPTH and any(isinstance(x, dict | list) for x in level):
            return f"is nested deeper than {MAX_DEPTH} levels"
    return ""


def write_file(path: str | os.PathLike, data: str | bytes) -> None:
    """Writes a file whole or not at all, also if power is lost meanwhile, with the permissions of a new file.

    The bytes reach the disk before the name does: file and directory are synchronised (fsync).
    """
    path = pathlib.Path(path)
    if isinstance(data, str):
        data = data.encode("utf-8")
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name[:64]}.", suffix=".partial", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            settle(descriptor)
        os.replace(partial, path)
    except BaseException:
        pathlib.Path(partial).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def settle(file: int | str | os.PathLike) -> None:
    """Gives a written file (a path or descriptor) the permissions of a new one, and synchronises it to the disk."""
    descriptor = file if isinstance(file, int) else os.open(file, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fchmod(descriptor, 0o666 & ~_UMASK)
        os.fsync(descriptor)
    finally:
        if descriptor is not file:
            os.close(descriptor)


def sync_directory(path: str | os.PathLike) -> None:
    """Makes the names in a directory survive a loss of power, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems cannot
        pass
    finally:
        os.close(descriptor)


def _umask() -> int:
    value = os.umask(0o077)
    os.umask(value)
    return value


_UMASK = _umask()  # read once, when the program starts: reading it sets it, which is not safe among threads
