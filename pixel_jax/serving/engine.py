"""The thread that advances the rollouts of the server, admits requests to them and delivers their answers.

No other thread uses the devices. Others submit jobs (`Engine.submit`); `Job.deliver` is called in this thread with their events.
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
    """Raised for a request beyond the number that may be worked on at a time."""


class ClosedError(Exception):
    """Raised when the engine takes no more requests, because it is closing or has failed."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """The last event of a job."""

    row: Trajectories[VisualRecord] | None  # the record of its row, if the job asked for it
    error: Exception | None = None  # why there is no answer


Event = Wrote | Saw | Ended


@dataclasses.dataclass(eq=False)
class Job:
    """A request for one answer.

    Args:
      model: name of the session that writes it.
      prompts: the one prompt.
      reader: makes text of its row, and says when the answer ends.
      deliver: called with each event; the last is `Ended`.
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
      sessions: the session of each model. Sessions of equal shapes share their compiled programs.
      limit: jobs at a time, written or waiting; `enter` refuses more.
      budget: tokens that rows write before jobs are admitted and rows are read again.
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
        """Counts a request against the limit, before its body is read, until `leave` is called.

        Raises:
          BusyError: the limit is reached.
          ClosedError: the engine takes no more requests.
        """
        with self._changed:
            if self._closing or self.failed is not None:
                raise ClosedError(f"it has failed: {self.failed}" if self.failed else "it is shutting down")
            if self._entered >= self.limit:
                raise BusyError(f"{self._entered} requests are being worked on, and {self.limit} are allowed")
            self._entered += 1

    def leave(self) -> None:
        """Ends the counting of a request, when its whole answer has been sent."""
        with self._changed:
            self._entered -= 1
            self._changed.notify_all()

    def submit(self, job: Job) -> None:
        """Queues a job. ClosedError: the engine has failed."""
        with self._changed:
            if self.failed is not None:
                raise ClosedError(f"it has failed: {self.failed}")
            self._waiting[job.model].append(job)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Cancels a job: its slot is freed after the tokens that are being written."""
        with self._changed:
            job.cancelled = True
            self._changed.notify_all()

    def close(self) -> None:
        """Refuses further requests; those that have entered are answered."""
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
        """The numbers of jobs that are being written and that wait, by model."""
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
        except Exception as error:  # the donated state is lost, so no session can go on
            logging.exception("the engine has failed")
            with self._changed:
                self.failed = error
                jobs = [job for waiting in self._waiting.values() for job in waiting]
                jobs += [job for running in self._running.values() for job in running.values()]
            for job in jobs:
                job.deliver(Ended(None, error))

    def _admit(self, name: str, session: Session) -> None:
        """Frees the slots of cancelled jobs, and admits waiting jobs to free slots."""
        running = self._running[name]
        for slot in [slot for slot, job in running.items() if job.cancelled]:
            self._let_go(name, session, slot)
        while True:
            with self._changed:
                waiting = self._waiting[name]
                while waiting and waiting[0].cancelled:
                    waiting.popleft().deliver(Ended(None))
                if not (waiting and session.free):
                    return
                job = waiting.popleft()
            slot = session.admit(job.prompts, job.temperature)
            with self._changed:
                running[slot] = job
            self.metrics.tokens.add(int(job.prompts.length[0]), kind="prompt", model=name)

    def _read(self, name: str, session: Session) -> None:
        """Delivers what rows have written since the last time, and drops rows that are done."""
        rows = session.read()
        for slot, job in list(self._running[name].items()):
            if job.cancelled:
                continue
            for event in job.reader.read(rows[slot]):
                if job.first_text is None and isinstance(event, Wrote):
                    job.first_text = time.monotonic()
                    self.metrics.first_text.observe(job.first_text - job.submitted)
                job.deliver(event)
            if job.reader.ended is not None:
                self._let_go(name, session, slot)

    def _let_go(self, name: str, session: Session, slot: int) -> None:
        job = self._running[name][slot]
        row = session.row(slot) if job.record and not job.cancelled else None
        session.drop(slot)
        with self._changed:
            del self._running[name][slot]
        self.metrics.tokens.add(job.reader.written, kind="written", model=name)
        self.metrics.tokens.add(job.reader.shown, kind="shown", model=name)
        job.deliver(Ended(row))
