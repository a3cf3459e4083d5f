"""The requests that a run has carried out, one after another: each starts from the adapter and the traces that the one before
left, and has a directory of its own, `request-1`, `request-2`, ..., in which nothing is written over."""

import dataclasses
import pathlib
from collections.abc import Mapping

from pixel_jax.config import load
from pixel_jax.data.traces import Trace
from pixel_jax.files import read_json
from unlearn_jax.quickstart.job import ADAPTER, EDITED
from unlearn_jax.quickstart.traces import Request, answered, asked, describe_ids

REQUEST, REPORT = "request.json", "report.json"  # the report is written last: where it is, the request was carried out


def folder(number: int) -> str:
    """Of the request carried out as number 1, 2, ..."""
    return f"request-{number}"


def adapter_after(number: int) -> str:
    """The file of the adapter that `number` requests have left."""
    return f"{folder(number)}/{EDITED}" if number else ADAPTER


def carried_out(directory: pathlib.Path) -> list[Request]:
    """All requests of the run in `directory`, in order."""
    found: list[Request] = []
    while (place := directory / folder(len(found) + 1)).joinpath(REPORT).exists():
        found.append(load(Request, read_json(place / REQUEST), str(place / REQUEST)))
    return found


def left_by(traces: Mapping[str, Trace], request: Request) -> dict[str, Trace]:
    """The traces as they are after a request."""
    left = {name: trace for name, trace in traces.items() if name not in request.remove}
    left |= {name: answered(traces[name], answer) for name, answer in request.correct.items()}
    return left | {name: asked(traces[name], question) for name, question in request.ask.items()}


@dataclasses.dataclass(frozen=True)
class Todo:
    """What of a request is still to be done, and in words what is done already."""

    request: Request
    done: list[str]


def still_to_do(request: Request, first: Mapping[str, Trace], now: Mapping[str, Trace]) -> Todo:
    """`request` against the traces as they are now; `first`: before any request.

    An id that never was, and an answer or a question of a trace that has been removed, are a ValueError.
    """
    for name in request.names():
        if name not in first:
            raise ValueError(f"no trace has the id {name!r}; there are {describe_ids(first)}")
    for name in (*request.correct, *request.ask):
        if name not in now:
            raise ValueError(f"{name!r} was removed by an earlier request: it has no answer or question to be changed")
    done = [f"{name} has been removed" for name in request.remove if name not in now]
    done += [f"{name} is answered {text!r}" for name, text in request.correct.items() if now[name].answer == text]
    done += [f"{name} is asked {text!r}" for name, text in request.ask.items() if now[name].query.question == text]
    rest = Request(
        tuple(name for name in request.remove if name in now),
        {name: text for name, text in request.correct.items() if now[name].answer != text},
        {name: text for name, text in request.ask.items() if now[name].query.question != text},
    )
    return Todo(rest, done)
