"""Preemption: a notice that the machine will be taken away (SIGTERM), or that the user stops the run (Ctrl-C).

The run finishes its step, or abandons a step that may last too long; saves; and ends with an exit code.
"""

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

from pixel_jax import signals
from pixel_jax.parallel.processes import all_gather

T = TypeVar("T")
CODE = 42  # exit code of a run that was preempted and has saved its state; started again, it resumes
POLL = 0.1  # seconds between two checks of the notice while data is waited for


class Preempted(SystemExit):
    """Ends the program with `CODE` after its state is saved. A step that can be abandoned raises it, too (`Loop.step`)."""

    def __init__(self):
        super().__init__(CODE)


class Notice:
    """The request that a run stops, made to any of its processes. Signals count after `listen`."""

    def __init__(self, heard: signals.Signals):
        self._heard = heard

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._heard.requested

    @requested.setter
    def requested(self, value: bool) -> None:
        self._heard.requested = value

    def listen(self) -> None:
        """Treats SIGTERM and Ctrl-C as a notice from now on; a second Ctrl-C ends the process at once."""
        self._heard.save_first()

    def reached(self) -> bool:
        """Whether the run is to stop here.

        All processes must call it at the same points, at least after every step, and all get the same answer.
        """
        return bool(all_gather(self.requested).any())

    def check(self) -> None:
        """Raises `Preempted` if the run is to stop here. A step calls it as long as it can be abandoned."""
        if self.reached():
            raise Preempted

    def next(self, data: Iterator[T]) -> T:
        """Returns the next item of `data`, for a step that can still be abandoned.

        Raises:
            Preempted: the run is to stop here, even if the data never arrives.
        """
        results: queue.SimpleQueue[tuple[bool, object]] = queue.SimpleQueue()

        def fetch() -> None:
            try:
                results.put((True, next(data)))
            except BaseException as error:  # raised again in the waiting thread
                results.put((False, error))

        # In a daemon thread, so that data that never arrives blocks neither the step nor the end of the process.
        threading.Thread(target=fetch, daemon=True, name="next").start()
        value: object = None
        while not self.requested:
            try:
                arrived, value = results.get(timeout=POLL)
            except queue.Empty:
                continue
            if not arrived:
                raise value  # type: ignore[misc]
            break
        self.check()
        return value  # type: ignore[return-value]


class NoNotice(Notice):
    """Of work that is not abandoned, whatever the process is told. It asks no other process."""

    def __init__(self):
        super().__init__(signals.Signals())

    def reached(self) -> bool:
        """Never."""
        return False


NOTICE = Notice(signals.SIGNALS)
