"""Calls as formats write them: typed by hand, and read back by the parser."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixel_jax.dialog.formats import FORMATS, CallFormat, Coordinates, Spelled, Spelling
from pixel_jax.dialog.grammar import Language, parse_turn
from pixel_jax.dialog.writing import UnwritableError, as_written, write_call
from pixel_jax.tools import CROP_IMAGE, DRAW_BOX, RELEASED, ROTATE, SELECT_FRAMES, Box, Integer, Text, Tool

SIZE = (300, 410)
SEARCH = Tool("search", "Searches.", (Text("words"),), execute=print, host=True)
PERCENT = CallFormat(
    "percent",
    opening="<look>",
    closing="</look>",
    spellings=(
        Spelling(
            "crop_image_normalized",
            "look",
            (Spelled("bbox_2d", Box("box")), Spelled("target_image", Integer("picture"), add=1)),
            label="at",
        ),
    ),
    coordinates=Coordinates.SHARES,
    places=-1,
)
LANGUAGES = {
    known.name: Language((CROP_IMAGE,) if known.name == "mini_o3" else RELEASED, known)
    for known in (*FORMATS.values(), PERCENT)
}
GOLDEN = {
    "pixel_reasoner": (
        '<tool_call>\n{"name": "crop_image_normalized", "arguments": {"bbox_2d": [0.10, 0.25, 0.50, 1.00], "target_image": 1}}'
        "\n</tool_call>"
    ),
    "crop_image": (
        '<tool_call>\n{"name": "crop_image", "arguments": {"bbox_2d": [0.10, 0.25, 0.50, 1.00], "target_image": 1}}'
        "\n</tool_call>"
    ),
    "deepeyes": (
        '<tool_call>\n{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [41, 75, 205, 300], "label": "a \\u003cb> é"}}'
        "\n</tool_call>"
    ),
    "mini_o3": '<grounding>{"bbox_2d": [0.10, 0.25, 0.50, 1.00], "source": "original_image"}</grounding>',
    "qwen3_vl": (
        '<tool_call>\n{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [100, 250, 500, 1000], "img_idx": 0, '
        '"label": "a \\u003cb> é"}}\n</tool_call>'
    ),
    "qwen3_5": (
        "<tool_call>\n<function=image_zoom_in_tool>\n<parameter=bbox_2d>\n[100, 250, 500, 1000]\n</parameter>\n"
        "<parameter=img_idx>\n0\n</parameter>\n<parameter=label>\na \u2039b> é\n</parameter>\n</function>\n</tool_call>"
    ),
    "percent": (
        '<look>\n{"name": "look", "arguments": {"box": [1.0, 2.5, 5.0, 10.0], "picture": 0, "at": "a \\u003cb> é"}}'
        "\n</look>"
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_typed_by_hand(name):
    values = {"bbox_2d": (0.1, 0.25, 0.5, 1.0), "target_image": 1}
    assert write_call(LANGUAGES[name], "crop_image_normalized", values, size=SIZE, label="a <b> é") == GOLDEN[name]


hundredths = st.integers(0, 100).map(lambda x: x / 100)


@given(st.sampled_from(list(LANGUAGES)), st.tuples(*[hundredths] * 4), st.integers(1, 9), st.text(max_size=8))
def test_what_is_written_is_read(name, box, target, label):
    language = LANGUAGES[name]
    target = 1 if name == "deepeyes" else target
    label = label.encode("utf-8", "replace").decode()
    values = {"bbox_2d": box, "target_image": target}
    call = parse_turn(write_call(language, "crop_image_normalized", values, size=SIZE, label=label), language).call
    height, width = SIZE
    sides = (width, height) * 2 if language.format.coordinates == Coordinates.PIXELS else (1,) * 4
    shares = [(x.units + x.micros / 10**6) / side for x, side in zip(call.arguments["bbox_2d"], sides, strict=True)]
    assert shares == pytest.approx(as_written(language, box, SIZE), abs=1e-9)
    assert all(a <= b + 1e-9 for a, b in zip(shares[:2], box[:2], strict=True))  # it holds what was meant
    assert all(a >= b - 1e-9 for a, b in zip(shares[2:], box[2:], strict=True))
    assert int(call.arguments["target_image"].units) == target


def test_other_arguments():
    language = Language((ROTATE, DRAW_BOX, SELECT_FRAMES), FORMATS["qwen3_vl"])
    written = write_call(language, "rotate", {"by": "90", "target_image": 2})
    assert written == '<tool_call>\n{"name": "rotate", "arguments": {"by": "90", "target_image": 2}}\n</tool_call>'
    drawn = write_call(language, "draw_box", {"bbox_2d": (0.1, 0, 1, 1), "colour": "red", "target_image": 1})
    assert '"bbox_2d": [100, 0, 1000, 1000], "colour": "red", "target_image": 1' in drawn
    frames = write_call(language, "select_frames", {"target_frames": [1, 12]})
    assert frames == '<tool_call>\n{"name": "select_frames", "arguments": {"target_frames": [1, 12]}}\n</tool_call>'


def test_other_arguments_between_tags():
    language = Language((ROTATE, SELECT_FRAMES, SEARCH), FORMATS["qwen3_5"])
    for tool, values, body in (
        ("rotate", {"by": "90", "target_image": 2}, "<parameter=by>\n90\n</parameter>\n<parameter=target_image>\n2\n"),
        ("select_frames", {"target_frames": [1, 12]}, "<parameter=target_frames>\n[1, 12]\n"),
        ("search", {"words": "two\nlines"}, "<parameter=words>\ntwo\nlines\n"),
    ):
        text = f"<tool_call>\n<function={tool}>\n{body}</parameter>\n</function>\n</tool_call>"
        assert write_call(language, tool, values) == text
        assert parse_turn(text, language).call is not None
    with pytest.raises(UnwritableError, match="a value in the format 'qwen3_5' has no '<': 'a < b'"):
        write_call(language, "search", {"words": "a < b"})


def test_what_a_format_has_no_words_for():
    values = {"bbox_2d": (0, 0, 1, 1), "target_image": 2}
    with pytest.raises(UnwritableError, match="target_image is always 1 in the format 'deepeyes', not 2"):
        write_call(LANGUAGES["deepeyes"], "crop_image_normalized", values)
    with pytest.raises(UnwritableError, match="target_image 99 has no name in the format 'mini_o3'"):
        write_call(LANGUAGES["mini_o3"], "crop_image_normalized", values | {"target_image": 99})
    with pytest.raises(UnwritableError, match="'rotate' is none of the tools"):
        write_call(LANGUAGES["deepeyes"], "rotate", {})
