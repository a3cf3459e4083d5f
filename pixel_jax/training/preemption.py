"""Notice that the machine is about to be taken away (SIGTERM), or that somebody has had enough (Ctrl-C): finish the step, or
give it up where it may last longer than there is time; save, and say so with an exit code.
"""

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

from pixel_jax import signals
from pixel_jax.parallel.processes import all_gather

T = TypeVar("T")
CODE = 42  # exit code of a run that was preempted and saved itself: started again, it goes on
POLL = 0.1  # seconds between two looks at the notice, while data is waited for


class Preempted(SystemExit):
    """Ends the program with `CODE`; what it has done is saved. A step raises it to give itself up (`loop.run`)."""

    def __init__(self):
        super().__init__(CODE)


class Notice:
    """Whether this process, or another one of the same run, has been told to go. Listens from `listen` on."""

    def __init__(self, heard: signals.Signals):
        self._heard = heard

    @property
    def given(self) -> bool:
        return self._heard.told

    @given.setter
    def given(self, told: bool) -> None:
        self._heard.told = told

    def listen(self) -> None:
        """From now on SIGTERM and Ctrl-C are taken for a notice; a second Ctrl-C ends the process at once."""
        self._heard.save_first()

    def reached(self) -> bool:
        """Whether the run is to stop here. All processes ask at the same places, after every step at least, and are told the
        same.
        """
        return bool(all_gather(self.given).any())

    def check(self) -> None:
        """`Preempted` if the run is to stop here: asked in a step, as long as it can be given up."""
        if self.reached():
            raise Preempted

    def next(self, data: Iterator[T]) -> T:
        """The next of `data`, for a step that can still be given up.

        Raises:
            Preempted: the run is to stop here, also if the data never comes.
        """
        found: queue.SimpleQueue[tuple[bool, object]] = queue.SimpleQueue()

        def fetch() -> None:
            try:
                found.put((True, next(data)))
            except BaseException as error:  # it belongs to who waits
                found.put((False, error))

        # A thread that waits for ever must keep neither the step nor the process.
        threading.Thread(target=fetch, daemon=True, name="next").start()
        value: object = None
        while not self.given:
            try:
                came, value = found.get(timeout=POLL)
            except queue.Empty:
                continue
            if not came:
                raise value  # type: ignore[misc]
            break
        self.check()
        return value  # type: ignore[return-value]


NOTICE = Notice(signals.SIGNALS)
