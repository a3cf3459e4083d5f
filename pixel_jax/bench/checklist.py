"""Lines of `pixel-jax check`: what was found, whether it is wrong, and what to do about it."""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from pixel_jax.cli import UserError, out_of_memory
from pixel_jax.data.example import Example
from pixel_jax.files import write_file
from pixel_jax.rollouts.shapes import BatchShape
from pixel_jax.terminal import Waiting, say
from pixel_jax.train_config import TrainConfig

Kind = Literal["sft", "rl"]
# Errors of a user's files and settings, and of a full device.
MISTAKES = (UserError, ValueError, OSError, RuntimeError, FloatingPointError)


class Line(NamedTuple):
    """The result of one check."""

    name: str
    status: Literal["ok", "note", "wrong"]
    found: str
    remedy: str = ""


class Checklist:
    """The lines of a check, printed as they are added and kept in a file."""

    def __init__(self, path: pathlib.Path):
        self.path, self.lines = path, list[Line]()
        self.details: dict[str, Any] = {}

    def add(
        self, name: str, found: str, remedy: str = "", *, status: Literal["ok", "note", "wrong"] | None = None
    ) -> None:
        """Adds a line; one with a remedy is wrong, unless `status` says otherwise."""
        line = Line(name, status or ("wrong" if remedy else "ok"), found, remedy)
        self.lines.append(line)
        say(f"{line.status:>5}  {name:<9} {found}" + (f"\n{'':17}-> {remedy}" if remedy else ""))
        record = {"lines": [x._asdict() for x in self.lines], **self.details}
        write_file(self.path, json.dumps(record, indent=1) + "\n")

    @contextlib.contextmanager
    def item(self, name: str, remedy: str = "mend this and check again") -> Iterator[None]:
        """Adds an error of the block as a line of this name, and says what it is about if the block takes a while."""
        try:
            with Waiting(f"checking the {name}"):
                yield
        except MISTAKES as error:
            full = out_of_memory("pixel-jax rl", error)
            self.add(name, full or " ".join(str(error).split()), remedy, status="wrong")

    @property
    def wrong(self) -> list[str]:
        """The names of what is wrong, each once."""
        return list(dict.fromkeys(line.name for line in self.lines if line.status == "wrong"))


class UsableExamples(NamedTuple):
    """The examples of a data file that can be used."""

    kind: Kind
    examples: Sequence[Example]
    shapes: Sequence[BatchShape]  # of their batches


def phases_of(config: TrainConfig) -> list[Kind]:
    """The phases that a config has settings for."""
    phases: tuple[Kind, ...] = ("sft", "rl")
    return [kind for kind in phases if getattr(config, kind) is not None]


def size_text(count: float) -> str:
    """Writes a number of bytes, short."""
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"


def plural(count: int, name: str) -> str:
    """Writes a number and what it counts."""
    return f"{count} {name}" + "s" * (count != 1)


def count_text(count: int) -> str:
    """Writes a number of weights, short."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)
