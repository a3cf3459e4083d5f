"""Runs host tools: Python functions in worker processes, many at once, each within a time limit.

A host tool (`Tool(..., host=True)`) has an `execute(images, **arguments)`. It gets the images that the row has been shown, uint8
[h, w, 3] arrays at full resolution, and the arguments by name, as Python's numbers, lists and texts. It returns a text, or, with
`picture=True`, a picture or a pair (text, picture); a picture is uint8 [h, w, 3] or one of Pillow's. An exception or a timeout
becomes a message that the model can read.

Workers import the tools by their names in the config. Messages between processes are JSON and raw pixels.
"""

import dataclasses
import json
import os
import queue
import select
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, NamedTuple

import numpy as np

from pixel_jax.config import PACKAGE, positive
from pixel_jax.tools.tool import ANSWERED, FAILED, TIMED_OUT, Outcome, ToolError

START = 300.0  # seconds that a worker may take to import its tools
MOST_BYTES = 2**31  # of a message
MOST_TEXT = 2**20  # characters of an answer
HEADER = struct.Struct(">QQ")


@dataclasses.dataclass(frozen=True)
class HostToolsConfig:
    """Settings of host tools."""

    workers: int = 4  # processes, as many as calls at once
    seconds: float = 30.0  # time limit of a call
    picture_side: int = 1024  # longest side, in pixels, of a picture that a call returns; larger ones are made smaller

    def __post_init__(self):
        positive(self, "workers", "seconds", "picture_side")


class ToolRequest(NamedTuple):
    """A call for a host tool."""

    tool: int  # index among the names
    arguments: Mapping[str, Any]
    images: Sequence[np.ndarray]


class ToolReply(NamedTuple):
    """The answer of a host tool."""

    outcome: Outcome  # ANSWERED, FAILED or TIMED_OUT
    text: str  # of the tool, or of the error
    picture: np.ndarray | None = None  # uint8 [h, w, 3]; None: it returned none


def send(stream: IO[bytes], document: Any, images: Sequence[np.ndarray] = ()) -> None:
    """Writes one message: a JSON document, which has the shapes of the images, and their pixels."""
    head, body = json.dumps(document).encode(), b"".join(np.ascontiguousarray(x).tobytes() for x in images)
    stream.write(HEADER.pack(len(head), len(body)) + head + body)
    stream.flush()


def receive(read: Callable[[int], bytes]) -> tuple[Any, bytes]:
    """Reads one message of `send`; `read(n)` must return n bytes.

    Raises:
      EOFError: the message is too long.
    """
    head, body = HEADER.unpack(read(HEADER.size))
    if head + body > MOST_BYTES:
        raise EOFError(f"a message of {head + body} bytes")
    return json.loads(read(head)), read(body)


class Worker:
    """A process that has imported the tools. What tools print goes to standard error."""

    def __init__(self, names: Sequence[str]):
        # The worker must search the current directory last, too (`pixel_jax.named.find`), so -P keeps it from being the first. If
        # this package is in it, it keeps its position, so that no other installation of the package is imported.
        command = [sys.executable, "-P", "-m", "pixel_jax.tools.worker", *names]
        here = {os.path.realpath(os.getcwd())} - {str(PACKAGE.parent.resolve())}
        path = [path for path in sys.path if path and os.path.realpath(path) not in here]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(path)}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert self.process.stdin is not None and self.process.stdout is not None  # they are pipes
        self.requests, self.answers = self.process.stdin, self.process.stdout
        self.ready = False

    def ask(self, request: ToolRequest, limit: float, side: int) -> tuple[Any, bytes]:
        """Sends a request and waits for the answer, a JSON document and pixels.

        Raises:
          TimeoutError: the answer took longer than `limit` seconds.
          EOFError: the process has ended.
        """
        if not self.ready:  # importing does not count as part of a call
            self._receive(START)
            self.ready = True
        shapes = [image.shape for image in request.images]
        document = {"tool": request.tool, "arguments": dict(request.arguments), "shapes": shapes, "side": side}
        try:
            send(self.requests, document, request.images)
        except BrokenPipeError:
            raise EOFError("the process has ended") from None
        return self._receive(limit)

    def _receive(self, limit: float) -> tuple[Any, bytes]:
        deadline, stream = time.monotonic() + limit, self.answers.fileno()

        def read(count: int) -> bytes:
            parts, missing = [], count
            while missing:
                if not select.select([stream], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    raise TimeoutError
                part = os.read(stream, min(missing, 2**20))
                if not part:
                    raise EOFError("the process has ended")
                parts.append(part)
                missing -= len(part)
            return b"".join(parts)

        return receive(read)

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()
        self.requests.close()
        self.answers.close()


class HostTools:
    """Worker processes for the host tools among the tools of a run. To be used in a `with` statement.

    Args:
      names: the names of all tools of the run, in order, as in the config.
      config: settings.
    """

    def __init__(self, names: Sequence[str], config: HostToolsConfig = HostToolsConfig()):  # noqa: B008, never changed
        self.names, self.config = tuple(names), config
        self.free: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()
        self.pool = ThreadPoolExecutor(config.workers)
        self.workers: list[Worker] = []
        for _ in range(config.workers):
            self.free.put(None)  # stands for a worker that is started when it is needed
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> "HostTools":
        return self

    def __exit__(self, *error) -> None:
        self.pool.shutdown()
        for worker in self.workers:
            worker.close()

    def call(self, requests: Sequence[ToolRequest]) -> list[ToolReply]:
        """Carries out calls concurrently and returns the replies, in order.

        Raises:
          ToolError: a worker did not start.
        """
        replies = list(self.pool.map(self._call, requests))
        for reply in replies:
            self.counts[reply.outcome.name] += 1
            self.counts["pictures"] += reply.picture is not None
        return replies

    def metrics(self) -> dict[str, float]:
        """Returns counts of the calls since the last time: errors, timeouts, pictures, and pictures that were made smaller."""
        counts, self.counts = self.counts, Counter()
        names = {"errors": FAILED.name, "timeouts": TIMED_OUT.name, "pictures": "pictures", "shrunk": "shrunk"}
        return {f"host_tool_{name}": float(counts[counted]) for name, counted in names.items()}

    def _call(self, request: ToolRequest) -> ToolReply:
        worker = self.free.get()
        try:
            if worker is None:
                worker = Worker(self.names)
                self.workers.append(worker)
            answer, pixels = worker.ask(request, self.config.seconds, self.config.picture_side)
        except (TimeoutError, EOFError) as error:
            ended, worker = worker, None
            assert ended is not None  # only its `ask` raises these
            ended.close()
            self.workers.remove(ended)
            if not ended.ready:
                raise ToolError(
                    f"a worker for the tools {', '.join(self.names)} did not start: its messages are above"
                ) from None
            if isinstance(error, EOFError):
                return ToolReply(FAILED, "the process ended")
            return ToolReply(TIMED_OUT, f"no answer within {self.config.seconds:g} seconds")
        finally:
            self.free.put(worker)
        if "error" in answer:
            return ToolReply(FAILED, answer["error"])
        self.counts["shrunk"] += answer["shrunk"]
        shape = answer["shape"]
        picture = None if shape is None else np.frombuffer(pixels, np.uint8).reshape(shape)
        return ToolReply(ANSWERED, answer["text"], picture)
