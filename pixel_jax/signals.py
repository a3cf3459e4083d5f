"""Handles Ctrl-C and SIGTERM at any moment: during a compilation, while waiting for data, at the program's end."""

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

INTERRUPTED = 130  # exit code of a program that Ctrl-C ended: 128 + SIGINT
WORDS = 3.0  # seconds that the last output may take: the reader of standard output may have stopped reading
SAVES = "It saves and ends; Ctrl-C again ends it at once."


class Signals:
    """Ends the program on Ctrl-C, or, after `save_first`, asks it to save and stop.

    No handler raises an exception: raised at an arbitrary place it may be lost in a destructor and leave threads waiting for
    each other. A thread of its own receives the signals, so that they count also while the main thread is in compiled code.
    """

    def __init__(self):
        self.requested = False  # whether the program was asked to save and stop
        self.name: str | None = None
        self._saves = False
        self._interrupts = 0
        self._words = SAVES
        self._pipe: tuple[socket.socket, socket.socket] | None = None
        self._last: list[Callable[[], None]] = []

    def listen(self, name: str | None) -> None:
        """Makes Ctrl-C end the program with the exit code 130 and, unless `name` is None, a line on standard error.

        It is called in the main thread, as early as possible.
        """
        self.name = name
        if self._pipe is not None:
            return
        self._last.append(_terminal_as_it_is())
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._pipe = reader, writer
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # signals of a child process are not ours
        signal.signal(signal.SIGINT, self._take)
        threading.Thread(target=self._hear, args=(reader,), daemon=True, name="signals").start()

    def save_first(self, words: str = SAVES) -> None:
        """Makes SIGTERM and the first Ctrl-C only set `requested` and say `words`, if any; a second Ctrl-C ends the program."""
        self.listen(self.name)
        self._saves, self._words = True, words
        signal.signal(signal.SIGTERM, self._take)

    @contextlib.contextmanager
    def stoppable(self, words: str) -> Iterator[None]:
        """Makes the first Ctrl-C within the block only set `requested` and say `words`; a second one ends the program."""
        before = self._saves, self._words
        self.requested, self._interrupts = False, 0
        self._saves, self._words = True, words
        try:
            yield
        finally:
            self._saves, self._words = before
            self.requested, self._interrupts = False, 0

    @contextlib.contextmanager
    def at_end(self, work: Callable[[], None]) -> Iterator[None]:
        """Runs `work`, which must be quick, at the end of the block, also if Ctrl-C ends the program within it."""
        self._last.append(work)
        try:
            yield
        finally:
            self._last.remove(work)
            work()

    def _take(self, number: int, frame) -> None:
        """Handles a signal in the main thread: one that the program sends to itself takes effect before its next line."""
        self.requested = self.requested or self._saves

    def _hear(self, pipe: socket.socket) -> None:
        while numbers := pipe.recv(64):
            for number in numbers:
                if number == signal.SIGINT:
                    self._interrupt()
                elif number == signal.SIGTERM:
                    self.requested = self.requested or self._saves

    def _interrupt(self) -> None:
        self._interrupts += 1
        if not self._saves or self._interrupts > 1:
            end(INTERRUPTED, f"{self.name}: interrupted" if self.name else "", self._last)
        self.requested = True
        if self._words:
            _within(WORDS, lambda: print(f"\n{self._words}", file=sys.stderr, flush=True))


def end(code: int, words: str = "", last: Sequence[Callable[[], None]] = ()) -> NoReturn:
    """Ends the process now, even if threads are waiting. Output that is buffered is written first."""

    def speak() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        for work in reversed(last):
            with contextlib.suppress(Exception):
                work()
        if words:
            print(f"\n{words}" if sys.stderr.isatty() else words, file=sys.stderr, flush=True)

    _within(WORDS, speak)
    os._exit(code)


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Ends the process when the program in the block ends, even if a thread waits for something that never comes."""
    code: object = 0
    try:
        yield
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()  # JAX tells the other processes here
    if isinstance(code, str):
        print(code, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or its reader has gone
            stream.flush()
    end(code if isinstance(code, int) else int(code is not None))


def _within(seconds: float, work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)


def _terminal_as_it_is() -> Callable[[], None]:
    """Returns a function that restores the terminal's settings, which a prompt for input changes."""
    try:
        import termios

        attributes = termios.tcgetattr(0)
    except Exception:  # no terminal
        return lambda: None
    return lambda: termios.tcsetattr(0, termios.TCSADRAIN, attributes)


SIGNALS = Signals()
