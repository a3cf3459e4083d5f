"""The released files: read as they are, and every row that is not as it should be is named or counted."""

import copy
import decimal
import json
import re
import sys
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixel_jax.data import released
from pixel_jax.data.example import ExampleError, ReadReport
from pixel_jax.data.images import ImageError
from pixel_jax.data.read import read_examples
from pixel_jax.data.sources import Folder, Member, SourceError, read_bytes
from pixel_jax.dialog import Vocabulary, build_tokenizer, grammar
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.prompts import prompt_tokens
from tests.data import released_files as files


def strict(path, turns=True):
    return read_examples(path, turns=turns)[0]


def dropping(path, turns=True):
    return read_examples(path, turns=turns, drop=True)


def last_two(row):
    """The released trainer's mask in its own terms: the roles at places -2 and -4 of the conversation, once the turn that
    comes next is added to it."""
    roles = [message["role"] for message in row["message_list"]] + ["assistant"]
    return [i in (len(roles) - 2, len(roles) - 4) for i, role in enumerate(roles[:-1]) if role == "assistant"]


@pytest.mark.parametrize("lines", [False, True])
def test_traces(tmp_path, lines):
    examples = strict(files.write_traces(tmp_path, lines=lines))
    assert [x.id for x in examples] == ["SA1B-0", "SA1B-1", "STARQA-7", "text-3"]
    assert [x.question for x in examples] == ["What?", "What?", "When?", "<image>\nWho?"]
    assert [x.video for x in examples] == [False, False, True, False] and all(x.answer == ("7",) for x in examples)
    for example, row in zip(examples, files.traces(), strict=True):
        said = [m["content"][0]["text"] for m in row["message_list"] if m["role"] == "assistant"]
        learned = [turn.parts[0][1] for turn in example.turns]
        assert learned == last_two(row)
        if example.id != "SA1B-1":
            assert [turn.parts[0][0] for turn in example.turns] == said
    assert "[0.3854166666666667, 0.2, 0.5, 0.6]" in examples[1].turns[1].parts[0][0]
    video = examples[2].query()
    assert [image.shape for image in video.images] == [(96, 128, 3)] * 4 and video.seconds == 1.0
    np.testing.assert_array_equal(video.images[1], released_pixels(tmp_path / "videos.zip", files.FRAMES[1]))


def test_a_prompt_is_what_the_row_says(tmp_path):
    """Question and images in the row's order, as the chat template renders it."""
    tokenizer, config = build_tokenizer([]), RolloutConfig(min_pixels=28 * 28)
    vocabulary = Vocabulary.of(tokenizer)
    turned = change(WORDS, "message_list", 1, "content", WORDS["message_list"][1]["content"][::-1])
    rows = [*files.traces(), turned]
    pads = {vocabulary.image_pad, vocabulary.video_pad}
    for example, row in zip(strict(files.write_traces(tmp_path, rows)), rows, strict=True):
        bare = lambda part: {kind: value for kind, value in part.items() if value is not None}
        messages = [message | {"content": [*map(bare, message["content"])]} for message in row["message_list"][:2]]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert example.text_first == (row is not turned) and example.outline().text_first == example.text_first
        ids = prompt_tokens(example.query(), vocabulary, config)
        once = [x for x, before in zip(ids, [None, *ids], strict=False) if x not in pads or x != before]
        assert len(once) < len(ids) and once == vocabulary.tokenizer.encode(text, add_special_tokens=False)


def released_pixels(archive, name):
    from PIL import Image

    with zipfile.ZipFile(archive) as file, file.open(name) as member:
        return np.asarray(Image.open(member).convert("RGB"))


def test_questions(tmp_path):
    examples = strict(files.write_questions(tmp_path), turns=False)
    assert [(x.id, x.answer, x.video, len(x.images)) for x in examples] == [
        ("InfoVQA-1", ("\\boxed{7}",), False, 1),
        ("InfoVQA-2", ("\\boxed{['a', 'b']}",), False, 1),
        ("STARQA-3", ("\\boxed{B}",), True, 4),
    ]
    with pytest.raises(ExampleError, match="3 examples have no turns to learn, the first one is InfoVQA-1"):
        strict(tmp_path / "release.parquet")


def test_archives_packed_otherwise(tmp_path):
    """With and without the archive's name in front, or unpacked in either way: the same pixels."""
    path = files.write_questions(tmp_path)
    pixels = [x.query().images for x in strict(path, turns=False)]
    for name in ("images", "videos"):
        old = tmp_path / f"{name}.zip"
        with zipfile.ZipFile(old) as file:
            members = {member: file.read(member) for member in file.namelist()}
        bare = {member.removeprefix(f"{name}/"): data for member, data in members.items()}
        files.archive(old, bare)

    def same():
        for images, example in zip(pixels, strict(path, turns=False), strict=True):
            for a, b in zip(images, example.query().images, strict=True):
                np.testing.assert_array_equal(a, b)

    same()
    for name in ("images", "videos"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip") as file:
            file.extractall(tmp_path / name)
        (tmp_path / f"{name}.zip").unlink()
    same()


def change(row, *steps):
    """A copy of a row in which `steps[:-2]` lead to a place that gets the value `steps[-1]`."""
    row = copy.deepcopy(row)
    place = row
    for step in steps[:-2]:
        place = place[step]
    place[steps[-2]] = steps[-1]
    return row


SINGLE, _, VIDEO, WORDS = files.traces()
BAD = {
    "no object": ([1], "row 1 is list, not an object"),
    "no qid": ({"message_list": []}, "has no 'qid'"),
    "qid of another type": (SINGLE | {"qid": None}, "'qid' must be a text or a number, not None"),
    "no list of messages": (SINGLE | {"message_list": "x"}, "'message_list' must be a list, not str"),
    "no messages": (SINGLE | {"message_list": []}, "must take turns"),
    "assistant twice": (SINGLE | {"message_list": SINGLE["message_list"][:3] * 2}, "must take turns"),
    "user last": (SINGLE | {"message_list": SINGLE["message_list"][:-1]}, "must take turns"),
    "call last": (SINGLE | {"message_list": SINGLE["message_list"][:-2]}, "turn 1 of the assistant ends with a call"),
    "a part of two kinds": (
        change(SINGLE, "message_list", 1, "content", 1, "text", "x"),
        r"one of text, image and video, not \['image', 'text'\]",
    ),
    "a part of no kind": (change(SINGLE, "message_list", 1, "content", 1, "image", None), r"not \[\]"),
    "a part of an unknown kind": (change(SINGLE, "message_list", 1, "content", 1, {"audio": "x"}), "'audio'"),
    "a part that is a text": (change(SINGLE, "message_list", 1, "content", 1, "x"), "a part of a message is an object"),
    "a question without an image": (
        change(SINGLE, "message_list", 1, "content", [files.part(text="?")]),
        "needs a question and an image or a video",
    ),
    "two videos": (
        change(VIDEO, "message_list", 1, "content", [files.part(text="?"), *[files.part(video=files.FRAMES)] * 2]),
        "shows 2 videos",
    ),
    "an assistant that shows": (
        change(SINGLE, "message_list", 2, "content", 0, files.part(image="images/0-0.png")),
        "turn 1 of the assistant must be a text",
    ),
    "no call": (
        change(SINGLE, "message_list", 2, "content", 0, "text", "I look."),
        "turn 1 of the assistant is followed by another and has no call",
    ),
    "an unreadable call that was answered": (
        change(SINGLE, "message_list", 2, "content", 0, "text", files.crop(0.1, 0.2, 0.3)),
        "call of turn 1 cannot be read, but images came back",
    ),
    "an image that is not there": (
        change(SINGLE, "message_list", 1, "content", 1, "image", "images/9.png"),
        "there is no 'images/9.png' in .*images.zip, videos.zip",
    ),
    "an image above the folder": (
        change(SINGLE, "message_list", 1, "content", 1, "image", "../../etc/passwd"),
        "there is no '../../etc/passwd' in",
    ),
    "an image elsewhere": (
        change(SINGLE, "message_list", 1, "content", 1, "image", "https://example.org/a.png"),
        "'https://example.org/a.png' is not fetched",
    ),
    "a frame that is no text": (
        change(VIDEO, "message_list", 1, "content", 1, "video", [3]),
        "the name of a file must be a text, not 3",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_trace_is_named_or_dropped_and_counted(tmp_path, case):
    row, message = BAD[case]
    path = files.write_traces(tmp_path, [WORDS, row, VIDEO])
    with pytest.raises((ExampleError, SourceError), match=message.replace("row 1", "row 2")):
        strict(path)
    examples, report = dropping(path)
    assert [x.id for x in examples] == ["text-3", "STARQA-7"]
    assert len(report.dropped) == 1 and re.search(message.replace("row 1", "row 2"), report.dropped[0])
    assert "1 rows dropped" in str(report) and report.dropped[0] in str(report)


GOOD = files.questions()[0]
BAD_QUESTIONS = {
    "answer": ([], r"'answer' cannot be \[\]"),
    "image": (None, "'image' cannot be None"),
    "question": ("", "'question' cannot be ''"),
    "qid": (None, "'qid' cannot be None"),
}


@pytest.mark.parametrize("field", BAD_QUESTIONS)
def test_a_bad_question_is_named_or_dropped_and_counted(tmp_path, field):
    value, message = BAD_QUESTIONS[field]
    path = files.write_questions(tmp_path, [GOOD, GOOD | {field: value}])
    with pytest.raises(ExampleError, match=f"row 2 .*: {message}"):
        strict(path, turns=False)
    examples, report = dropping(path, turns=False)
    assert len(examples) == 1 and len(report.dropped) == 1 and re.search(message, report.dropped[0])


def test_files_that_are_something_else(tmp_path, monkeypatch):
    path = files.write_questions(tmp_path, [{name: GOOD[name] for name in GOOD if name != "is_video"}])
    with pytest.raises(
        ExampleError, match="row 1: unknown field 'image'; the nearest known one is 'images' .columns says"
    ):
        strict(path, turns=False)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ExampleError, match="release.parquet cannot be read"):
        strict(path, turns=False)
    path = files.write_traces(tmp_path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ExampleError, match="release.json is not JSON"):
        strict(path)
    with pytest.raises(ExampleError, match="must be a .jsonl, .json or .parquet file, or a directory of"):
        strict(files.archive(tmp_path / "data.zip", {}))
    with pytest.raises(ExampleError, match="nowhere.json is not a file"):
        strict(tmp_path / "nowhere.json")
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # importing it now fails
    with pytest.raises(ExampleError, match=r"is a Parquet file: `pip install pyarrow` to read it"):
        strict(tmp_path / "release.parquet", turns=False)
    (tmp_path / "images.zip").write_bytes(b"PK no")
    with pytest.raises(SourceError, match="images.zip is no ZIP archive"):
        strict(files.write_traces(tmp_path) and broken(tmp_path))


def broken(folder):
    (folder / "images.zip").write_bytes(b"PK no")
    return folder / "release.json"


def test_a_truncated_image_is_an_error_when_its_turn_comes_or_dropped_at_once(tmp_path):
    path = files.write_traces(tmp_path)
    files.archive(
        tmp_path / "images.zip",
        {"images/0-0.png": files.encoded(0, 120, 150)[:2000], "images/0-1.png": files.encoded(1, 20, 20)},
    )
    examples = strict(path)
    with pytest.raises(ImageError, match=r"images.zip:images/0-0.png cannot be read"):
        examples[0].query()
    kept, report = dropping(path)
    assert [x.id for x in kept] == ["STARQA-7"] and len(report.dropped) == 3
    assert all(re.match(r"(SA1B-0|SA1B-1|text-3): .*images/0-0.png cannot be read", why) for why in report.dropped)


def test_broken_archives(tmp_path):
    data = files.encoded(0, 50, 50)
    path = files.archive(tmp_path / "a.zip", {"a.png": data}, zipfile.ZIP_STORED)
    packed = path.read_bytes()
    middle = packed.index(data) + len(data) // 2
    (tmp_path / "crc.zip").write_bytes(packed[:middle] + b"\0\1\2\3" + packed[middle + 4 :])
    with pytest.raises(ImageError, match="crc.zip:a.png cannot be read: Bad CRC-32"):
        read_bytes(Member(tmp_path / "crc.zip", "a.png"))
    at = packed.index(b"PK\1\2") + 8
    (tmp_path / "locked.zip").write_bytes(packed[:at] + b"\1\0" + packed[at + 2 :])
    with pytest.raises(ImageError, match="locked.zip:a.png is encrypted"):
        read_bytes(Member(tmp_path / "locked.zip", "a.png"))
    files.archive(tmp_path / "b.zip", {"a.png": data})
    with pytest.raises(SourceError, match="'a.png' is both .* and "):
        Folder(tmp_path).find("a.png")


def test_what_is_mended_is_counted(tmp_path):
    unboxed = change(WORDS, "message_list", 2, "content", 0, "text", "It says 7<|im_end|>")
    asked = change(WORDS, "message_list", 1, "content", 0, "text", "Who?")
    plain = files.conversation(
        "Who?", files.part(image="images/0-0.png"), ["\\boxed{7}"], [], files.GUIDELINES["notool"]
    )
    spaced = change(SINGLE, "message_list", 2, "content", 0, "text", files.crop(1e-5, 0.1, 0.5, 0.6) + "<|im_end|>\n")
    another = change(WORDS, "message_list", 0, "content", 0, "text", "You are helpful.")
    none = WORDS | {"message_list": WORDS["message_list"][1:]}
    turned = change(WORDS, "message_list", 1, "content", WORDS["message_list"][1]["content"][::-1])
    parts = [files.part(text="<image>\n"), files.part(image="images/0-0.png"), files.part(text=f"Who?\n\n{files.VCOT}")]
    middle = change(WORDS, "message_list", 1, "content", parts)
    rows = [unboxed, asked, {"qid": 5, "message_list": plain}, spaced, another, none, turned, middle]
    path = files.write_traces(tmp_path, rows)
    examples, report = read_examples(path, turns=True)
    assert examples[0].turns[0].parts[0][0] == "It says 7" and examples[0].answer == ()
    assert [x.question for x in examples[1:3]] == ["Who?", "Who?"] and examples[2].id == "5"
    assert "[1e-05, 0.1, 0.5, 0.6]" in examples[3].turns[0].parts[0][0]
    assert examples[3].turns[0].parts[0][0].endswith("</tool_call>")
    assert dict(report.mended) == {
        "an answer without \\boxed{} was kept": 1,
        "a question without known guidelines was kept as it is": 1,
        "the 'notool' guidelines were replaced": 1,
        "a system message other than ours, or none, was replaced by ours": 2,
        "text of a question on both sides of its images was put before them": 1,
    }
    assert [x.text_first for x in examples] == [True] * 6 + [False, True]
    assert str(report).count("1 times") == 4 and len({x.question for x in examples[4:]}) == 1


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.integers(1, 3))
def test_every_box_of_shares_is_readable(box, target):
    """Whatever Python writes for a share of an image, to the millionth that is read of it."""
    call = grammar.parse_turn(files.crop(*box, target=target)).call
    assert call is not None and call.arguments["target_image"].units == target
    for number, share in zip(call.arguments["bbox_2d"], box, strict=True):
        exact = decimal.Decimal(repr(share))
        assert 0 <= exact - (number.units + decimal.Decimal(number.micros) / 10**6) < decimal.Decimal("0.000001")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["user", "assistant", "system"]),
    lambda x: (
        st.lists(x, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "text", "image", "video", "type"]), x, max_size=3)
    ),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("folder")
    files.write_traces(path)
    return Folder(path)


@given(st.lists(JSON, max_size=4), st.integers(0, 4), st.integers(0, 3))
def test_any_json_is_an_example_or_refused_by_name(folder, values, place, which):
    """A released conversation with other messages put into it somewhere."""
    row = copy.deepcopy(files.traces()[which])
    row["message_list"][place : place + 1] = values
    try:
        example = released.trace_example(row, "here", folder, ReadReport("here"))
    except (ExampleError, SourceError) as error:
        assert str(error)
    else:
        assert example.turns and example.images and json.dumps(row)
