"""What a run has found so far: a JSON line a question, appended as it goes, and the settings it was found with.

Every process appends to a file of its own and reads all of them, so a run that was interrupted goes on, also with another
number of processes. A line cut short by a kill is dropped.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any


class RunError(ValueError):
    """A run directory that does not hold what it should; the message names it and the values that clash."""


class Results:
    """The records of one benchmark in one mode, in `directory`. A record has at least "index", the question's number."""

    def __init__(self, directory: str | os.PathLike, process: int = 0):
        self.directory = pathlib.Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.path = self.directory / f"results-{process}.jsonl"
        if self.path.exists():
            whole = self.path.read_bytes()
            if not whole.endswith(b"\n"):
                with self.path.open("r+b") as file:
                    file.truncate(whole.rfind(b"\n") + 1)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records; when this returns they are on disk."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())


def read_records(directory: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of all processes by the order of their questions. An answer counts whatever was recorded without one."""
    found: dict[int, dict[str, Any]] = {}
    for path in sorted(pathlib.Path(directory).glob("results-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                record = json.loads(line)
                if "unanswered" not in record or record["index"] not in found:
                    found[record["index"]] = record
    return [found[index] for index in sorted(found)]


def settle(directory: str | os.PathLike, settings: Mapping[str, Any], *, write: bool = True) -> None:
    """Note the settings of a run, or check that they are those it was begun with."""
    path = pathlib.Path(directory) / "run.json"
    settings = json.loads(json.dumps(settings))
    if path.exists():
        begun = read_settings(directory)
        for name in {**begun, **settings}:
            if begun.get(name) != settings.get(name):
                raise RunError(
                    f"{directory} was begun with {name} = {begun.get(name)!r}, now it is {settings.get(name)!r}: "
                    "choose another directory"
                )
    elif write:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name("run.json.partial")
        partial.write_text(json.dumps(settings, indent=2))
        os.replace(partial, path)


def read_settings(directory: str | os.PathLike) -> dict[str, Any]:
    """The settings of a run of one benchmark in one mode."""
    path = pathlib.Path(directory) / "run.json"
    if not path.is_file():
        raise RunError(f"{directory} is no run of a benchmark: it has no run.json")
    return json.loads(path.read_text())
