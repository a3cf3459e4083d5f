"""JSON of other people is read strictly, and a file of our own is written whole."""

import codecs
import json
import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixel_jax.files import MAX_DEPTH, FileError, parse_json, read_bytes, read_json, read_lines, write_file

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(json_values, st.booleans())
def test_what_json_writes_is_read(value, escape):
    assert parse_json(json.dumps(value, ensure_ascii=escape), "x") == value


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ("[NaN]", "NaN is no JSON number"),
        ("[-Infinity]", "-Infinity is no JSON number"),
        ("1e400", "too large"),
        ("1" + "0" * 400, "64 bits"),
        ("9" * 5000, "64 bits"),
        ('"\\ud800"', "surrogate"),
        ('{"\\udfff": 1}', "surrogate"),
        (b"\xff", "is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "is UTF-16: save it as UTF-8"),
        ("[" * 101 + "]" * 101, "nested deeper"),
        ("[" * 100_000, "nested deeper"),
        ("[" * 3000 + "]" * 3000, "nested deeper"),
    ],
)
def test_what_is_refused_names_its_place(text, said):
    with pytest.raises(FileError, match=said) as error:
        parse_json(text, "row.jsonl:7")
    assert str(error.value).startswith("row.jsonl:7 ")


def test_pairs_of_surrogates_and_the_deepest_nesting_are_read():
    assert parse_json('"\\ud83d\\ude00"', "x") == "😀"
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x")


@given(st.binary(max_size=200))
def test_only_the_named_error_leaves(data):
    try:
        parse_json(data, "x")
    except FileError as error:
        assert str(error).startswith("x ")


def test_pipes_folders_and_long_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long").write_bytes(bytes(11))
    for name, said in [("pipe", "not a regular file"), (".", "not a regular file"), ("none", "No such file")]:
        with pytest.raises(FileError, match=said):
            read_json(tmp_path / name)
    with pytest.raises(FileError, match="more than 10 bytes"):
        read_bytes(tmp_path / "long", limit=10)


def test_a_file_is_written_whole_with_the_rights_of_new_files(tmp_path):
    write_file(tmp_path / "a.json", '"ü"')
    assert read_json(tmp_path / "a.json") == "ü"
    (tmp_path / "plain").touch()
    rights = lambda name: stat.S_IMODE((tmp_path / name).stat().st_mode)
    assert rights("a.json") == rights("plain")
    with pytest.raises(TypeError):
        write_file(tmp_path / "a.json", 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "plain"]


def test_a_line_feed_ends_a_line_and_nothing_else_does(tmp_path):
    """All that `str.splitlines` takes for an end of line is legal inside a JSON text, but for the two that JSON escapes."""
    texts = [f"a{x}b" for x in "\u2028\u2029\x85\x1c\x1d\x1e\x0b\x0c"]
    lines = [json.dumps(x, ensure_ascii=x < "a\x80").encode() for x in texts]
    for mark, end in ((b"", b"\n"), (codecs.BOM_UTF8, b"\r\n")):
        (tmp_path / "x").write_bytes(mark + end + end.join([*lines, b"  "]))
        found = list(read_lines(tmp_path / "x"))
        assert [where for where, _ in found] == [f"{tmp_path / 'x'}:{i}" for i in range(2, len(texts) + 2)]
        assert [parse_json(line, where) for where, line in found] == texts
    assert parse_json(codecs.BOM_UTF8 + b"[1]", "x") == [1]


def test_lines_that_cannot_be_read_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "wide").write_text("[1]", "utf-16")
    (tmp_path / "long").write_bytes(b"[1]\n[1, 2, 3]\n")
    for name, said in (
        ("pipe", "is not a regular file"),
        ("wide", "is UTF-16: save it as UTF-8"),
        ("long", "long:2 has more than 5 bytes"),
        ("none", "cannot be opened"),
    ):
        with pytest.raises(FileError, match=f"{name}.*{said.removeprefix(name)}"):
            list(read_lines(tmp_path / name, limit=5))
