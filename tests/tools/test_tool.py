"""What a tool may be, and its schema."""

import dataclasses

import pytest

from pixel_jax.tools import (
    RELEASED,
    Box,
    Choice,
    Integer,
    Integers,
    Number,
    Outcome,
    Text,
    Tool,
    ToolError,
    check_tools,
)


def test_the_schema_of_every_kind():
    tool = Tool(
        "adjust",
        "Changes an image.",
        (
            Number("factor", "How much.", low=0, high=4.5, default=1.5),
            Integer("target_image", low=1),
            Box("bbox_2d", default=(0, 0, 1, 0.5)),
            Integers("order", most=3),
            Choice("mode", options=("brightness", "é")),
            Text("note", default=""),
        ),
        execute=print,
        host=True,
    )
    assert tool.schema["parameters"] == {
        "type": "object",
        "properties": {
            "factor": {"type": "number", "description": "How much.", "minimum": 0, "maximum": 4.5, "default": 1.5},
            "target_image": {"type": "integer", "minimum": 1},
            "bbox_2d": {"type": "array", "items": {"type": "number"}, "default": [0, 0, 1, 0.5]},
            "order": {"type": "array", "items": {"type": "integer"}},
            "mode": {"type": "string", "enum": ["brightness", "é"]},
            "note": {"type": "string", "default": ""},
        },
        "required": ["target_image", "order", "mode"],
    }
    assert tool.starts == {"factor": 0, "target_image": 1, "bbox_2d": 2, "order": 6, "mode": 9, "note": 10}
    assert tool.slots == 10 and tool.lists == ("order",)
    assert hash(tool) == hash(dataclasses.replace(tool)) and tool == dataclasses.replace(tool)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tool("a<b", ""), "'a<b'"),
        (lambda: Tool("", ""), "''"),
        (lambda: Tool("a", "", (Box("b"), Number("b"))), "two arguments called 'b'"),
        (lambda: Tool("a", "", ("b",)), "'b' is no argument"),
        (lambda: Tool("a", "", outcomes=(Outcome("x", ""), Outcome("x", ""))), "two outcomes called 'x'"),
        (lambda: Tool("read", "", (Text("query"),)), "'read' runs on the device, which cannot read the text 'query'"),
        (lambda: Number('x"'), "x"),
        (lambda: Number("x", low=2, high=1), r"'x': \[2, 1\] is no interval"),
        (lambda: Number("x", high=1, default=2), r"default 2: it lies outside \[-inf, 1\]"),
        (lambda: Integer("x", default=1.5), "default 1.5: it is no integer"),
        (lambda: Box("x", default=(1, 2, 3)), "four numbers"),
        (lambda: Integers("x", most=0), "not 0"),
        (lambda: Integers("x", most=2, default=(1, 2, 3)), "at most 2 integers"),
        (lambda: Choice("x"), r"options, not \(\)"),
        (lambda: Choice("x", options=("a", "a")), "different options"),
        (lambda: Choice("x", options=("a", "b\n")), "option 'b"),
        (lambda: Choice("x", options=("a",), default="b"), "none of"),
        (lambda: check_tools(RELEASED + RELEASED[:1]), "two tools are called 'crop_image_normalized'"),
        (
            lambda: check_tools((*RELEASED, Tool("a", "", (Choice("bbox_2d", options=("x",)),)))),
            "of kind choice in 'a'",
        ),
        (lambda: check_tools(list(RELEASED)), "tuple"),
    ],
)
def test_what_no_tool_can_be(make, message):
    with pytest.raises(ToolError, match=message):
        make()


def test_tools_may_share_an_argument():
    check_tools((*RELEASED, Tool("draw_box", "", (Box("bbox_2d"), Number("target_image", low=1)))))
