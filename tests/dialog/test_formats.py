"""Call formats: what released checkpoints write and read, typed by hand from their code, README or cookbook."""

import random

import jax
import numpy as np
import pytest
from device_calls import device_calls, same_calls
from language_texts import any_response, read_texts

from pixel_jax.dialog import DecimalNumber, Language, parse_turn
from pixel_jax.dialog.formats import FORMATS, MARKS, Coordinates, call_format
from pixel_jax.dialog.template import system_prompt
from pixel_jax.tools import CROP_IMAGE, RELEASED, SELECT_FRAMES, Outcome, ToolError
from pixel_jax.tools.calls import arguments

CROP = (CROP_IMAGE,)
TOOLS = {name: CROP if name == "mini_o3" else RELEASED for name in FORMATS}
LANGUAGES = {name: Language(TOOLS[name], FORMATS[name]) for name in FORMATS}

GOLDEN = {
    "pixel_reasoner": (  # the card of the instruction-tuning data
        'I will zoom in.\n<tool_call>\n{"name": "crop_image_normalized","arguments": {"bbox_2d":[0.1, 0.25, 0.5, 0.75],'
        '"target_image":2}}\n</tool_call><|im_end|>',
        [(0, 100_000), (0, 250_000), (0, 500_000), (0, 750_000)],
        2,
    ),
    "crop_image": (
        '<tool_call>\n{"name": "crop_image", "arguments": {"bbox_2d": [10, 20.5, 300, 410], "target_image": 1}}\n</tool_call>',
        [(10, 0), (20, 500_000), (300, 0), (410, 0)],
        1,
    ),
    "deepeyes": (  # the example of its system prompt
        "<think>I need to look.</think>\n<tool_call>  \n"
        '{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [10, 20, 100, 200], "label": "the apple on the desk"}}  \n'
        "</tool_call>",
        [(10, 0), (20, 0), (100, 0), (200, 0)],
        1,
    ),
    "mini_o3": (
        "<think>The sign is small.</think>\n"
        '<grounding>{"bbox_2d": [0.1, 0.2, 0.35, 1.0], "source": "observation_2"}</grounding>',
        [(0, 100_000), (0, 200_000), (0, 350_000), (1, 0)],
        3,
    ),
    "qwen3_vl": (  # the first call of the cookbook, in the rendering of its agent
        'I will zoom in.\n<tool_call>\n{"name": "image_zoom_in_tool", "arguments": {"label": "main hanging sign for Hop Inn", '
        '"bbox_2d": [574, 301, 660, 468], "img_idx": 0}}\n</tool_call>',
        [(0, 574_000), (0, 301_000), (0, 660_000), (0, 468_000)],
        1,
    ),
    "qwen3_5": (  # the same call, as the chat template of Qwen3.5-35B-A3B renders it behind a text
        "I will zoom in.\n\n<tool_call>\n<function=image_zoom_in_tool>\n<parameter=label>\nmain hanging sign for Hop Inn\n"
        "</parameter>\n<parameter=bbox_2d>\n[574, 301, 660, 468]\n</parameter>\n<parameter=img_idx>\n0\n</parameter>\n"
        "</function>\n</tool_call>",
        [(0, 574_000), (0, 301_000), (0, 660_000), (0, 468_000)],
        1,
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_golden_calls(name):
    text, box, target = GOLDEN[name]
    language = LANGUAGES[name]
    call = parse_turn(text, language).call
    assert call.tool == 0
    assert [(x.units, x.micros) for x in call.arguments["bbox_2d"]] == box
    assert call.arguments["target_image"] == DecimalNumber(target, 0, False, True)
    device = arguments(read_texts([text.encode()], random.Random(0), language), language.tools, CROP_IMAGE)
    device = jax.tree.map(lambda x: np.asarray(x)[0].tolist(), device)
    assert [*zip(device["bbox_2d"].units, device["bbox_2d"].micros, strict=True)] == box
    assert device["target_image"].units == target and device["target_image"].integer


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_reads_no_other(name):
    readable = {other for other, (text, _, _) in GOLDEN.items() if parse_turn(text, LANGUAGES[name]).call is not None}
    # DeepEyes does not look at further keys, so what Qwen3-VL writes is a call of its own too.
    assert readable == {name} | ({"qwen3_vl"} if name == "deepeyes" else set())


@pytest.mark.parametrize("name", FORMATS)
def test_host_and_device_agree(name):
    language, seen = LANGUAGES[name], 0
    for seed in range(6):
        rng = random.Random(seed)
        texts = [any_response(rng, language) for _ in range(256)]
        turns = [parse_turn(text, language) for text in texts]
        difference = same_calls(device_calls(turns, language), read_texts(texts, rng, language))
        assert difference is None, (difference[0], texts[difference[1]], turns[difference[1]])
        seen += sum(turn.call is not None for turn in turns)
    assert seen > 300


BOX = "<parameter=bbox_2d>[1, 2, 3, 4]</parameter>"


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("mini_o3", '{"bbox_2d": [0, 0, 1, 1], "source": "observation_0"}'),
        ("mini_o3", '{"bbox_2d": [0, 0, 1, 1]}'),
        ("mini_o3", '{"bbox_2d": [0, 0, 1, 1], "source": \'original_image\'}'),
        ("mini_o3", '{"bbox_2d": [0, 0, 1], "source": "original_image"}'),
        ("deepeyes", '{"name": "image_zoom_in_tool", "arguments": {"label": "x"}}'),
        ("deepeyes", '{"name": "image_rotate_tool", "arguments": {"angle": 90}}'),
        ("qwen3_vl", '{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [1, 2, 3, 4], "label": "x"}}'),
        ("qwen3_vl", '{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [1, 2, 3, 4], "img_idx": 0.0}}'),
        ("crop_image", '{"name": "crop_image_normalized", "arguments": {"bbox_2d": [1, 2, 3, 4], "target_image": 1}}'),
        ("qwen3_5", '{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [1, 2, 3, 4], "img_idx": 0}}'),
        ("qwen3_5", "<function=image_zoom_in_tool></function>"),
        ("qwen3_5", f"<function=image_zoom_in_tool>{BOX}"),
        ("qwen3_5", f"<function=image_zoom_in_tool>{BOX}<parameter=img_idx>0.0</parameter></function>"),
        ("qwen3_5", f"<function=image_zoom_in_tool>{BOX}<parameter=img_idx>0</parameter></function> so"),
        ("qwen3_5", f"<function=zoom>{BOX}<parameter=img_idx>0</parameter></function>"),
        ("qwen3_5", f"<function=image_zoom_in_tool>{BOX}<parameter=img_idx>0<parameter=label>a</parameter></function>"),
    ],
)
def test_what_is_no_call(name, body):
    known = FORMATS[name]
    turn = parse_turn(f"{known.opening}{body}{known.closing}", LANGUAGES[name])
    assert turn.required and turn.call is None


ZOOM = (
    "The bounding box of the region to zoom in, as [x1, y1, x2, y2], where (x1, y1) is the top-left corner and (x2, y2) is the"
    " bottom-right corner"
)


def test_system_prompts():
    assert FORMATS["pixel_reasoner"].system_prompt(RELEASED) == system_prompt()
    deepeyes = FORMATS["deepeyes"].system_prompt(CROP)
    assert deepeyes == (
        "You are a helpful assistant.\n\n# Tools\nYou may call one or more functions to assist with the user query.\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"type":"function","function":{"name":"image_zoom_in_tool","description":"Zoom in on a specific region of an image'
        ' by cropping it based on a bounding box (bbox) and an optional object label.","parameters":{"type":"object",'
        '"properties":{"bbox_2d":{"type":"array","items":{"type":"number"},"minItems":4,"maxItems":4,"description":'
        f'"{ZOOM}."}},"label":{{"type":"string","description":"The name or label of the object in the specified bounding box'
        ' (optional)."}},"required":["bbox"]}}}\n</tools>\n\n# How to call a tool\nReturn a json object with function name and'
        " arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>\n\n**Example**:  \n<tool_call>  \n'
        '{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [10, 20, 100, 200], "label": "the apple on the desk"}}  \n'
        "</tool_call>"
    )
    qwen = FORMATS["qwen3_vl"].system_prompt(CROP)
    assert qwen.startswith(
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided"
    )
    assert f'"maxItems": 4, "description": "{ZOOM}"}}, "label": {{"type": "string"' in qwen
    assert qwen.endswith(
        '"required": ["bbox_2d", "label", "img_idx"]}}}\n</tools>\n\nFor each function call, return a json object with function'
        " name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )
    # As the chat template renders tools without a system message. That the family knows this zoom is not verified.
    tagged = FORMATS["qwen3_5"].system_prompt(CROP)
    assert tagged.startswith(
        '# Tools\n\nYou have access to the following functions:\n\n<tools>\n{"type": "function", "function": {"name": "image_'
    )
    assert tagged.endswith(
        '"required": ["bbox_2d", "label", "img_idx"]}}}\n</tools>\n\nIf you choose to call a function ONLY reply in the following'
        " format with NO suffix:\n\n<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n"
        "</parameter>\n<parameter=example_parameter_2>\nThis is the value for the second parameter\nthat can span\n"
        "multiple lines\n</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n- Function calls MUST follow the "
        "specified format: an inner <function=...></function> block must be nested within <tool_call></tool_call> XML tags\n"
        "- Required parameters MUST be specified\n- You may provide optional reasoning for your function call in natural "
        "language BEFORE the function call, but NOT after\n- If there is no function call available, answer the question like "
        "normal with your current knowledge and do not tell the user about function calls\n</IMPORTANT>"
    )
    assert "zoom in a specific region in the given image to see more clearly by outputting <grounding>{" in (
        FORMATS["mini_o3"].system_prompt(CROP)
    )
    older = FORMATS["crop_image"].system_prompt(RELEASED)
    assert (
        '{"name": "crop_image", "description": "Zoom in on the image based on the bounding box coordinates.",' in older
    )
    assert "minimum value is 0 and maximum value is the width/height of the image." in older
    assert '"name": "select_frames"' in older


def test_what_is_told():
    shown = Outcome("shown", "ours", 1)
    other = Outcome("no such frame", "ours")
    assert FORMATS["deepeyes"].text(CROP_IMAGE, shown) == (
        "<tool_response>{images}\nThink first, call **image_zoom_in_tool** if needed, then answer. Format strictly as:  "
        "<think>...</think>  <tool_call>...</tool_call> (if tools needed)  <answer>...</answer> </tool_response>"
    )
    assert FORMATS["qwen3_vl"].text(CROP_IMAGE, shown) == "<tool_response>\n{images}\n</tool_response>"
    assert FORMATS["mini_o3"].text(CROP_IMAGE, shown) == (
        "After the above Action {2}, here is the the zoom-in image (Observation {3}):\n{images}.\nContinue your reasoning"
        " process inside <think> and </think>. If needed, you can continue to zoom in on the original image or any of the"
        " observations, by outputting <grounding> and </grounding> as before. If the final answer is confirmed, put your"
        " final answer inside <answer> and </answer>."
    )
    for known in FORMATS.values():
        response = "<tool_response>\nours\n</tool_response>" if known.name.startswith("qwen3") else "ours"
        assert known.text(CROP_IMAGE, other) == response
    assert FORMATS["deepeyes"].text(SELECT_FRAMES, shown) == "ours"


def test_formats_by_name():
    assert call_format("deepeyes") is FORMATS["deepeyes"]
    with pytest.raises(ToolError, match="no call format 'deep_eyes': choose one of .'pixel_reasoner', 'crop_image'"):
        call_format("deep_eyes")
    assert MARKS == {"<tool_call>", "</tool_call>", "<grounding>", "</grounding>"}
    assert {name: (known.coordinates, known.places) for name, known in FORMATS.items()} == {
        "pixel_reasoner": (Coordinates.EITHER, 0),
        "crop_image": (Coordinates.EITHER, 0),
        "deepeyes": (Coordinates.PIXELS, 0),
        "mini_o3": (Coordinates.SHARES, 0),
        "qwen3_vl": (Coordinates.SHARES, -3),
        "qwen3_5": (Coordinates.SHARES, -3),
    }
    with pytest.raises(ToolError, match="can only write .'crop_image_normalized'., not 'select_frames'"):
        Language(RELEASED, FORMATS["mini_o3"])
