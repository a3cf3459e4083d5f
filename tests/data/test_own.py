"""Examples from a file of one's own: read as written and refused by name."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from pixel_jax.data.example import ExampleError
from pixel_jax.data.own import read_own
from pixel_jax.data.read import read_examples

GOOD = {"question": "Which digit?", "images": ["a.png"], "answer": "7"}


@pytest.fixture
def write(tmp_path):
    """Writes lines (objects, or text as it is) beside two images; returns the file."""
    for i, name in enumerate(("a.png", "b.png")):
        pixels = np.random.default_rng(i).integers(0, 256, (30, 40 + i, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)

    def write(*lines):
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
        return path

    return write


def test_reads_what_is_written(write):
    turns = ["look", {"text": "a mistake", "learn": False}, {"text": "\\boxed{7}", "learn": True}]
    video = {"question": "Wie heißt es?", "images": ["a.png", "a.png"], "answer": ["7", "seven"], "video": True}
    path = write(GOOD | {"turns": turns, "id": "first"}, "", video | {"seconds": 2})
    first, second = read_own(path)

    trace = first.trace(first.query())
    assert (trace.query.question, trace.answer, trace.query.is_video) == ("Which digit?", "7", False)
    np.testing.assert_array_equal(trace.query.images[0], np.asarray(Image.open(path.parent / "a.png")))
    assert [turn.parts for turn in trace.turns] == [
        (("look", True),),
        (("a mistake", False),),
        (("\\boxed{7}", True),),
    ]
    assert all(turn.ends and turn.executed is None for turn in trace.turns)

    query = second.query()
    assert (query.question, query.is_video, query.seconds, len(query.images)) == ("Wie heißt es?", True, 2.0, 2)
    assert second.answer == ("7", "seven") and second.turns == ()


BAD = [
    ('{"question": ', "is not JSON"),
    ("[1, 2]", "is list, not an object"),
    (
        {"question": "?", "images": ["a.png"], "anwser": "7"},
        "unknown field 'anwser'; the nearest known one is 'answer'",
    ),
    (GOOD | {"second": 7}, "unknown field 'second'; the nearest known one is 'seconds' .columns says"),
    ({"images": ["a.png"], "answer": "7"}, "'question' must be a text, not None"),
    (GOOD | {"question": ""}, "'question' must be a text, not ''"),
    (GOOD | {"images": []}, r"'images' must be a path or a list of at least one, not \[\]"),
    (GOOD | {"images": "c.png"}, "there is no image .*c.png"),
    (
        GOOD | {"images": ["https://example.org/a.png"]},
        "'https://example.org/a.png' is not fetched: give the file beside",
    ),
    (GOOD | {"images": ["data:image/png;base64,%%"]}, "the content of 'data:image/png;base64' is no base64"),
    (GOOD | {"images": ["data:image/png,abc"]}, "a data URL is data:TYPE;base64,CONTENT, not"),
    (GOOD | {"images": ["a.png", "missing.png"]}, "there is no image .*missing.png"),
    (GOOD | {"answer": 7.5}, "'answer' must be a text or a list of texts, not 7.5"),
    (GOOD | {"answer": True}, "'answer' must be a text or a list of texts, not True"),
    ({"question": "?", "images": ["a.png"]}, "'answer' must be a text or a list of texts, not None"),
    (GOOD | {"answer": []}, r"'answer' must be .*, not \[\]"),
    (GOOD | {"answer": ["7", None]}, "'answer' must be .*None"),
    (GOOD | {"video": 1}, "'video' must be true or false, not 1"),
    (GOOD | {"seconds": 0}, "'seconds' must be a positive number, at most a million, not 0"),
    (GOOD | {"seconds": True}, "'seconds' must be a positive number, at most a million, not True"),
    (GOOD | {"category": 3}, "'category' must be a text, not 3"),
    (GOOD | {"turns": "look"}, "'turns' must be a list of turns, not 'look'"),
    (GOOD | {"turns": ["look", 3]}, "a turn is a text or .*, not 3"),
    (GOOD | {"turns": [{"text": "look", "lern": False}]}, "a turn is .*'lern'"),
    (GOOD | {"turns": [{"learn": False}]}, "a turn is .*'learn': False"),
    (GOOD | {"turns": [{"text": "look", "learn": "false"}]}, "a turn is .*'learn': 'false'"),
    (GOOD | {"turns": ["look", ""]}, "a turn is .*, not ''"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_a_bad_line_is_named(write, line, message):
    path = write(GOOD, "", line)
    with pytest.raises(ExampleError, match=message) as caught:
        read_own(path)
    assert str(caught.value).startswith(f"{path}:3")


def test_turns_where_they_are_needed(write):
    path = write(GOOD)
    assert read_own(path)[0].turns == ()
    with pytest.raises(
        ExampleError, match=r":1: 'turns' must be a list of turns, or 'messages' end with the assistant's"
    ):
        read_own(path, turns=True)


def test_a_directory_is_all_its_files_in_the_order_of_their_names(write, tmp_path):
    path = write(GOOD, GOOD | {"images": ["b.png"], "category": "street"})
    path.rename(tmp_path / "b.jsonl")
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD | {"id": "first"}))
    (tmp_path / "notes.json").write_text("no data")
    examples, _ = read_examples(tmp_path, turns=False)
    assert [x.id for x in examples] == ["first", "b.jsonl:1", "b.jsonl:2"]  # wherever the folder lies
    assert examples[2].images == (tmp_path / "b.png",) and [x.category for x in examples] == ["", "", "street"]
    (tmp_path / "c.jsonl").write_text("no")
    with pytest.raises(ExampleError, match="c.jsonl:1 is not JSON"):
        read_examples(tmp_path, turns=False)
    assert len(read_examples(tmp_path, turns=False, drop=True)[0]) == 3


def test_no_examples(write, tmp_path):
    with pytest.raises(ExampleError, match="has no examples"):
        read_examples(write("", "  "), turns=False)
    with pytest.raises(ExampleError, match="nowhere.jsonl' cannot be opened"):
        read_own(tmp_path / "nowhere.jsonl")
    for name in ("nowhere.jsonl", "nowhere"):
        with pytest.raises(ExampleError, match=f"{name} is not a file or directory"):
            read_examples(tmp_path / name, turns=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExampleError, match=r"empty holds no \*.jsonl or \*.parquet files and no prepared TFDS data"):
        read_examples(tmp_path / "empty", turns=False)


def test_bad_lines_can_be_counted_instead(write):
    path = write(GOOD, GOOD | {"answer": 7.5}, "no", GOOD | {"id": "last"})
    (path.parent / "b.png").write_bytes((path.parent / "b.png").read_bytes()[:200])
    path.write_text(path.read_text() + "\n" + json.dumps(GOOD | {"images": ["b.png"]}))
    examples, report = read_examples(path, turns=False, drop=True)
    assert [x.id for x in examples] == [f"{path.name}:1", "last"]
    assert [re.search("answer|JSON|b.png", why).group() for why in report.dropped] == ["answer", "JSON", "b.png"]
