"""The thread that advances rollouts while requests come, wait, are read and leave.

It alone touches the devices. Others give it jobs (`Engine.submit`) and hear of them by calls of `Job.deliver`, in its thread.
"""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping

from absl import logging

from pixel_jax.rollouts.materialize import VisualRecord
from pixel_jax.rollouts.trajectory import HostPrompts, Trajectories
from pixel_jax.serving.metrics import Metrics
from pixel_jax.serving.session import Reader, Saw, Session, Wrote


class BusyError(Exception):
    """As many requests as are allowed are being worked on."""


class ClosedError(Exception):
    """The engine takes no more requests: it was told to end, or has failed."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """The last event of a job."""

    row: Trajectories[VisualRecord] | None  # its record, where the job asked for it
    error: Exception | None = None  # why there is no answer


Event = Wrote | Saw | Ended


@dataclasses.dataclass(eq=False)
class Job:
    """One answer that is wanted.

    Args:
      model: name of the session that writes it.
      prompts: the one prompt.
      reader: makes text of its row, and says when that is enough.
      deliver: is called with each event, `Ended` at last and once.
      record: whether `Ended` has the row.
    """

    model: str
    prompts: HostPrompts
    temperature: float
    reader: Reader
    deliver: Callable[[Event], None]
    record: bool = False
    cancelled: bool = False
    submitted: float = dataclasses.field(default_factory=time.monotonic)
    first_text: float | None = None


class Engine:
    """Sessions by the name of their model, advanced by a thread of its own.

    Args:
      sessions: of each model. Those of equal shapes share their compiled programs.
      limit: jobs at a time, written or waiting; `enter` refuses more.
      budget: tokens that rows write between two looks at who came and what was written.
    """

    def __init__(self, sessions: Mapping[str, Session], *, limit: int, budget: int, metrics: Metrics):
        self.sessions, self.limit, self.budget, self.metrics = dict(sessions), limit, budget, metrics
        self.failed: Exception | None = None
        self._entered = 0
        self._closing = False
        self._waiting: dict[str, collections.deque[Job]] = {name: collections.deque() for name in sessions}
        self._running: dict[str, dict[int, Job]] = {name: {} for name in sessions}
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread. Its programs should have been compiled (`Session.warm_up`)."""
        self._thread.start()

    def enter(self) -> None:
        """Reserves room for a request, before its body is read; `leave` gives it back.

        Raises:
          BusyError, ClosedError: there is none.
        """
        with self._changed:
            if self._closing or self.failed is not None:
                raise ClosedError(f"it has failed: {self.failed}" if self.failed else "it is shutting down")
            if self._entered >= self.limit:
                raise BusyError(f"{self._entered} requests are being worked on, and {self.limit} are allowed")
            self._entered += 1

    def leave(self) -> None:
        """Gives back what `enter` has reserved, when all of a request's answer is on its way."""
        with self._changed:
            self._entered -= 1
            self._changed.notify_all()

    def submit(self, job: Job) -> None:
        """Adds a job to those that wait. ClosedError: the engine has failed."""
        with self._changed:
            if self.failed is not None:
                raise ClosedError(f"it has failed: {self.failed}")
            self._waiting[job.model].append(job)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Says that nobody waits for a job any more: its slot is free after the tokens that are being written."""
        with self._changed:
            job.cancelled = True
            self._changed.notify_all()

    def close(self) -> None:
        """Lets no more requests in; those that are in are answered."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    @property
    def closing(self) -> bool:
        """Whether `close` was called."""
        return self._closing

    @property
    def idle(self) -> bool:
        """Whether no request is being worked on."""
        return self._entered == 0

    def join(self, timeout: float | None = None) -> None:
        """Waits until the thread has ended, after `close` and the last job, or a failure."""
        self._thread.join(timeout)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Of each model how many jobs are being written and how many wait."""
        with self._changed:
            return {name: (len(self._running[name]), len(self._waiting[name])) for name in self.sessions}

    def _work(self) -> bool:
        return any(self._waiting.values()) or any(self._running.values())

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._work() or (self._closing and self._entered == 0))
                    if not self._work():
                        return
                for name, session in self.sessions.items():
                    self._admit(name, session)
                    if self._running[name]:
                        started = time.monotonic()
                        session.advance(self.budget)
                        self._read(name, session)
                        self.metrics.advances.observe(time.monotonic() - started)
        except Exception as error:  # of the runtime: what was donated is gone, nothing can go on
            logging.exception("the engine has failed")
            with self._changed:
                self.failed = error
                jobs = [job for waiting in self._waiting.values() for job in waiting]
                jobs += [job for running in self._running.values() for job in running.values()]
            for job in jobs:
                job.deliver(Ended(None, error))

    def _admit(self, name: str, session: Session) -> None:
        """Jobs that wait get free places; those that nobody waits for leave theirs."""
        running = self._running[name]
        for place in [place for place, job in running.items() if job.cancelled]:
            self._let_go(name, session, place)
        while True:
            with self._changed:
                waiting = self._waiting[name]
                while waiting and waiting[0].cancelled:
                    waiting.popleft().deliver(Ended(None))
                if not (waiting and session.free):
                    return
                job = waiting.popleft()
            place = session.admit(job.prompts, job.temperature)
            with self._changed:
                running[place] = job
            self.metrics.tokens.add(int(job.prompts.length[0]), kind="prompt", model=name)

    def _read(self, name: str, session: Session) -> None:
        """Tells jobs what their rows have come to, and lets go of rows that are done."""
        rows = session.read()
        for place, job in list(self._running[name].items()):
            if job.cancelled:
                continue
            for event in job.reader.read(rows[place]):
                if job.first_text is None and isinstance(event, Wrote):
                    job.first_text = time.monotonic()
                    self.metrics.first_text.observe(job.first_text - job.submitted)
                job.deliver(event)
            if job.reader.ended is not None:
                self._let_go(name, session, place)

    def _let_go(self, name: str, session: Session, place: int) -> None:
        job = self._running[name][place]
        row = session.row(place) if job.record and not job.cancelled else None
        session.drop(place)
        with self._changed:
            del self._running[name][place]
        self.metrics.tokens.add(job.reader.written, kind="written", model=name)
        self.metrics.tokens.add(job.reader.shown, kind="shown", model=name)
        job.deliver(Ended(row))
