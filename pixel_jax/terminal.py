"""What people see of a program: foreign text made harmless, and output that ends no program when it cannot be written."""

import io
import os
import sys
import unicodedata
from typing import Any, TextIO

BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # reorder what is shown


def printable(text: Any) -> str:
    """`text` as a terminal may show it: control characters as escapes, so that no file name or model can steer it.

    Line feeds and tabs stay. Escaped are the other control characters (Unicode category Cc, with it ESC and the C1 codes),
    line and paragraph separators, marks that reverse the direction of what follows, and halves of surrogate pairs.
    """
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(x) if _steers(x) else x for x in text)


def _steers(character: str) -> bool:
    if character in "\n\t":
        return False
    return character in BIDIRECTIONAL or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def brief(value: Any, length: int = 200) -> str:
    """`repr` of a value from outside, for a message: of a long one its beginning."""
    text = repr(value[: length + 1] if isinstance(value, str | bytes | list | tuple) else value)
    return text if len(text) <= length else f"{text[:length]}..."


def say(text: Any, stream: TextIO | None = None) -> None:
    """Prints a line of foreign text, as `printable` shows it; `stream` is by default standard output."""
    put(f"{printable(text)}\n", sys.stdout if stream is None else stream)


def warn(text: Any) -> None:
    """`say` on standard error."""
    say(text, sys.stderr)


def put(text: str, stream: TextIO | None) -> None:
    """Writes `text` at once, if it can be: nobody listening (a closed pipe, a full disk) is no reason to end."""
    if stream is None:  # as Python has it where the program was started without
        return
    try:
        print(text, file=stream, end="", flush=True)
    except (OSError, ValueError):  # ValueError: the stream is closed, or its encoding lacks a character
        pass


NAMES = {1: "output", 2: "error"}


class Lossy(io.FileIO):
    """Standard output or error that loses what it cannot write, and says so once on standard error."""

    lost = False

    def write(self, data: bytes, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if not self.lost:
                self.lost = True
                try:
                    os.write(2, f"standard {NAMES[self.name]} is lost: {error.strerror}\n".encode())
                except OSError:
                    pass
            return len(data)


def keep_streams() -> None:
    """Makes standard output and error last as long as the program: what cannot be written is lost and ends nothing.

    Characters that the encoding of the locale lacks are written as escapes. Streams that somebody has replaced stay.
    """
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream, original = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is not original:
            continue
        if stream is None:  # it was closed before the program began: no file may take its place
            null = os.open(os.devnull, os.O_WRONLY)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            encoding, live = "utf-8", False
        else:
            stream.flush()
            encoding, live = stream.encoding, stream.isatty() or name == "stderr"
        raw = io.BufferedWriter(Lossy(descriptor, "w", closefd=False))
        lasting = io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace", line_buffering=live)
        setattr(sys, name, lasting)
