"""Tools that run on the host: Python functions in worker processes, many at once, each within a time limit.

A tool of the host (`Tool(..., host=True)`) has an `execute(images, **arguments)`: uint8 [h, w, 3] arrays, what the row has been
shown so far at full resolution, and the arguments by name, as Python's numbers, lists and texts. It returns a text; with
`picture=True` also a picture, or a pair (text, picture): uint8 [h, w, 3], or one of Pillow's. An exception or a timeout
becomes a message that the model can read.

Workers import the tools by their names, as the config has them. Messages are JSON and raw pixels.
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

START = 300.0  # seconds in which a worker must have imported its tools
MOST_BYTES = 2**31
MOST_TEXT = 2**20  # characters of an answer
HEADER = struct.Struct(">QQ")


@dataclasses.dataclass(frozen=True)
class HostToolsConfig:
    """How calls of tools that run on the host are carried out."""

    workers: int = 4  # processes, as many calls at once
    seconds: float = 30.0  # that a call may take
    picture_side: int = (
        1024  # pixels of the longest side of a picture that a call returns; a larger one is made smaller
    )

    def __post_init__(self):
        positive(self, "workers", "seconds", "picture_side")


class Request(NamedTuple):
    tool: int  # its place among the names
    arguments: Mapping[str, Any]
    images: Sequence[np.ndarray]


class Reply(NamedTuple):
    outcome: Outcome  # one of those of a tool of the host
    text: str  # what the tool said, or what is wrong
    picture: np.ndarray | None = None  # uint8 [h, w, 3], what it returned besides


def send(stream: IO[bytes], document: Any, images: Sequence[np.ndarray] = ()) -> None:
    """One message: a JSON document, and pixels whose shapes it has."""
    head, body = json.dumps(document).encode(), b"".join(np.ascontiguousarray(x).tobytes() for x in images)
    stream.write(HEADER.pack(len(head), len(body)) + head + body)
    stream.flush()


def receive(read: Callable[[int], bytes]) -> tuple[Any, bytes]:
    """What `send` wrote; `read` gives so many bytes."""
    head, body = HEADER.unpack(read(HEADER.size))
    if head + body > MOST_BYTES:
        raise EOFError(f"a message of {head + body} bytes")
    return json.loads(read(head)), read(body)


class Worker:
    """A process that has imported the tools. Its standard output is that of this process's standard error."""

    def __init__(self, names: Sequence[str]):
        # The current directory is searched last there, too (`pixel_jax.named.find`): -P keeps it from being the first. Where
        # this package itself lies in it, it stays where it is, lest another installation of the package is found.
        command = [sys.executable, "-P", "-m", "pixel_jax.tools.worker", *names]
        here = {os.path.realpath(os.getcwd())} - {str(PACKAGE.parent.resolve())}
        path = [path for path in sys.path if path and os.path.realpath(path) not in here]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(path)}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.ready = False

    def ask(self, request: Request, limit: float, side: int) -> tuple[Any, bytes]:
        """The answer, a document and pixels. TimeoutError: it took longer than `limit` seconds; EOFError: the process has
        ended.
        """
        if not self.ready:  # importing is not what a call takes
            self._receive(START)
            self.ready = True
        shapes = [image.shape for image in request.images]
        document = {"tool": request.tool, "arguments": dict(request.arguments), "shapes": shapes, "side": side}
        try:
            send(self.process.stdin, document, request.images)
        except BrokenPipeError:
            raise EOFError("the process has ended") from None
        return self._receive(limit)

    def _receive(self, limit: float) -> tuple[Any, bytes]:
        deadline, stream = time.monotonic() + limit, self.process.stdout.fileno()

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
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class HostTools:
    """The tools of these names, some of which run on the host, ready to be called. To be used in a `with` statement.

    Args:
      names: of all tools of the run, in order, as the config has them.
    """

    def __init__(self, names: Sequence[str], config: HostToolsConfig = HostToolsConfig()):  # noqa: B008, never changed
        self.names, self.config = tuple(names), config
        self.free: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()
        self.pool = ThreadPoolExecutor(config.workers)
        self.workers: list[Worker] = []
        for _ in range(config.workers):
            self.free.put(None)  # begun when it is needed
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> "HostTools":
        return self

    def __exit__(self, *error) -> None:
        self.pool.shutdown()
        for worker in self.workers:
            worker.close()

    def call(self, requests: Sequence[Request]) -> list[Reply]:
        """The replies, in order; the calls are carried out beside one another."""
        replies = list(self.pool.map(self._call, requests))
        for reply in replies:
            self.counts[reply.outcome.name] += 1
            self.counts["pictures"] += reply.picture is not None
        return replies

    def metrics(self) -> dict[str, float]:
        """For metrics: how many calls failed since the last time, how many took too long, and how many returned a picture."""
        counts, self.counts = self.counts, Counter()
        names = {"errors": FAILED.name, "timeouts": TIMED_OUT.name, "pictures": "pictures", "shrunk": "shrunk"}
        return {f"host_tool_{name}": float(counts[counted]) for name, counted in names.items()}

    def _call(self, request: Request) -> Reply:
        worker = self.free.get()
        try:
            if worker is None:
                worker = Worker(self.names)
                self.workers.append(worker)
            answer, pixels = worker.ask(request, self.config.seconds, self.config.picture_side)
        except (TimeoutError, EOFError) as error:
            started = worker.ready
            worker.close()
            self.workers.remove(worker)
            worker = None
            if not started:
                raise ToolError(
                    f"a worker for the tools {', '.join(self.names)} did not start: what it said is above"
                ) from None
            if isinstance(error, EOFError):
                return Reply(FAILED, "the process ended")
            return Reply(TIMED_OUT, f"no answer within {self.config.seconds:g} seconds")
        finally:
            self.free.put(worker)
        if "error" in answer:
            return Reply(FAILED, answer["error"])
        self.counts["shrunk"] += answer["shrunk"]
        shape = answer["shape"]
        picture = None if shape is None else np.frombuffer(pixels, np.uint8).reshape(shape)
        return Reply(ANSWERED, answer["text"], picture)
