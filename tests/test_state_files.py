"""Notes of a run: whatever has become of one, the run goes on, and standard error names the file."""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pixel_jax.state_files import LineLog, read_json_lines, read_note, to_json, write_json

DAMAGE = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "a list": lambda data: b"[]",
    "zeros": lambda data: bytes(len(data)),
    "not UTF-8": lambda data: b"\xff" + data,
    "too deep": lambda data: b"[" * 10_000,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_note_counts_as_not_written(damage, tmp_path, capsys):
    path = tmp_path / "note.json"
    assert read_note(path) is None and capsys.readouterr().err == ""  # there is none: nothing to say
    write_json(path, {"seconds": 1.5})
    assert read_note(path) == {"seconds": 1.5} and capsys.readouterr().err == ""
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert read_note(path) is None
    said = capsys.readouterr().err
    assert str(path) in said and "counts as not written" in said and said.count("\n") == 1


def test_a_note_of_another_shape_and_one_that_is_no_file(tmp_path, capsys):
    write_json(tmp_path / "a.json", {"seconds": "1"})
    assert read_note(tmp_path / "a.json", lambda value: isinstance(value["seconds"], float)) is None
    os.mkfifo(tmp_path / "pipe.json")  # opening it would wait for ever
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")
    for name in ("pipe.json", "folder.json", "gone.json"):
        assert read_note(tmp_path / name) is None and name in capsys.readouterr().err


def test_bad_lines_are_dropped_and_said(tmp_path, capsys):
    path = tmp_path / "lines.jsonl"
    with LineLog(path) as log:
        log.append({"step": i} for i in range(3))
    whole = path.read_bytes()
    path.write_bytes(b"\0" * 9 + b'\n{"step": "4"}\n' + whole + b"[]\nx\n{\n" + b'{"step": 9')
    assert read_json_lines(path, step=int) == [{"step": 0}, {"step": 1}, {"step": 2}]
    said = capsys.readouterr().err
    assert f"{path}:1 is not JSON" in said and f"{path}:2 does not hold" in said and "2 more damaged lines" in said
    with LineLog(path) as log:  # the last line, cut by a kill, is taken off
        log.append([{"step": 3}])
    assert read_json_lines(path, step=int)[-1] == {"step": 3} and path.read_bytes().endswith(b'{\n{"step": 3}\n')


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.lists(st.dictionaries(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")))))
def test_lines_are_what_was_appended_whatever_they_hold(tmp_path, values):
    """U+2028 and U+0085 end a line for `str.splitlines`, and not for JSON lines."""
    path = tmp_path / "any.jsonl"
    path.unlink(missing_ok=True)
    with LineLog(path, durable=False) as log:
        log.append(values)
    assert read_json_lines(path) == values


def test_what_is_no_number_is_null():
    assert json.loads(to_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": (2, None)})) == {
        "a": None,
        "b": [None, 1.5],
        "c": [2, None],
    }
