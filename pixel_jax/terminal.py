"""Writes to the terminal: foreign text is made harmless, and output that cannot be written does not end the program."""

import contextlib
import io
import os
import shutil
import sys
import threading
import time
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.table import Table
    from typing_extensions import Buffer

BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # reorder what is shown


def printable(text: Any) -> str:
    """Writes control characters of `text` as escapes, so that no file name and no model can steer the terminal.

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
    """Returns the `repr` of a foreign value, for a message; a long one is cut."""
    text = repr(value[: length + 1] if isinstance(value, str | bytes | list | tuple) else value)
    return text if len(text) <= length else f"{text[:length]}..."


def say(text: Any, stream: TextIO | None = None) -> None:
    """Prints foreign text as `printable` shows it, by default on standard output."""
    put(f"{printable(text)}\n", sys.stdout if stream is None else stream)


def warn(text: Any) -> None:
    """Prints foreign text on standard error, as `say` does."""
    say(text, sys.stderr)


_OUTPUT = threading.RLock()
_progressed = 0.0  # the time of the last such line that shows progress
_passing: TextIO | None = None  # the terminal on which a line stands that the next output replaces


def put(text: str, stream: TextIO | None, *, passing: bool = False) -> None:
    """Writes text at once. Where that fails (a closed pipe, a full disk) the text is lost and nothing is raised.

    Args:
        text: what is written.
        stream: where to; None: the program was started without it, and nothing is written.
        passing: whether the text is a line of a terminal that the next output replaces, whoever writes it.
    """
    global _progressed
    end_starting()
    if passing:
        _progressed = time.monotonic()
    _write_over(text, stream, passing=passing)


def _write_over(text: str, stream: TextIO | None, *, passing: bool = False) -> None:
    global _passing
    if stream is None:
        return
    with _OUTPUT:
        before, _passing = _passing, stream if passing else None
        if before is not None or passing:
            _write("\r\x1b[K", before or stream)
        _write(text, stream)


def _write(text: str, stream: TextIO) -> None:
    # ValueError: the stream is closed, or its encoding lacks a character.
    with contextlib.suppress(OSError, ValueError):
        print(text, file=stream, end="", flush=True)


def leave_line() -> None:
    """Lets the line that the next output would replace stay, and goes on below it."""
    global _passing
    with _OUTPUT:
        stream, _passing = _passing, None
        _write_over("\n", stream)


def is_live(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal, on which a line can be rewritten."""
    return stream is not None and not stream.closed and stream.isatty()


QUIET = "PIXEL_JAX_QUIET"  # an environment variable, so that the processes that a command starts are quiet, too


def is_quiet() -> bool:
    """Whether no progress is shown (`--quiet`). Results, warnings and errors are."""
    return bool(os.environ.get(QUIET))


def be_quiet() -> None:
    """Shows no progress from here on, in this process and those that it starts."""
    os.environ[QUIET] = "1"


def progress(text: Any, stream: TextIO | None = None) -> None:
    """Prints a line about what is going on, on standard error unless told otherwise, if the program is not quiet."""
    if not is_quiet():
        say(text, stream or sys.stderr)


class Waiting:
    """Says what the program is doing, with the seconds, as long as it does it and if that takes a while.

    On a terminal it is one line that goes when the work has ended; elsewhere it is a line when it is first said, and one for
    how far it is, at most every `every` seconds. Of works within others the innermost is shown; one whose progress is shown
    otherwise (a passing line) needs no more words.

    Args:
        what: the work in words, such as "reading the data".
        about: the seconds that it took the last time; None: not known.
        after: the seconds after which it is said.
        every: the seconds between two lines where there is no terminal.
        stream: None: standard error.
        shown: whether it is said at all.
    """

    def __init__(
        self,
        what: str,
        *,
        about: float | None = None,
        after: float = 2.0,
        every: float = 10.0,
        stream: TextIO | None = None,
        shown: bool = True,
    ):
        end_starting()
        self.what = printable(what) + ("" if about is None else f", about {about:.0f} s")
        self.far, self.after, self.every, self.stream = "", after, every, stream or sys.stderr
        self.live = is_live(self.stream)
        self.began, self.ended = time.monotonic(), threading.Event()
        self.said = self.began
        self.thread: threading.Thread | None = None
        if is_quiet() or not shown:
            return
        _waits.append(self)
        if not self.live and after <= 0:
            self._say()
        else:
            self.thread = threading.Thread(target=self._run, name=what, daemon=True)
            self.thread.start()

    def at(self, far: str) -> None:
        """Says how far the work is, such as "3 of 15 GB"."""
        self.far = f": {printable(far)}"
        if not self.live and self in _waits and time.monotonic() - self.said >= self.every:
            self._say()

    def _run(self) -> None:
        if self.ended.wait(self.after):
            return
        if not self.live:
            self._say()
            return
        while True:
            if _waits[-1:] == [self] and _progressed < self.began:
                line = f"{self.what}{self.far} ... {time.monotonic() - self.began:.0f} s"
                _write_over(line[: shutil.get_terminal_size().columns - 1], self.stream, passing=True)
            if self.ended.wait(1.0):
                _write_over("", self.stream)
                return

    def _say(self) -> None:
        self.said = time.monotonic()
        _write_over(f"{self.what}{self.far} ...\n", self.stream)

    def end(self) -> None:
        """Ends it."""
        self.ended.set()
        if self in _waits:
            _waits.remove(self)
        if self.thread is not None:
            self.thread.join()

    def __enter__(self) -> "Waiting":
        return self

    def __exit__(self, *error) -> None:
        self.end()


def bar(share: float, width: int = 20) -> str:
    """Draws a bar of `width` characters, of which the share that is done is filled."""
    filled = int(share * width)
    return "#" * filled + "-" * (width - filled)


_waits: list[Waiting] = []  # that go on, the innermost last
_starting: Waiting | None = None


def start() -> None:
    """Says on a terminal that the program is starting, until it says anything else."""
    global _starting
    _starting = Waiting("starting", shown=is_live(sys.stderr))


def end_starting() -> None:
    """Says no longer that the program is starting."""
    global _starting
    ended, _starting = _starting, None
    if ended is not None:
        ended.end()


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1, title: str = "", caption: str = ""
) -> "Table":
    """Makes a table of foreign text: no cell is markup, and control characters are escaped.

    Args:
        head: names of the columns.
        rows: cells; a row may end early.
        words: the number of leading columns that hold words and are aligned to the left; the others hold numbers.
        title: a line above the table.
        caption: lines below it.
    """
    from rich.table import Table
    from rich.text import Text

    content = Table(
        title=Text(printable(title)) if title else None,
        title_justify="left",
        caption=Text(printable(caption)) if caption else None,
        caption_justify="left",
        box=None,
        pad_edge=False,
    )
    for i, name in enumerate(head):
        content.add_column(Text(name), justify="left" if i < words else "right", no_wrap=True)
    for row in rows:
        content.add_row(*(Text(printable(cell).replace("\n", "\\n")) for cell in row))
    return content


def print_table(content: "Table", stream: TextIO | None = None) -> None:
    """Prints a table. A narrow terminal, or a file, gets long lines rather than cut cells."""
    from rich.console import Console

    put("", sys.stdout if stream is None else stream)  # a line that is passing goes
    Console(file=stream, highlight=False, width=1000).print(content)


def table_text(content: "Table") -> str:
    """Writes a table as `print_table` does to a file, and returns the text without the line feed at its end."""
    text = io.StringIO()
    print_table(content, text)
    return text.getvalue().rstrip("\n")


NAMES = {1: "output", 2: "error"}


class Lossy(io.FileIO):
    """Standard output or error as a raw stream: what it cannot write is lost, with one line about it on standard error."""

    lost = False

    def write(self, data: "Buffer", /) -> int:
        """Writes what can be written; returns the number of bytes as if all had been."""
        try:
            return super().write(data)
        except OSError as error:
            if not self.lost:
                self.lost = True
                try:
                    os.write(2, f"standard {NAMES[self.fileno()]} is lost: {error.strerror}\n".encode())
                except OSError:
                    pass
            return memoryview(data).nbytes


def keep_streams() -> None:
    """Replaces standard output and error by streams on which a failed write does not end the program.

    Characters that the encoding of the locale lacks are written as escapes. Streams that were replaced before stay.
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
