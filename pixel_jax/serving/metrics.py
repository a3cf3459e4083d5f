"""Counts and durations in the text format of Prometheus (exposition format 0.0.4)."""

import bisect
import threading
from collections.abc import Iterable, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


def _labels(labels: dict[str, str]) -> str:
    escaped = lambda x: x.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
    return "{" + ",".join(f'{name}="{escaped(value)}"' for name, value in labels.items()) + "}" if labels else ""


class Counter:
    """A counter: a sum that only grows, for each combination of labels."""

    def __init__(self, name: str, what: str):
        self.name, self.what = name, what
        self._values: dict[tuple[tuple[str, str], ...], float] = {}
        self._lock = threading.Lock()

    def add(self, amount: float = 1, **labels: str) -> None:
        """Adds to the sum of these labels."""
        key = tuple(labels.items())
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount

    def lines(self) -> Iterable[str]:
        """Its lines in the text format."""
        yield from _head(self.name, self.what, "counter")
        with self._lock:
            values = dict(self._values)
        for labels, value in values.items():
            yield f"{self.name}{_labels(dict(labels))} {float(value)!r}"


class Histogram:
    """A histogram of durations: how many were no longer than each of some bounds, in seconds."""

    def __init__(self, name: str, what: str, bounds: Sequence[float] = SECONDS):
        self.name, self.what, self.bounds = name, what, tuple(bounds)
        self._counts = [0] * (len(self.bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, seconds: float) -> None:
        """Counts a duration."""
        with self._lock:
            self._counts[bisect.bisect_left(self.bounds, seconds)] += 1
            self._sum += seconds

    def lines(self) -> Iterable[str]:
        """Its lines in the text format."""
        yield from _head(self.name, self.what, "histogram")
        with self._lock:
            counts, total = list(self._counts), self._sum
        below = 0
        for bound, count in zip((*map(repr, self.bounds), "+Inf"), counts, strict=True):
            below += count
            yield f'{self.name}_bucket{{le="{bound}"}} {below}'
        yield f"{self.name}_sum {total!r}"
        yield f"{self.name}_count {below}"


def gauge(name: str, what: str, values: Iterable[tuple[dict[str, str], float]]) -> Iterable[str]:
    """The lines of a gauge: values that go up and down, each with its labels."""
    yield from _head(name, what, "gauge")
    for labels, value in values:
        yield f"{name}{_labels(labels)} {float(value)!r}"


def _head(name: str, what: str, kind: str) -> Iterable[str]:
    yield f"# HELP {name} {what}"
    yield f"# TYPE {name} {kind}"


class Metrics:
    """The metrics of a server."""

    def __init__(self) -> None:
        self.requests = Counter("pixel_jax_requests_total", "Requests by path and status.")
        self.tokens = Counter("pixel_jax_tokens_total", "Tokens of prompts, written by models, and shown by tools.")
        self.durations = Histogram("pixel_jax_request_seconds", "From a chat request to the end of its answer.")
        self.first_text = Histogram("pixel_jax_first_text_seconds", "From a request's admission to its first text.")
        self.advances = Histogram(
            "pixel_jax_advance_seconds", "One call of the compiled rollout, and reading its rows."
        )

    def text(self, counts: dict[str, tuple[int, int]]) -> str:
        """Writes all metrics as text. `counts` has for each model the answers that are being written, and those that wait."""
        lines = [line for x in vars(self).values() for line in x.lines()]
        with_labels = lambda index: [({"model": name}, pair[index]) for name, pair in counts.items()]
        lines += gauge("pixel_jax_running", "Answers that are being written.", with_labels(0))
        lines += gauge("pixel_jax_waiting", "Answers that wait for a slot.", with_labels(1))
        return "\n".join(lines) + "\n"
