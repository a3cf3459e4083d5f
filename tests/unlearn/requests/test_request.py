"""Files of requests: what is read, and what is refused with its line."""

import json
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlearn_jax.requests.request import EditRequestError, Request, parse_request, read_requests

FILED = {"reason": "consent withdrawn", "who": "A. Person", "when": "2026-11-30"}
REMOVE = {"id": "a", "kind": "remove", **FILED}


def write(path, *values, end="\n"):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in values) + end)
    return path


def test_every_kind_is_read_and_stored(tmp_path):
    (tmp_path / "new.png").write_bytes(b"an image")
    path = write(
        tmp_path / "requests.jsonl",
        REMOVE,
        {**REMOVE, "id": ["a", "b"]},
        {**REMOVE, "kind": "answer", "answer": "4"},
        {**REMOVE, "kind": "question", "text": "What?"},
        {**REMOVE, "kind": "image", "image": "new.png"},
        {**REMOVE, "kind": "mask", "mask": "[1, 2]"},
        {**REMOVE, "kind": "part", "part": "[1, 2]", "becomes": "[3, 4]"},
        {**REMOVE, "kind": "trace", "turns": ["a", {"text": "b", "learn": False}]},
    )
    requests = read_requests(path)
    filed = ("consent withdrawn", "A. Person", "2026-11-30")
    assert requests == [
        Request(("a",), "remove", "", b"", *filed),
        Request(("a", "b"), "remove", "", b"", *filed),
        Request(("a",), "answer", "4", b"", *filed),
        Request(("a",), "question", "What?", b"", *filed),
        Request(("a",), "image", "", b"an image", *filed),
        Request(("a",), "mask", "[1, 2]", b"", *filed),
        Request(("a",), "part", "[1, 2]", b"", *filed, "[3, 4]"),
        Request(("a",), "trace", '["a", {"learn": false, "text": "b"}]', b"", *filed),
    ]
    assert len({request.stored() for request in requests}) == 8
    (tmp_path / requests[4].image_name).write_bytes(b"an image")
    for request in requests:
        assert parse_request(json.loads(request.stored()), "stored", tmp_path) == request


MISTAKES = {
    "no request": ([], "holds no request"),
    "no object": (["[]"], r":1 must be an object"),
    "no JSON": ([REMOVE, "{"], r":2 is not JSON"),
    "an unknown kind": ([{**REMOVE, "kind": "forget"}], "kind must be one of remove, question"),
    "a missing field": ([{k: v for k, v in REMOVE.items() if k != "who"}], "needs the field 'who'"),
    "no answer": ([{**REMOVE, "kind": "answer"}], "needs the field 'answer'"),
    "a field too many": ([{**REMOVE, "answer": "4"}], "has no field 'answer'"),
    "half a part": ([{**REMOVE, "kind": "part", "part": "4"}], "needs the field 'becomes'"),
    "no turns": ([{**REMOVE, "kind": "trace", "turns": []}], "turns must be a list of turns that is not empty"),
    "a number for a text": ([{**REMOVE, "kind": "answer", "answer": 4}], "answer must be a text"),
    "an empty text": ([{**REMOVE, "reason": " "}], "reason must be a text"),
    "an empty list": ([{**REMOVE, "id": []}], "id must be"),
    "a number for an id": ([{**REMOVE, "id": [3]}], "id must be"),
    "an id twice": ([{**REMOVE, "id": ["a", "b", "a"]}], "'a' occurs twice"),
    "two examples to correct": ([{**REMOVE, "id": ["a", "b"], "kind": "answer", "answer": "4"}], "one example, not 2"),
    "no date": ([{**REMOVE, "when": "yesterday"}], "when must be a date"),
    "no image": ([{**REMOVE, "kind": "image", "image": "nowhere.png"}], "nowhere.png.* cannot be opened"),
    "a key twice": (['{"id": "a", "id": "b"}'], "occurs twice"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named_with_their_line(name, tmp_path):
    values, message = MISTAKES[name]
    with pytest.raises(EditRequestError, match=message):
        read_requests(write(tmp_path / "requests.jsonl", *values))


def test_a_file_cut_off_in_the_middle(tmp_path):
    whole = json.dumps(REMOVE) + "\n" + json.dumps(REMOVE)
    path = tmp_path / "requests.jsonl"
    for end in range(len(json.dumps(REMOVE)) + 2, len(whole)):
        path.write_text(whole[:end])
        with pytest.raises(EditRequestError, match=r"jsonl:2 .*The file ends in the middle of this line"):
            read_requests(path)
    with pytest.raises(EditRequestError, match="cannot be opened"):
        read_requests(tmp_path / "nowhere.jsonl")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
)


@given(st.dictionaries(st.sampled_from([*REMOVE, "answer", "text", "mask", "other"]), values) | values)
def test_anything_is_read_or_refused(value):
    try:
        request = parse_request(value, "here", pathlib.Path("nowhere"))
    except EditRequestError as error:
        assert str(error).startswith("here")
    else:
        assert parse_request(json.loads(request.stored()), "again", pathlib.Path("nowhere")) == request
