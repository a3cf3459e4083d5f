"""Whatever a file of other people holds, a reader says what is wrong in its own named error and no other."""

import copy
import dataclasses
import json

import numpy as np
import pyarrow
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from pixel_jax.config import ConfigError
from pixel_jax.data.example import ExampleError
from pixel_jax.data.read import read_examples
from pixel_jax.data.sources import SourceError
from pixel_jax.evaluation.benchmarks import BenchmarkError, read
from pixel_jax.files import FileError
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.limits import read_limits
from pixel_jax.synthesis.seeds import SeedError, read_seeds
from tests.data import released_files as files

OWN = {"question": "Who?", "images": ["a.png"], "answer": ["7"], "turns": ["I look.", {"text": "7", "learn": True}]}
OWN |= {"seconds": 2, "video": True, "id": "x", "category": "c"}
SEED = {"question": "?", "answer": "7", "images": ["a.png"], "cue": "the card", "box": [10, 5, 20.5, 30], "image": 1}
MESSAGES = files.conversation("Who?", files.part(image="a.png"), [files.crop(0.1, 0.2, 0.5, 0.6), "7"], [["a.png"]])
TRACE = {"qid": "x", "message_list": MESSAGES}
VSTAR = {"image": "a.png", "text": "?", "category": "c", "question_id": 0, "label": "A"}
TALLY = {"answer": 4, "data_source": "s", "image": "a.png", "issimple": False, "question": "?", "question_id": 3}
INFO = {"questionId": 9, "question": "?", "image_local_name": "a.png", "answers": ["7"], "answer_type": ["x"]}
MVBENCH = {"question": "?", "candidates": ["a", "b"], "answer": "b", "video": "a.png", "start": 1.0, "end": 2.5}
MVBENCH_FILE = "json/action_sequence.json"
QUESTION = {"question": "Who?", "answer": ["\\boxed{7}"], "image": ["a.png"], "is_video": False, "qid": "x"}

# What the file is called, a document in it (several lines: a list of documents), how it is read, its errors.
READERS = {
    "jsonl": ("x.jsonl", OWN, lambda path: read_examples(path, turns=True), (ExampleError, SourceError)),
    "jsonl of eval": ("x.jsonl", OWN, lambda path: read("jsonl", path), (ExampleError, SourceError, BenchmarkError)),
    "traces": ("x.json", [TRACE], lambda path: read_examples(path, turns=True), (ExampleError, SourceError)),
    "traces by lines": ("y.json", TRACE, lambda path: read_examples(path, turns=True), (ExampleError, SourceError)),
    "seeds": ("seeds", SEED, read_seeds, (SeedError,)),
    "vstar": ("test_questions.jsonl", VSTAR, lambda path: read("vstar", path.parent), (BenchmarkError,)),
    "tallyqa": ("test.json", [TALLY], lambda path: read("tallyqa", path), (BenchmarkError,)),
    "infovqa": (
        "i.json",
        {"dataset_split": "val", "data": [INFO]},
        lambda path: read("infovqa", path),
        (BenchmarkError,),
    ),
    "mvbench": (MVBENCH_FILE, [MVBENCH], lambda path: read("mvbench", path.parent.parent), (BenchmarkError,)),
    "rollout.json": (
        "rollout.json",
        dataclasses.asdict(RolloutConfig()),
        lambda path: read_limits(path.parent),
        (FileError, ConfigError),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("readers")
    (path / "json").mkdir()
    (path / "video/star/Charades_v1_480").mkdir(parents=True)
    for place in (path, path / "video/star/Charades_v1_480"):
        Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(place / "a.png")
    return path


def attempt(folder, reader, data: bytes):
    """What the reader finds, or the message of its error; any other error leaves."""
    name, _, take, errors = READERS[reader]
    (folder / name).write_bytes(data)
    try:
        return take(folder / name)
    except errors as error:
        assert str(error) and (len(str(error)) < 2000 or isinstance(error, ConfigError))
        return str(error)


@pytest.mark.parametrize("reader", READERS)
def test_every_document_here_is_right_until_it_is_damaged(folder, reader):
    for mark in ("utf-8", "utf-8-sig"):
        assert not isinstance(attempt(folder, reader, json.dumps(READERS[reader][1]).encode(mark)), str)


def places_in(value, path=()):
    """The paths to all values inside a document."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places_in(item, (*path, key))


def put(document, path, value):
    """A copy of the document with another value in one place."""
    if not path:
        return value
    document = copy.deepcopy(document)
    inside = document
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return document


# As they stand in the file: JSON and what some take for JSON.
LITERALS = ["1" + "0" * 400, "-" + "9" * 30, "1e400", "1e308", "1e-320", "NaN", "Infinity", "-Infinity", '"\\ud800"',
            '{"a": 1, "a": 2}', "[" * 101 + "]" * 101, '"' + "[" * 3000 + '"',
            '"\\u0000"', '"' + "x" * 300 + '"', '"\\\\boxed{' + "['" * 3000 + '"', '"' + "['a'," * 3000 + '"',
            '"../../../../../etc/passwd"', '"/dev/zero"', "[[]]", "{}", "true", "null", "-1", "0", '""', '"\x1b"']  # fmt: skip
DEEP = ["[" * 3000 + "]" * 3000, "[" * 100_000, '{"a":' * 3000]


@pytest.mark.parametrize("reader", READERS)
def test_hostile_values_in_every_place(folder, reader):
    document = READERS[reader][1]
    for path in list(places_in(document))[-24:]:  # some conversations say the same over and over
        for literal in [*LITERALS, *(DEEP if len(path) < 2 else ())]:
            attempt(folder, reader, json.dumps(put(document, path, "HERE")).replace('"HERE"', literal).encode())


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["a.png", "user"]),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("reader", READERS)
@given(data=st.data())
def test_other_values_in_some_places(folder, reader, data):
    document = READERS[reader][1]
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(list(places_in(document))))
        document = put(document, place, data.draw(VALUES))
    attempt(folder, reader, json.dumps(document).encode())


@pytest.mark.parametrize("reader", READERS)
@given(noise=st.binary(max_size=30), place=st.integers(0, 10_000), over=st.booleans())
@example(noise=b"\xff", place=9, over=False)
@example(noise=b"\xff\xfe", place=0, over=False)
@example(noise=b"\0" * 30, place=9, over=True)
def test_other_bytes(folder, reader, noise, place, over):
    whole = json.dumps(READERS[reader][1]).encode()
    place %= len(whole) + 1
    attempt(folder, reader, whole[:place] + noise + whole[place + len(noise) * over :])


@pytest.mark.parametrize("reader", READERS)
def test_other_encodings_and_ends_of_line(folder, reader):
    text = json.dumps(READERS[reader][1], ensure_ascii=False)
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        found = attempt(folder, reader, text.encode(encoding))
        assert isinstance(found, str) and READERS[reader][0].rpartition("/")[2] in found
    assert "UTF-16" in attempt(folder, reader, text.encode("utf-16"))


@pytest.mark.parametrize("line_ends", ["\u2028", "\u2029", "\x85", "\x1c"])
@pytest.mark.parametrize("reader", ["jsonl", "traces", "traces by lines", "vstar", "seeds"])
def test_what_only_looks_like_an_end_of_line(folder, reader, line_ends):
    text = json.dumps(READERS[reader][1], ensure_ascii=False).replace("?", f"?{line_ends} really?", 1)
    text = text.replace("\x1c", "\\u001c")
    assert not isinstance(attempt(folder, reader, text.encode()), str)


def bad_lines():
    """Lines that are no examples, of every kind: the first stands for all that JSON is not."""
    good = lambda **change: json.dumps(OWN | change).encode()
    return [
        b'{"question": "\xff"}',
        b"\x1b[2J",
        good(images=["x" * 300]),
        good(images=["a\0.png"]),
        good(seconds=10**400),
        good(seconds=float("inf")),
        good(seconds=1e300),
        good(question="\ud800"),
        b'{"question": "a", "question": "b"}',
        b"[" * 3000,
        b'{"answer": ' + b"[" * 3000 + b"]" * 3000 + b"}",
    ]


def test_every_bad_line_is_dropped_and_named(folder):
    good = json.dumps(OWN).encode()
    path = folder / "lines.jsonl"
    path.write_bytes(b"\n".join([good, *bad_lines(), good]))
    examples, report = read_examples(path, turns=True, drop=True)
    assert len(examples) == 2 and len(report.dropped) == len(bad_lines())
    for number, why in enumerate(report.dropped, 2):
        assert why.startswith(f"{path}:{number}")
    for line in bad_lines():
        path.write_bytes(good + b"\n" + line)
        with pytest.raises((ExampleError, SourceError), match=f"{path}:2"):
            read_examples(path, turns=True)
    (folder / "lines.jsonl").unlink()


def test_bad_lines_of_released_traces_are_dropped(folder):
    good = json.dumps(TRACE).encode()
    path = folder / "lines.json"
    long = json.dumps(TRACE).replace("a.png", "x" * 300).encode()
    path.write_bytes(b"\n".join([good, b'{"qid": "\xff"}', long, b"[" * 3000, good]))
    examples, report = read_examples(path, turns=True, drop=True)
    assert len(examples) == 2 and [f":{i}" in why for i, why in zip((2, 3, 4), report.dropped, strict=True)]


def write_parquet(path, rows, **types):
    columns = {name: pyarrow.array([row[name] for row in rows], types.get(name)) for name in QUESTION}
    parquet.write_table(pyarrow.table(columns), path)


def test_rows_of_parquet_that_are_no_utf8_are_dropped_and_named(folder):
    """Arrow takes the bytes of a text as they are."""
    path = folder / "q.parquet"
    rows = [QUESTION, QUESTION, QUESTION]
    write_parquet(path, rows)
    table = parquet.read_table(path)
    texts = pyarrow.StringArray.from_buffers(
        3, pyarrow.py_buffer(np.array([0, 3, 5, 8], np.int32).tobytes()), pyarrow.py_buffer(b"Who\xff?Who")
    )
    parquet.write_table(table.set_column(table.schema.get_field_index("question"), "question", texts), path)
    examples, report = read_examples(path, turns=False, drop=True)
    assert [x.question for x in examples] == ["Who", "Who"]
    assert len(report.dropped) == 1 and f"{path}, row 2: 'question' cannot be read" in report.dropped[0]
    with pytest.raises(ExampleError, match="row 2: 'question' cannot be read"):
        read_examples(path, turns=False)
    with pytest.raises(BenchmarkError, match="row 2: 'question' cannot be read"):
        read("prepared", path)
    long = [QUESTION | {"image": ["x" * 300]}, QUESTION, QUESTION | {"answer": ["['" * 3000]}]
    write_parquet(path, long)
    examples, report = read_examples(path, turns=False, drop=True)
    assert len(examples) == 2 and "xxx" in report.dropped[0]


@given(noise=st.binary(max_size=30), place=st.integers(0, 100_000), over=st.booleans())
def test_other_bytes_in_parquet(folder, noise, place, over):
    path = folder / "fuzzed.parquet"
    write_parquet(path, [QUESTION] * 2)
    whole = path.read_bytes()
    place %= len(whole) + 1
    check_parquet(path, whole[:place] + noise + whole[place + len(noise) * over :])


def test_a_name_in_parquet_that_is_no_text(folder):
    path = folder / "name.parquet"
    write_parquet(path, [QUESTION] * 2)
    whole = path.read_bytes()
    for name in (b"question", b"element"):
        check_parquet(path, whole.replace(name, b"\x80" + name[1:]))


def check_parquet(path, content):
    """It is read, or refused in words."""
    path.write_bytes(content)
    for take, errors in (
        (lambda: read_examples(path, turns=False), (ExampleError, SourceError)),
        (lambda: read("prepared", path), (BenchmarkError,)),
    ):
        try:
            take()
        except errors as error:
            assert str(error)


@given(data=st.data())
def test_other_columns_of_parquet(folder, data):
    path = folder / "columns.parquet"
    scalar = st.none() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.binary(max_size=5) | st.booleans()
    name = data.draw(st.sampled_from(list(QUESTION)))
    value = data.draw(scalar | st.lists(st.text(max_size=5), max_size=3) | st.lists(st.lists(st.integers(0, 9))))
    try:
        write_parquet(path, [QUESTION | {name: value}])
    except (pyarrow.ArrowException, UnicodeEncodeError):
        return  # nothing that Parquet could hold
    for take, errors in (
        (lambda: read_examples(path, turns=False), (ExampleError, SourceError)),
        (lambda: read("prepared", path), (BenchmarkError,)),
    ):
        try:
            take()
        except errors as error:
            assert str(error)
