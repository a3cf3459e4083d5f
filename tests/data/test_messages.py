"""Rows as people have them: conversations in several styles, Parquet, names of other people, and what is hostile."""

import base64
import io
import json
import string

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from pixel_jax.data.digests import Digests, digest_rows
from pixel_jax.data.example import ExampleError, ReadReport
from pixel_jax.data.messages import read_dialogue
from pixel_jax.data.own import read_own, read_row
from pixel_jax.data.read import read_examples
from pixel_jax.dialog.formats import call_format
from pixel_jax.dialog.grammar import Language, parse_turn
from pixel_jax.dialog.template import system_prompt
from pixel_jax.evaluation.benchmarks import BenchmarkError, read
from pixel_jax.evaluation.stages import about
from pixel_jax.tools import CROP_IMAGE, RELEASED

ARGUMENTS = {"bbox_2d": [0.1, 0.2, 0.5, 0.6], "target_image": 1}
CALL = f'I look.\n<tool_call>\n{{"name": "crop_image_normalized", "arguments": {json.dumps(ARGUMENTS)}}}\n</tool_call>'
END = "\\boxed{7}"


def png(seed: int, height: int = 30, width: int = 40) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i, name in enumerate("ab"):
        (folder / f"{name}.png").write_bytes(png(i))
    return folder


def url(seed: int) -> str:
    return "data:image/png;base64," + base64.b64encode(png(seed)).decode()


def in_style(style: str, question: str, pictures: int, said: list[str], first: bool) -> dict:
    """The same conversation as it is written in one of the styles; `first`: pictures stand before the question."""
    names = ["a.png", "b.png"][:pictures]
    if style == "placeholders":
        marks = "<image>" * pictures
        user, fields = marks + question if first else question + marks, {"images": names}
    else:
        parts = {
            "openai": [{"type": "image_url", "image_url": {"url": url(i), "detail": "high"}} for i in range(pictures)],
            "hugging face": [{"type": "image", "image": name} for name in names],
            "files": [{"type": "image_url", "image_url": {"url": f"file://{name}"}} for name in names],
            "trl": [{"type": "image"}] * pictures,
        }[style]
        text = [{"type": "text", "text": question}]
        user, fields = parts + text if first else text + parts, {"images": names} if style == "trl" else {}
    messages = [{"role": "user", "content": user}]
    for i, turn in enumerate(said):
        # What came back is not read: one that uses tools has a message of that role.
        messages += [{"role": "tool" if style == "openai" else "user", "content": "Here."}] if i else []
        messages.append({"role": "assistant", "content": turn})
    return {"messages": messages, "answer": "7", "box": [1, 2], **fields}


STYLES = ("openai", "hugging face", "files", "trl", "placeholders")
WORDS = st.text(string.ascii_letters + " ?éß", min_size=1, max_size=20).filter(lambda x: x.strip() == x)


@given(WORDS, st.integers(1, 2), st.lists(WORDS, max_size=2), st.booleans())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_conversation_means_the_same_in_every_style(folder, question, pictures, thoughts, first):
    said = [*[f"{x}{CALL}" for x in thoughts], END]
    for style in STYLES:
        row = json.loads(json.dumps(in_style(style, question, pictures, said, first)))
        example = read_row(row, "here:1", folder, report=ReadReport("here"))
        assert (example.question, example.answer, example.fields) == (question, ("7",), {"box": [1, 2]})
        assert [turn.parts for turn in example.turns] == [((text, True),) for text in said]
        assert example.text_first is (not first) and not example.video
        images = example.query().images
        for i, image in enumerate(images):
            np.testing.assert_array_equal(image, np.asarray(Image.open(folder / f"{'ab'[i]}.png")))
        assert len(images) == pictures


def test_calls_weights_videos_and_other_system_messages(folder):
    function = {"name": "crop_image_normalized", "arguments": json.dumps(ARGUMENTS)}
    messages = [
        {"role": "system", "content": "You are a pirate."},
        {"role": "user", "content": "<video>Which?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "image_url", "image_url": url(0)}]},
        {"role": "assistant", "content": END, "weight": 0},
    ]
    report = ReadReport("here")
    row = {"messages": messages, "images": ["a.png", "b.png", "a.png"], "video": True, "seconds": 2}
    example = read_row(row, "here:1", folder, turns=True, report=report)
    assert example.video and len(example.images) == 3 and example.seconds == 2 and example.answer == ("7",)
    called, end = (turn.parts[0] for turn in example.turns)
    assert parse_turn(called[0]).call == parse_turn(CALL).call is not None and called[1] and end == (END, False)
    assert report.mended == {"a system message other than ours was replaced by ours": 1}
    # Without a mark in the text the pictures of the row come first, as in its own format.
    plain = [{"role": "user", "content": "Which?"}]
    example = read_row({"messages": plain, "images": "a.png", "answer": 7}, "here:1", folder, report=report)
    assert example.images == (folder / "a.png",) and example.answer == ("7",) and not example.text_first


def asks(*parts) -> dict:
    return {"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}


def link(url) -> dict:
    return asks({"type": "image_url", "image_url": {"url": url}})


USER, TURN = asks({"type": "image", "image": "a.png"}), {"role": "assistant", "content": END}
BAD = {
    "no list": ("?", "messages must be a list, not str"),
    "empty": ([], r"must take turns, the user first, not \[\]"),
    "no object": (["?"], "message 1 is str, not an object"),
    "no role": ([{"content": "?"}], "message 1 has no 'role'"),
    "another role": ([{"role": "developer", "content": "?"}, USER, TURN], "must take turns"),
    "assistant first": ([TURN, USER], "must take turns"),
    "no picture": ([{"role": "user", "content": "?"}], "needs a question and an image or a video"),
    "no question": ([{"role": "user", "content": USER["content"][:1]}], "needs a question and an image"),
    "a link": ([link("HTTP://x/a.png")], "'HTTP://x/a.png' is not fetched"),
    "a bucket": ([asks({"type": "image", "image": "gs://x/a.png"})], "'gs://x/a.png' is not fetched"),
    "no base64": ([link("data:a;base64,é")], "is no base64"),
    "no url": ([asks({"type": "image_url", "image_url": {}})], "image_url has no 'url'"),
    "sound": (
        [asks({"type": "input_audio", "input_audio": {}})],
        r"one of text, image and video, not \['input_audio'\]",
    ),
    "a place for nothing": ([asks({"type": "image"})], r"one of text, image and video, not \[\]"),
    "two calls": ([USER, {"role": "assistant", "content": "", "tool_calls": [{}, {}]}], "must hold one call"),
    "a chat": (
        [USER, TURN, {"role": "user", "content": "And?"}, TURN],
        "turn 1 .* is followed by another and has no call",
    ),
    "a call at the end": ([USER, {"role": "assistant", "content": CALL}], "turn 1 of the assistant ends with a call"),
    "user last": ([USER, TURN, {"role": "user", "content": "Thanks."}], "the assistant end"),
    "a weight": ([USER, TURN | {"weight": 0.5}], "'weight' is 1 or 0"),
    "outside": ([asks({"type": "image", "image": "/etc/passwd"})], "image_folders"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_conversation_is_named_in_a_line(folder, case):
    messages, why = BAD[case]
    with pytest.raises(ExampleError, match=why) as caught:
        read_row({"messages": messages, "answer": "7"}, "here:3", folder, report=ReadReport("here"))
    assert str(caught.value).startswith("here:3") and "\n" not in str(caught.value) and len(str(caught.value)) < 500


NAMES = "role content type text image image_url url video tool_calls function weight".split()
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    VALUES | st.sampled_from(("user", "assistant", END, CALL, "a.png")),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.sampled_from(NAMES), x, max_size=4),
    max_leaves=20,
)


@given(JSON, st.none() | st.lists(st.sampled_from(("a.png", "b.png")), max_size=3), st.booleans())
@settings(max_examples=300)
def test_whatever_a_conversation_is_it_is_read_or_refused(messages, pictures, video):
    try:
        found = read_dialogue(messages, "here:1", pictures, video=video)
    except ExampleError as error:
        assert str(error).startswith("here:1")
    else:
        assert found.first.text.strip() and found.first.images


def test_parquet_with_names_of_its_own(folder):
    """As data sets of the hub have it: pictures as structs of bytes, a list of them, numbers, and columns for rewards."""
    rows = {
        "prompt": ["What?", "And here?"],
        "image": [[{"bytes": png(0), "path": None}], [{"bytes": None, "path": "b.png"}]],
        "solution": ["7", "8"],
        "bbox": [[1.0, 2.0], None],
        "source": ["web", "book"],
    }
    parquet.write_table(pyarrow.table(rows), folder / "data.parquet")
    columns = {"question": "prompt", "images": "image", "answer": "solution"}
    examples, report = read_examples(folder / "data.parquet", turns=False, columns=columns)
    assert [x.question for x in examples] == rows["prompt"] and [x.answer for x in examples] == [("7",), ("8",)]
    assert [x.fields for x in examples] == [{"bbox": [1.0, 2.0], "source": "web"}, {"bbox": None, "source": "book"}]
    assert "2 times the further field 'source' was kept" in str(report)
    for i, example in enumerate(examples):
        np.testing.assert_array_equal(example.query().images[0], np.asarray(Image.open(folder / f"{'ab'[i]}.png")))
    with Digests(folder / "digests.json") as digests:  # a picture is known by its content, wherever it stood
        same = [x._replace(images=(folder / f"{'ab'[i]}.png",)) for i, x in enumerate(examples)]
        first, second = digest_rows(examples[:1], digests), digest_rows(same[:1], digests)
    assert {k: v for k, v in first.items() if k != "images"} == {k: v for k, v in second.items() if k != "images"}
    questions, _ = read("jsonl", folder / "data.parquet", columns=columns)
    assert [x.question for x in questions] == rows["prompt"]
    with pytest.raises(BenchmarkError, match="columns are of data of one's own .*'vstar' has fields of its own"):
        read("vstar", folder, columns=columns)


@pytest.mark.parametrize(
    "columns, why",
    [
        ({"querry": "prompt"}, "columns: there is no field 'querry'; the fields are question, images"),
        ({"question": ""}, "columns: 'question' has no name in the data"),
        ({"question": "x", "answer": "x"}, "columns: 'x' cannot be two fields"),
        ({"question": "nowhere"}, r"row 1 has no 'nowhere' to be the question \(columns\), only \["),
    ],
)
def test_a_wrong_map_of_columns_is_named(folder, columns, why):
    table = pyarrow.table({"question": ["?"], "images": ["a.png"], "answer": ["7"]})
    parquet.write_table(table, folder / "own.parquet")
    assert read_own(folder / "own.parquet")[0].answer == ("7",)
    with pytest.raises(ExampleError, match=why):
        read_own(folder / "own.parquet", columns=columns)


def test_a_damaged_or_strange_parquet_is_named(folder):
    (folder / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ExampleError, match="broken.parquet cannot be read"):
        read_examples(folder / "broken.parquet", turns=False)
    table = pyarrow.table({"question": ["?"], "images": ["a.png"], "answer": ["7"], "mask": [b"\0"]})
    parquet.write_table(table, folder / "strange.parquet")
    with pytest.raises(ExampleError, match="the further field 'mask' holds bytes, which nothing can be done with"):
        read_own(folder / "strange.parquet")
    (folder / "broken.parquet").unlink()


# Calls in each format, typed by hand: as a turn has it, and as OpenAI's `tool_calls`.
IN_FORMAT = {
    "deepeyes": (
        '<think>Closer.</think>\n<tool_call>\n{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [10, 20, 35, 28], '
        '"label": "the sign"}}\n</tool_call>',
        {"name": "image_zoom_in_tool", "arguments": '{"bbox_2d": [10, 20, 35, 28], "label": "the sign"}'},
        [10, 20, 35, 28],
    ),
    "mini_o3": (
        '<think>Closer.</think>\n<grounding>{"bbox_2d": [0.25, 0.5, 0.75, 1.0], "source": "original_image"}</grounding>',
        {"name": "crop_image_normalized", "arguments": {"bbox_2d": [0.25, 0.5, 0.75, 1.0], "source": "original_image"}},
        [0.25, 0.5, 0.75, 1.0],
    ),
    "qwen3_vl": (
        '<tool_call>\n{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [250, 500, 750, 1000], "label": "sign", '
        '"img_idx": 0}}\n</tool_call>\n',
        {
            "name": "image_zoom_in_tool",
            "arguments": '{"bbox_2d": [250, 500, 750, 1000], "label": "sign", "img_idx": 0}',
        },
        [0.25, 0.5, 0.75, 1.0],
    ),
    "qwen3_5": (
        "<tool_call>\n<function=image_zoom_in_tool>\n<parameter=bbox_2d>\n[250, 500, 750, 1000]\n</parameter>\n"
        "<parameter=label>\nsign\n</parameter>\n<parameter=img_idx>\n0\n</parameter>\n</function>\n</tool_call>\n",
        {
            "name": "image_zoom_in_tool",
            "arguments": '{"bbox_2d": [250, 500, 750, 1000], "label": "sign", "img_idx": 0}',
        },
        [0.25, 0.5, 0.75, 1.0],
    ),
    "crop_image": (
        '<tool_call>\n{"name": "crop_image", "arguments": {"bbox_2d": [4, 5, 30, 20.5], "target_image": 1}}\n</tool_call>',
        {"name": "crop_image", "arguments": '{"bbox_2d": [4, 5, 30, 20.5], "target_image": 1}'},
        [4, 5, 30, 20.5],
    ),
}
LANGUAGES = {name: Language((CROP_IMAGE,) if name == "mini_o3" else RELEASED, call_format(name)) for name in IN_FORMAT}


@pytest.mark.parametrize("name", IN_FORMAT)
def test_conversations_are_read_in_the_format_of_the_config(folder, name):
    """In `messages` and as `tool_calls`, and in the released traces' file; in another format the error names the right one."""
    written, function, box = IN_FORMAT[name]
    language, found = LANGUAGES[name], []
    called = [
        {"role": "assistant", "content": written},
        {"role": "assistant", "content": "Closer.", "tool_calls": [{"type": "function", "function": function}]},
    ]
    system = {"role": "system", "content": system_prompt(language.tools, language.format)}
    for number, call in enumerate(called):
        messages = [system, USER, call, {"role": "user", "content": [{"type": "image", "image": "b.png"}]}, TURN]
        (folder / f"{name}.jsonl").write_text(json.dumps({"messages": messages, "answer": "7"}) + "\n")
        (example,), report = read_examples(folder / f"{name}.jsonl", turns=True, language=language)
        assert not report.mended
        found.append(example)
        if number == 0:
            assert example.turns[0].parts[0][0] == written.rstrip()
            with pytest.raises(ExampleError, match=f"it is one in '{name}' \\(rollout.call_format\\)|has no call"):
                read_examples(folder / f"{name}.jsonl", turns=True)
            parts = [{"text": "What?"}, {"image": "a.png"}]
            rows = [{"role": "system", "content": [{"text": system["content"]}]}, {"role": "user", "content": parts}]
            rows += [{"role": "assistant", "content": [{"text": written}]}]
            rows += [
                {"role": "user", "content": [{"text": "Here."}]},
                {"role": "assistant", "content": [{"text": END}]},
            ]
            (folder / f"{name}.json").write_text(json.dumps([{"qid": "1", "message_list": rows}]))
            found += read_examples(folder / f"{name}.json", turns=True, language=language)[0]
    for example in found:
        call = parse_turn(example.turns[0].parts[0][0], language).call
        numbers = [x.units + x.micros / 10**6 for x in call.arguments["bbox_2d"]]
        assert call.tool == 0 and numbers == box and language.tools[0] == CROP_IMAGE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ('{"bbox_2d": [0, 0, 1', "the text of a call's arguments"),
        ("[1]", "a call has a name and an object of arguments"),
        ({"label": "a < b"}, "a value in the format 'qwen3_5' has no '<': 'a < b'"),
    ],
)
def test_what_cannot_stand_between_tags(folder, arguments, message):
    call = {"type": "function", "function": {"name": "image_zoom_in_tool", "arguments": arguments}}
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, USER, TURN]
    with pytest.raises(ExampleError, match=message):
        read_row({"messages": messages}, "here:1", folder, language=LANGUAGES["qwen3_5"], report=ReadReport("here"))


def test_a_format_without_names_writes_one_tool(folder):
    call = {"type": "function", "function": {"name": "rotate", "arguments": {}}}
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, USER, TURN]
    with pytest.raises(
        ExampleError, match="'mini_o3' have no name and are all of 'crop_image_normalized', not of 'rotate'"
    ):
        read_row({"messages": messages}, "here:1", folder, language=LANGUAGES["mini_o3"], report=ReadReport("here"))


def test_an_evaluation_keeps_further_fields_and_reads_the_format(folder):
    written, *_ = IN_FORMAT["deepeyes"]
    messages = [USER, {"role": "assistant", "content": written}, USER, TURN]
    (folder / "eval.jsonl").write_text(json.dumps({"messages": messages, "answer": "7", "box": [1, 2, 3, 4]}) + "\n")
    (question,), _ = read("jsonl", folder / "eval.jsonl", language=LANGUAGES["deepeyes"])
    assert question.fields == {"box": [1, 2, 3, 4]}
    assert about(0, question)["fields"] == {"box": [1, 2, 3, 4]} and "fields" not in about(
        0, question._replace(fields={})
    )
    with pytest.raises(ExampleError, match="it is one in 'deepeyes'"):
        read("jsonl", folder / "eval.jsonl")
