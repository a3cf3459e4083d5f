"""The log of requests: a JSON line each, chained by the hash of the line before, and its verification.

A request is complete when its line is in the log; its files are written before. A line that was cut off, by a kill or a full
disk, does not count.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any, Literal, get_args

from pixel_jax.files import FileError, parse_json, read_bytes, sync_directory

LOG = "requests.log.jsonl"
FOLDER = "requests"  # beside the log, with a folder for each request, by number
REQUEST, ADAPTER, REPORT, PAGE = "request.json", "adapter.safetensors", "report.json", "page.html"
BEGINNING = "0" * 64  # stands for the line before the first
Outcome = Literal["edited", "nothing to do", "escalated"]


class LogError(ValueError):
    """A log that was changed after it was written. The message names the line."""


@dataclasses.dataclass(frozen=True)
class LogEntry:
    """A line of the log. It holds hashes (SHA-256, hexadecimal) and ids, and no forgotten content."""

    number: int  # from 1
    at: str  # when it was carried out, UTC
    ids: list[str]
    kind: str
    who: str  # who asked
    when: str  # when they asked
    outcome: Outcome
    why: str
    config: str  # hash of the settings
    data_before: str
    data_after: str
    adapter_before: str
    adapter_after: str
    files: dict[str, str]  # name in the request's folder: hash. request.json and report.json are always there
    previous: str  # hash of the line before, `BEGINNING` for the first

    def line(self) -> bytes:
        """The entry as a line of the log."""
        return (json.dumps(dataclasses.asdict(self), sort_keys=True) + "\n").encode()


FIELDS = {field.name: field for field in dataclasses.fields(LogEntry)}


def sha256(data: bytes) -> str:
    """The hash of a file's content or of a line, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def folder(directory: pathlib.Path, number: int) -> pathlib.Path:
    """The folder of the files of request `number`, in a run's directory."""
    return directory / FOLDER / f"{number:04d}"


def read_log(path: pathlib.Path) -> list[LogEntry]:
    """The entries of a log, in order; none if there is no log.

    Raises:
        LogError: a line is not what was written, or does not follow from the line before.
    """
    entries, faults = _read(path)
    if faults:
        raise LogError(f"{faults[0]}. `unlearn-jax verify {path}` lists all faults")
    return entries


def _read(path: pathlib.Path) -> tuple[list[LogEntry], list[str]]:
    """Returns the entries, and the faults of the chain. An unfinished line, after the last line feed, does not count."""
    if not path.exists():
        return [], []
    entries: list[LogEntry] = []
    faults: list[str] = []
    previous = BEGINNING
    for number, line in enumerate(read_bytes(path).split(b"\n")[:-1], 1):
        where = f"{path}:{number}"
        try:
            entry = _entry(parse_json(line, where, LogError), where)
        except LogError as error:
            return entries, [*faults, str(error)]
        if entry.number != number:
            faults.append(f"{where} says that it is number {entry.number}: a line is missing or was put in")
        if entry.previous != previous:
            faults.append(f"{where} does not follow from the line before it: one of the two was changed")
        if entry.line() != line + b"\n":
            faults.append(f"{where} is not written as a log is: it was changed")
        if entries and entry.adapter_before != entries[-1].adapter_after:
            faults.append(f"{where} starts from another adapter than the line before it left")
        if entries and entry.data_before != entries[-1].data_after:
            faults.append(f"{where} starts from other data than the line before it left")
        entries.append(entry)
        previous = sha256(line + b"\n")
    return entries, faults


def _entry(value: Any, where: str) -> LogEntry:
    if not isinstance(value, dict) or value.keys() != FIELDS.keys():
        raise LogError(f"{where} does not have the fields of a log: {', '.join(FIELDS)}")
    for name, x in value.items():
        kind = {"number": int, "ids": list, "files": dict}.get(name, str)
        if type(x) is not kind:
            raise LogError(f"{where}: {name} must be {kind.__name__}, not {x!r}")
    texts = [*value["ids"], *value["files"], *value["files"].values()]
    if not all(isinstance(x, str) for x in texts) or value["outcome"] not in get_args(Outcome):
        raise LogError(f"{where}: ids and files are texts, and the outcome one of {', '.join(get_args(Outcome))}")
    if any(pathlib.PurePath(name).name != name for name in value["files"]):
        raise LogError(f"{where}: files are named without a folder")
    return LogEntry(**value)


def append(path: pathlib.Path, entry: LogEntry) -> None:
    """Appends a line to the log and syncs it to disk. If it cannot be written, the log is left as it was.

    Raises:
        OSError: the line cannot be written, as on a full disk.
    """
    end = read_bytes(path).rfind(b"\n") + 1 if path.exists() else 0
    with open(path, "ab", buffering=0) as file:  # unbuffered: nothing is written again when the file is closed
        os.truncate(path, end)  # removes an unfinished line
        try:
            unwritten = memoryview(entry.line())
            while unwritten:
                unwritten = unwritten[file.write(unwritten) :]
            os.fsync(file.fileno())
        except OSError as error:
            os.truncate(path, end)
            message = f"{path} cannot be written ({error.strerror}): log and adapter are as they were"
            raise OSError(error.errno, message) from error
    sync_directory(path.parent)


def last_hash(entries: list[LogEntry]) -> str:
    """The hash of the last line. Stored outside of the log, it shows later whether lines at the end are missing."""
    return sha256(entries[-1].line()) if entries else BEGINNING


def verify(path: pathlib.Path, last: str | None = None) -> tuple[list[LogEntry], list[str]]:
    """Checks a log and the files that it names.

    Args:
        path: the log, in the directory of its run.
        last: a hash of a line that the log must have, as an earlier verification printed.

    Returns:
        The entries, and a description of each fault: none if nothing was changed.

    Raises:
        FileError: there is no such file.
    """
    if not path.exists():
        raise FileError(f"there is no log {str(path)!r}")
    entries, faults = _read(path)
    if read_bytes(path).rpartition(b"\n")[2]:
        faults.append(f"{path} ends in the middle of a line: a request was interrupted; `unlearn-jax erase` goes on")
    if entries:
        faults += _file_faults(path.parent / ADAPTER, entries[0].adapter_before)
    for entry in entries:
        names = {REQUEST, REPORT} | ({ADAPTER} if entry.adapter_after != entry.adapter_before else set())
        if missing := sorted(names - entry.files.keys()):
            faults.append(f"{path}:{entry.number} names no {missing[0]}")
        if ADAPTER in names and entry.files.get(ADAPTER) != entry.adapter_after:
            faults.append(f"{path}:{entry.number} names two adapters that it left")
        for name, expected in entry.files.items():
            faults += _file_faults(folder(path.parent, entry.number) / name, expected)
    if last is not None and last not in (BEGINNING, *(sha256(entry.line()) for entry in entries)):
        faults.append(f"{path} has no line with the hash {last}: its end was cut off, or it is another log")
    return entries, faults


def _file_faults(path: pathlib.Path, expected: str) -> list[str]:
    try:
        actual = sha256(read_bytes(path))
    except FileError as error:
        return [str(error)]
    return [] if actual == expected else [f"{path} was changed: its hash is {actual}, the log says {expected}"]
