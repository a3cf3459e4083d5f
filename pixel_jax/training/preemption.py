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
CODE = 42  # exit code of a run that was preempted and saved itself: started again, it goes on
POLL = 0.1  # seconds between two checks of the notice while data is waited for


class Preempted(SystemExit):
    """Ends the program with `CODE`; what it has done is saved. A step raises it to give itself up (`loop.run`)."""

    def __init__(self):
        super().__init__(CODE)


class Notice:
    """The request to stop, of this process or of another one of the same run. Signals count from `listen` on."""

    def __init__(self, heard: signals.Signals):
        self._heard = heard

    @property
    def requested(self) -> bool:
        """Whether this process was told to stop."""
        return self._heard.told

    @requested.setter
    def requested(self, value: bool) -> None:
        self._heard.told = value

    def listen(self) -> None:
        """Takes SIGTERM and Ctrl-C as a notice from now on; a second Ctrl-C ends the process at once."""
        self._heard.save_first()

    def reached(self) -> bool:
        """Whether the run is to stop here.

        All processes call it at the same points, after every step at least, and get the same answer.
        """
        return bool(all_gather(self.requested).any())

    def check(self) -> None:
        """Raises `Preempted` if the run is to stop here. A step calls it as long as it can be abandoned."""
        if self.reached():
            raise Preempted

    def next(self, data: Iterator[T]) -> T:
        """The next of `data`, for a step that can still be abandoned.

        Raises:
            Preempted: the run is to stop here, even if the data never arrives.
        """
        results: queue.SimpleQueue[tuple[bool, object]] = queue.SimpleQueue()

        def fetch() -> None:
            try:
                results.put((True, next(data)))
            except BaseException as error:  # raised again where the data is waited for
                results.put((False, error))

        # In a thread of its own, so that data that never arrives blocks neither the step nor the end of the process.
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


NOTICE = Notice(signals.SIGNALS)
