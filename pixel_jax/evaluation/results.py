"""The results of an evaluation: a JSON line for each question, appended as it is answered.

Every process appends to its own file and reads all of them, so an interrupted run goes on, also with another number of
processes. Incomplete and damaged lines are dropped, the latter with a warning: their questions are answered again.
"""

import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from pixel_jax.state_files import LineLog, read_json_lines

# Fields of every record, with their types.
FIELDS = {"index": int, "id": str, "category": str, "answers": list, "score": list, "stop": list}


class Results:
    """The writer of one process's records of one benchmark in one mode. A record has at least `FIELDS`."""

    def __init__(self, directory: str | os.PathLike, process: int = 0):
        """Opens the file of a process in the directory."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.log = LineLog(directory / f"results-{process}.jsonl")

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Appends records; when this returns they are on disk."""
        self.log.append(records)


def read_records(directory: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of all processes, in the order of the questions. A record with answers replaces one without."""
    records: dict[int, dict[str, Any]] = {}
    for path in sorted(pathlib.Path(directory).glob("results-*.jsonl")):
        for record in read_json_lines(path, **FIELDS):
            if "unanswered" not in record or record["index"] not in records:
                records[record["index"]] = record
    return [records[index] for index in sorted(records)]
