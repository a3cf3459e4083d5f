"""What a run has found so far: a JSON line a question, appended as it goes, beside what the run is (`pixel_jax.identity`).

Every process appends to a file of its own and reads all of them, so a run that was interrupted goes on, also with another
number of processes. A line cut short by a kill is dropped, and a damaged one, which standard error names: the question is
answered again.
"""

import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from pixel_jax.state_files import LineLog, read_lines

# What every record has, whatever else it has.
FIELDS = {"index": int, "id": str, "category": str, "answers": list, "score": list, "stop": list}


class Results:
    """The records of one benchmark in one mode, in `directory`. A record has at least `FIELDS`."""

    def __init__(self, directory: str | os.PathLike, process: int = 0):
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.log = LineLog(directory / f"results-{process}.jsonl")

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records; when this returns they are on disk."""
        self.log.append(records)


def read_records(directory: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of all processes by the order of their questions. An answer counts whatever was recorded without one."""
    found: dict[int, dict[str, Any]] = {}
    for path in sorted(pathlib.Path(directory).glob("results-*.jsonl")):
        for record in read_lines(path, **FIELDS):
            if "unanswered" not in record or record["index"] not in found:
                found[record["index"]] = record
    return [found[index] for index in sorted(found)]
