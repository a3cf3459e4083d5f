"""The log's chain: any change of it, or of a file that it names, is found."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixel_jax.files import FileError
from unlearn_jax.requests.log import (
    BEGINNING,
    LOG,
    LogEntry,
    LogError,
    append,
    folder,
    last_hash,
    read_log,
    sha256,
    verify,
)

FILES = {"request.json": b"{}\n", "report.json": b"{}\n", "adapter.safetensors": b"weights"}


def entry(number, previous, before, data="d0"):
    files = {name: sha256(content + bytes([number])) for name, content in FILES.items()}
    return LogEntry(
        number, "2026-11-30T12:00:00+00:00", ["a"], "remove", "A. Person", "2026-11-30", "edited", "it fell", "c" * 64,
        data, f"d{number}", before, files["adapter.safetensors"], files, previous,
    )  # fmt: skip


@pytest.fixture
def log(tmp_path):
    """Three entries with their files."""
    (tmp_path / "adapter.safetensors").write_bytes(b"trained")
    before, entries = sha256(b"trained"), []
    for number in range(1, 4):
        entries.append(entry(number, last_hash(entries), before, f"d{number - 1}"))
        before = entries[-1].adapter_after
        place = folder(tmp_path, number)
        place.mkdir(parents=True)
        for name, content in FILES.items():
            (place / name).write_bytes(content + bytes([number]))
        append(tmp_path / LOG, entries[-1])
    return tmp_path / LOG, entries


def test_what_is_written_is_read(log):
    path, entries = log
    assert read_log(path) == entries and verify(path) == (entries, [])
    assert read_log(path.parent / "nowhere") == []
    lines = path.read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["previous"] for line in lines] == [
        BEGINNING, *(hashlib.sha256(line).hexdigest() for line in lines[:2])
    ]  # fmt: skip
    with pytest.raises(FileError, match="there is no log"):
        verify(path.parent / "nowhere")


@given(st.data())
def test_every_change_of_a_byte_is_found(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("log") / LOG
    entries: list[LogEntry] = []
    for number in range(1, 3):
        entries.append(
            entry(number, last_hash(entries), "x" if number == 1 else entries[-1].adapter_after, f"d{number - 1}")
        )
        append(path, entries[-1])
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda x: x != whole[at]))
    path.write_bytes(whole[:at] + bytes([other]) + whole[at + 1 :])
    try:
        changed = read_log(path)
    except LogError as error:
        assert LOG in str(error)
    else:  # only the last line can change unseen by the chain: who keeps its hash sees it
        assert changed[:1] == entries[:1]
        assert verify(path, last_hash(entries))[1]


def test_lines_that_were_taken_out_put_in_or_exchanged(log):
    path, entries = log
    lines = path.read_bytes().splitlines(keepends=True)
    for order in ([0, 2], [1, 2], [1, 0, 2], [0, 0, 1, 2]):
        path.write_bytes(b"".join(lines[i] for i in order))
        with pytest.raises(LogError, match="unlearn-jax verify .* lists all faults"):
            read_log(path)
    path.write_bytes(lines[0] + lines[1])
    assert verify(path)[1] == []  # a chain cannot show that its end is gone, the hash of the end does
    (fault,) = verify(path, last_hash(entries))[1]
    assert "its end was cut off" in fault
    assert verify(path, last_hash(entries[:2]))[1] == [] and verify(path, last_hash(entries[:1]))[1] == []


@pytest.mark.parametrize("name", FILES)
def test_files_that_were_changed_or_taken_away(log, name):
    path, _ = log
    file = folder(path.parent, 2) / name
    file.write_bytes(b"other")
    (fault,) = verify(path)[1]
    assert str(file) in fault and "was changed" in fault
    file.unlink()
    (fault,) = verify(path)[1]
    assert "cannot be opened" in fault
    (path.parent / "adapter.safetensors").write_bytes(b"other")
    assert len(verify(path)[1]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"number": "1"}, "number must be int"),
        ({"outcome": "done"}, "the outcome one of"),
        ({"ids": [1]}, "ids and files are texts"),
        ({"files": {"../../x": "y"}}, "files are named without a folder"),
        ({"more": 1}, "does not have the fields"),
    ],
)
def test_lines_that_are_none(log, change, message):
    path, _ = log
    first = json.loads(path.read_bytes().splitlines()[0])
    path.write_text(json.dumps({**first, **change}) + "\n")
    with pytest.raises(LogError, match=message):
        read_log(path)
