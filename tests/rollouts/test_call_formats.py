"""What a call comes to in every call format: the part of the picture that its released code would cut, and what is told."""

import dataclasses
import json
import pathlib
import re

import jax
import numpy as np
import pytest
from PIL import Image, ImageDraw

from pixel_jax.data.traces import Trace, TraceError, frame_patches, render, right, write_rows
from pixel_jax.dialog import Language, observations, parse_turn, template
from pixel_jax.dialog.formats import FORMATS, CallFormat, call_format
from pixel_jax.dialog.template import system_prompt
from pixel_jax.dialog.tokenizer import Vocabulary, build_tokenizer
from pixel_jax.dialog.unrecognised import unrecognised_turns
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.limits import read_limits, write_limits
from pixel_jax.rollouts.prompts import Query, build_prompts, tables
from pixel_jax.rollouts.rollout import rollout
from pixel_jax.rollouts.shapes import prompt_shape
from pixel_jax.rollouts.trajectory import CallStatus, to_host
from pixel_jax.tools import CROP_IMAGE, DRAW_BOX, RELEASED, ROTATE, ToolError
from pixel_jax.tools.draw_box import COLOURS, PIXELS_A_LINE, THINNEST
from pixel_jax.tools.named import find_format, find_tools
from pixel_jax.tools.tool import ANSWERED, FAILED
from tests.rollouts import scripted_model

HEIGHT, WIDTH = 300, 410  # shown at 308 x 420
IMAGE = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
WORDS = Vocabulary.of(build_tokenizer([]))


def written(name: str, *turns: str, pad: float = 0.0):
    """A row of these turns and an answer: the regions (x1 y1 x2 y2) that it was shown, and its text."""
    tools = (CROP_IMAGE,) if name == "mini_o3" else RELEASED
    config = RolloutConfig(call_format=name, pad=pad)
    trace = Trace(Query("What is it?", [IMAGE]), (*map(right, turns), right("<answer>a dog</answer>")), "a dog")
    (row,) = write_rows([trace], WORDS, tables(WORDS, tools, call_format(name)), config)
    return [view.region for view in row.views[1:]], WORDS.to_bytes(row.ids).decode()


def tool_call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{{arguments}}}}}\n</tool_call>'


def test_deepeyes_cuts_pixels_of_the_original():
    zoom = tool_call("image_zoom_in_tool", '"bbox_2d": [10, 20, 110, 220], "label": "the dog"')
    again = tool_call("image_zoom_in_tool", '"bbox_2d": [0.4, 0, 409.7, 1e3]')
    small = tool_call("image_zoom_in_tool", '"bbox_2d": [0, 0, 1, 1]')
    regions, text = written("deepeyes", zoom, again, small, "<tool_call>no</tool_call>")
    assert regions == [(10, 20, 110, 220), (0, 0, WIDTH, HEIGHT)]  # the first picture both times; cut off at its sides
    told = text.split("<|im_start|>user\n")
    think = (
        "\nThink first, call **image_zoom_in_tool** if needed, then answer. Format strictly as:  <think>...</think>  "
        "<tool_call>...</tool_call> (if tools needed)  <answer>...</answer> "
    )
    shown = "<tool_response><|vision_start|><|image_pad|>"
    assert told[2].startswith(shown) and told[3].startswith(shown)
    assert told[2].endswith(
        f"<|vision_end|>{think}</tool_response><|im_end|>\n<|im_start|>assistant\n{again}<|im_end|>\n"
    )
    assert told[4].startswith("Error: ZOOM IN ARGUMENTS ARE INVALID<|im_end|>\n")
    assert told[5].startswith("Error: Invalid tool call format<|im_end|>\n")
    assert text.startswith(f"<|im_start|>system\n{FORMATS['deepeyes'].system_prompt(RELEASED)}<|im_end|>\n")


def test_mini_o3_cuts_shares_of_what_it_names():
    first = '<think>So.</think><grounding>{"bbox_2d": [0.1, 0.2, 0.9, 0.7], "source": "original_image"}</grounding>'
    second = '<grounding>{"bbox_2d": [0.5, 0, 1, 1.5], "source": "observation_1"}</grounding>'
    missing = '<grounding>{"bbox_2d": [0.5, 0, 1, 1], "source": "observation_7"}</grounding>'
    regions, text = written("mini_o3", first, second, missing)
    assert regions == [(41, 60, 369, 210), (205, 60, 369, 210)]
    told = text.split("<|im_start|>user\n")
    for number in (0, 1):
        said = f"After the above Action {number}, here is the the zoom-in image (Observation {number + 1}):\n<|vision_start|>"
        assert told[2 + number].startswith(said)
    assert "<|vision_end|>.\nContinue your reasoning process inside <think> and </think>. If needed" in told[2]
    assert told[4].startswith(
        "ERROR occurs during grounding. Error Information: Error in predicting the source observation.\n"
    )
    assert "Countinue your reasoning process" in told[4]


def test_qwen3_vl_counts_to_a_thousand_and_from_zero():
    first = tool_call("image_zoom_in_tool", '"label": "a", "bbox_2d": [100, 200, 900, 700], "img_idx": 0')
    second = tool_call("image_zoom_in_tool", '"label": "b", "bbox_2d": [500, 0, 1000, 1500], "img_idx": 1')
    third = tool_call("image_zoom_in_tool", '"label": "c", "bbox_2d": [0, 0, 1, 1], "img_idx": 5')
    regions, text = written("qwen3_vl", first, second, third)
    assert regions == [(41, 60, 369, 210), (205, 60, 369, 210)]
    told = text.split("<|im_start|>user\n")
    assert told[2].startswith("<tool_response>\n<|vision_start|><|image_pad|>")
    assert "<|image_pad|><|vision_end|>\n</tool_response><|im_end|>\n" in told[2]
    assert told[4].startswith("<tool_response>\nError: Invalid input image\n</tool_response><|im_end|>\n")
    assert text.startswith("<|im_start|>system\n# Tools\n\nYou may call")


def test_qwen3_5_writes_the_same_between_tags():
    call = (
        "<tool_call>\n<function=image_zoom_in_tool>\n<parameter=label>\na\n</parameter>\n<parameter=bbox_2d>\n%s\n</parameter>\n"
        "<parameter=img_idx>\n%s\n</parameter>\n</function>\n</tool_call>"
    )
    calls = (("[100, 200, 900, 700]", 0), ("[500, 0, 1000, 1500]", 1), ("[0, 0, 1]", 0))
    regions, text = written("qwen3_5", *(call % values for values in calls))
    assert regions == [(41, 60, 369, 210), (205, 60, 369, 210)]
    told = text.split("<|im_start|>user\n")
    assert told[2].startswith("<tool_response>\n<|vision_start|><|image_pad|>")
    assert "<|im_end|>\n<|im_start|>assistant\n<tool_call>\n<function=image_zoom_in_tool>\n" in text
    assert told[4].startswith(
        "<tool_response>\nTool Execution Error: the call cannot be read\n</tool_response><|im_end|>\n"
    )
    assert text.startswith("<|im_start|>system\n# Tools\n\nYou have access to")


def test_the_older_crop_takes_pixels_as_shown():
    crop = tool_call("crop_image", '"bbox_2d": [42, 0, 210, 154], "target_image": 1')
    regions, text = written("crop_image", crop, tool_call("crop_image_normalized", '"bbox_2d": [0, 0, 1, 1]'))
    assert regions == [(41, 0, 205, 150)]
    assert "\nHere is the cropped image (Image Size: 168x140):<|vision_start|>" in text
    assert "either `crop_image` with" in text


def test_the_default_is_as_it_was():
    crop = tool_call("crop_image_normalized", '"bbox_2d": [0.1, 0.2, 0.9, 0.7], "target_image": 1')
    regions, text = written("pixel_reasoner", crop, pad=0.1)
    assert regions == [(0, 30, WIDTH, 240)]
    assert text.startswith(f"<|im_start|>system\n{system_prompt()}<|im_end|>\n")


def test_a_call_in_another_format_is_none():
    with pytest.raises(TraceError, match="is no call"):
        written("pixel_reasoner", '<grounding>{"bbox_2d": [0, 0, 1, 1], "source": "original_image"}</grounding>')


def test_prompts_and_calls_are_in_one_format():
    config = RolloutConfig(call_format="deepeyes")
    with pytest.raises(ToolError, match="call format is 'deepeyes', the tables were built for 'pixel_reasoner'"):
        build_prompts([Query("What?", [IMAGE])], WORDS, tables(WORDS), config)


def test_the_format_of_the_docs(tmp_path, monkeypatch):
    page = (pathlib.Path(__file__).parents[2] / "docs/call-formats.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_formats.py").write_text(f"{code}\nNOT = 1\n")
    monkeypatch.chdir(tmp_path)
    name = "my_formats:ZOOM"
    monkeypatch.delitem(FORMATS, name, raising=False)
    # What lies beside a model is not imported.
    write_limits(tmp_path, RolloutConfig(call_format=name))
    limits = read_limits(tmp_path)
    with pytest.raises(
        ToolError, match="is code, which is imported only where a command line or a config file names it"
    ):
        call_format(limits.call_format)
    assert isinstance(find_format(name), CallFormat) and call_format(limits.call_format) is FORMATS[name]
    zoom = '<zoom>{"name": "zoom", "arguments": {"box": [10, 20, 90, 70], "picture": 0}}</zoom>'
    regions, text = written(name, zoom)
    assert regions == [(41, 60, 369, 210)]
    assert "<|im_start|>user\nHere is the part:<|vision_start|>" in text
    for wrong, message in (
        ("my_formats:NOT", "is a int, not a CallFormat"),
        ("no_such:X", "no module"),
        ("x", "choose one of"),
    ):
        with pytest.raises(ToolError, match=message):
            find_format(wrong)
    del FORMATS[name]


def test_the_table_of_the_docs_is_that_of_the_formats():
    page = (pathlib.Path(__file__).parents[2] / "docs/call-formats.md").read_text()
    rows = re.findall(r"^\| `(\w+)`[^|]*\|[^|]*\| `([^`]*)`", page, re.MULTILINE)
    assert [name for name, _ in rows] == [name for name in FORMATS if ":" not in name]
    for name, call in rows:
        tools = (CROP_IMAGE,) if name == "mini_o3" else RELEASED
        assert parse_turn(call, Language(tools, FORMATS[name])).call is not None, call


def test_limits_carry_the_format(tmp_path):
    write_limits(tmp_path, RolloutConfig(call_format="mini_o3"))
    assert read_limits(tmp_path) == dataclasses.replace(RolloutConfig(), group_size=1, call_format="mini_o3")


FIRST = '<grounding>{"bbox_2d": [0.1, 0.2, 0.9, 0.7], "source": "original_image"}</grounding>'
SECOND = '<grounding>{"bbox_2d": [0.25, 0, 1, 1], "source": "observation_1"}</grounding>'
ANSWER = "<answer>7</answer>"


def test_a_rollout_in_another_format():
    """As one compiled program: a scripted model that writes as Mini-o3 does is shown what it asks for."""
    tools, known = (CROP_IMAGE,), FORMATS["mini_o3"]
    chain = {
        scripted_model.START: {FIRST: 0.5, SECOND: 0.3, ANSWER: 0.2},
        **{x: {scripted_model.END: 1.0} for x in (FIRST, SECOND, ANSWER)},
    }
    pieces = {text for text in chain if len(text) > 1} | {"system\n", "user\n", template.GUIDELINES["vcot"]}
    pieces |= {known.system_prompt(tools)}
    for kind in observations.kinds_of(tools, known):
        pieces |= {piece for piece in scripted_model.stretches(kind.outcome.text) if len(piece) > 1}
    words = Vocabulary.of(build_tokenizer(sorted(pieces)))
    config = dataclasses.replace(
        scripted_model.CONFIG,
        max_new_tokens=4,
        max_calls=2,
        group_size=6,
        max_response=400,
        call_format="mini_o3",
        pad=0.0,
    )
    token_tables = tables(words, tools, known)
    queries = [query for query in scripted_model.queries(3) if len(query.images) == 1 and not query.is_video]
    prompts = build_prompts(
        queries, words, token_tables, config, shape=prompt_shape(1, 192, 192, 96, config, video=False)
    )
    t = to_host(rollout(scripted_model.network(words, chain), prompts, jax.random.key(1), config))
    names = np.array([*map(str, token_tables.observations.kinds), ""])[t.calls.outcome]
    seen = set()
    for row in range(len(t.stop)):
        height, width = queries[t.prompt[row]].images[0].shape[:2]
        text = words.to_bytes(t.tokens[row][t.loss_mask[row]]).decode()
        assert unrecognised_turns(text, token_tables.parser.language) == []
        pictures = []
        for call, turn in enumerate(text.split("<|im_end|>")[: int(t.num_calls[row])]):
            if turn == SECOND and not pictures:
                assert names[row, call] in ("crop_image_normalized: no such image", "")
            if names[row, call] != "crop_image_normalized: shown":
                continue
            x1, y1, x2, y2 = (0, 0, width, height) if turn == FIRST else pictures[0]
            shares = (0.1, 0.2, 0.9, 0.7) if turn == FIRST else (0.25, 0, 1, 1)
            sides = (x2 - x1, y2 - y1) * 2
            box = [round(a * side) + b for a, side, b in zip(shares, sides, (x1, y1) * 2, strict=True)]
            assert t.calls.source.region[row, call, 0].tolist() == box
            pictures.append(box)
            seen.add(turn)
    assert seen == {FIRST, SECOND}
    assert "crop_image_normalized: no such image" in names


# The same box, x from .1 to .5 and y from 0 to .5, as each format measures it; and what it lies on in pixels of the image.
BOXES = {
    "pixel_reasoner": "[0.1, 0, 0.5, 0.5]",
    "pixel_reasoner, as shown": "[42, 0, 210, 154]",
    "crop_image": "[42, 0, 210, 154]",
    "deepeyes": "[41, 0, 205, 150]",
    "qwen3_vl": "[100, 0, 500, 500]",
}


@pytest.mark.parametrize("case", BOXES)
def test_a_box_to_draw_is_measured_as_the_format_says(case):
    """As Pillow draws it; and once more on the crop that was shown before, which has pixels of its own."""
    name, tools = case.split(",")[0], (CROP_IMAGE, DRAW_BOX)
    config = RolloutConfig(call_format=name, pad=0.0)
    draw = tool_call("draw_box", f'"bbox_2d": {BOXES[case]}, "colour": "blue", "target_image": 1')
    outside = tool_call("draw_box", '"bbox_2d": [0, 0, 5000, 5000], "colour": "blue", "target_image": 1')
    trace = Trace(Query("What is it?", [IMAGE]), (*map(right, (draw, outside)), right("a dog")), "a dog")
    language = Language(tools, call_format(name))
    (row,) = write_rows([trace], WORDS, tables(WORDS, tools, language.format), config)
    pillow = Image.fromarray(IMAGE)
    ImageDraw.Draw(pillow).rectangle(
        (41, 0, 204, 149), outline=COLOURS["blue"], width=THINNEST + WIDTH // PIXELS_A_LINE
    )
    first, drawn = render(row, [IMAGE])
    size = row.views[1].size
    np.testing.assert_array_equal(drawn, frame_patches(np.asarray(pillow), (0, 0, WIDTH, HEIGHT), size, config))
    assert len(row.views) == 2 and row.calls[1].status == CallStatus.FAILED  # nothing is drawn beyond the image
    call = parse_turn(draw, language).call
    written = [x.units + x.micros / 10**6 for x in call.arguments["bbox_2d"]]
    scale = 1000 if name == "qwen3_vl" else 1
    assert [x * scale for x in written] == pytest.approx(json.loads(BOXES[case]))
    assert "draw_box" in WORDS.to_bytes(row.ids).decode()


def test_the_prompt_says_what_boxes_are_measured_in():
    said = {}
    for name in ("pixel_reasoner", "deepeyes", "qwen3_vl"):
        parameters = json.loads(FORMATS[name].schema(DRAW_BOX))["function"]["parameters"]
        said[name] = parameters["properties"]["bbox_2d"]["description"]
    assert said["pixel_reasoner"] == "coordinates for bounding box to draw. Values should be within [0.0,1.0]."
    assert said["deepeyes"] == "coordinates for bounding box to draw. Values are in pixels of the image."
    assert (
        said["qwen3_vl"] == "coordinates for bounding box to draw. Values are from 0 to 1000, which is the whole side."
    )


OWN = """
from pixel_jax.dialog.formats import CallFormat, Coordinates, Spelled, Spelling
from pixel_jax.tools import Box, Integer, Text, Tool

READ = Tool("read_text", "Reads.", (Text("language"),), execute=lambda images, language: language, host=True)
ZOOM = CallFormat(
    "zoom",
    opening="<zoom>",
    closing="</zoom>",
    spellings=(
        Spelling(
            "crop_image_normalized",
            "zoom",
            (Spelled("bbox_2d", Box("box")), Spelled("target_image", Integer("picture"), add=1)),
            texts=(("shown", "Part {3}:{images}!"), ("too small", "{0} by {1} is too little.")),
        ),
        Spelling("read_text", "ocr", (Spelled("language", Text("in")),), texts=(("failed", "No text{images}."),)),
    ),
    coordinates=Coordinates.SHARES,
    places=-2,
    pad=0.05,
    response="<seen>{text}|{images}</seen>",
    malformed="What?",
)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "formats_of_mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield "formats_of_mine:ZOOM", find_format("formats_of_mine:ZOOM"), find_tools(("formats_of_mine:READ",))
    del FORMATS["formats_of_mine:ZOOM"]


def zoom(name: str, arguments: str) -> str:
    return f'<zoom>\n{{"name": "{name}", "arguments": {{{arguments}}}}}\n</zoom>'


def test_observations_of_a_format_of_ones_own(own):
    """All that rows are told is as it says: tools that it spells, others, errors; and so are the padding and the prompt."""
    name, known, _ = own
    tools, config = (CROP_IMAGE, ROTATE), RolloutConfig(call_format=name, min_crop=50)
    turns = [
        zoom("zoom", '"box": [10, 20, 90, 70], "picture": 0'),
        zoom("zoom", '"box": [10, 20, 10, 20], "picture": 0'),
        zoom("rotate", '"by": "90", "target_image": 1'),
        zoom("rotate", '"by": "90", "target_image": 7'),
        zoom("zoom", '"box": [10, 20], "picture": 0'),
    ]
    trace = Trace(Query("What is it?", [IMAGE]), (*map(right, turns), right("a dog")), "a dog")
    (row,) = write_rows([trace], WORDS, tables(WORDS, tools, known), config)
    text = WORDS.to_bytes(row.ids).decode()
    first, *told = [x.partition("<|im_end|>")[0] for x in text.split("<|im_start|>user\n")[1:]]
    told = [re.sub(r"(<\|image_pad\|>)+", "#", x) for x in told]
    assert row.views[1].region == (20, 45, 390, 225)  # 5 % more on each side
    shown, small, turned, missing, none = told
    assert shown == "Part 1:<|vision_start|>#<|vision_end|>!"
    assert small == "42 by 30 is too little."
    assert re.fullmatch(
        r"<seen>Here is the rotated image \(Image Size: \d+x\d+\):\|<\|vision_start\|>#<\|vision_end\|></seen>", turned
    )
    assert missing.startswith("<seen>Execution error:\n") and missing.endswith("|</seen>")
    assert none == "What?"
    schema = json.loads(text.partition("<tools>\n")[2].split("\n")[0])["function"]
    assert schema["name"] == "zoom" and list(schema["parameters"]["properties"]) == ["box", "picture"]
    assert schema["parameters"]["properties"]["box"]["description"].endswith(
        "Values are from 0 to 100, which is the whole side."
    )


def test_answers_of_the_host_in_a_format_of_ones_own(own):
    _, known, (read,) = own
    assert known.answer(read, ANSWERED, "\nIt says {images} 7.\n") == ("<seen>It says {images} 7.|", "</seen>")
    assert known.answer(read, FAILED, "\nExecution error:") == ("No text", ".")
    assert FORMATS["pixel_reasoner"].answer(read, ANSWERED, "\nIt says 7.") == ("\nIt says 7.", "")
    language = Language((CROP_IMAGE, read), known)
    call = parse_turn(zoom("ocr", '"in": "German"'), language).call
    assert call.tool == 1 and call.arguments == {"language": "German"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response": "<seen>{text}</seen>"}, "the response has {text} and {images}, each once"),
        ({"pad": 2.0}, "pad is a share of the image"),
    ],
)
def test_a_format_that_cannot_be_one(change, message):
    with pytest.raises(ToolError, match=re.escape(message)):
        CallFormat("mine", **change)
