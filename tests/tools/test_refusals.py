"""Tools that cannot be used are refused by name, before anything is compiled."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixel_jax.rollouts.checks import check_device_tool
from pixel_jax.rollouts.prompts import tables
from pixel_jax.tools import CROP_IMAGE, DRAW_BOX, ENHANCE, RELEASED, ROTATE, Argument, Outcome, Text, Tool, ToolError
from pixel_jax.tools.drawing import drawing_tool
from pixel_jax.tools.named import SHIPPED, find_tools
from tests.rollouts import scripted_model


def grey(arguments, pixels, size):
    return jnp.full_like(pixels, 127)


def calls_home(arguments, pixels, size):
    return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(pixels.shape, pixels.dtype), pixels)


def prints(arguments, pixels, size):
    def step(i, x):
        jax.debug.print("{}", i)
        return x

    return jax.lax.fori_loop(0, 2, step, pixels)


def larger(arguments, pixels, size):
    return jnp.repeat(jnp.repeat(pixels, 2, axis=0), 2, axis=1)


def looks(arguments, pixels, size):
    return pixels if size[0] > 3 else 255 - pixels


def made(draw, **fields) -> Tool:
    return drawing_tool("paint", "Paints.", (), draw, shows="Here it is", **fields)


@pytest.mark.parametrize("tool", SHIPPED.values(), ids=SHIPPED)
def test_what_is_shipped_is_pure(tool):
    check_device_tool(tool)


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        (made(calls_home), "`draw` of tool 'paint' is not pure.*callback"),
        (made(prints), "`draw` of tool 'paint' is not pure.*debug"),
        (made(larger), r"`draw` of tool 'paint' makes uint8 \[128, 128, 3\] of uint8 \[64, 64, 3\]"),
        (made(lambda arguments, pixels, size: pixels / 2), "makes float32"),
        (made(looks), "`draw` of tool 'paint' needs a value"),
        (made(lambda arguments, pixels, size: np.asarray(pixels)), "`draw` of tool 'paint' needs a value"),
        (made(lambda arguments, pixels, size: arguments["colour"]), "`draw` of tool 'paint' raises KeyError: 'colour'"),
        (made(3), "`draw` of tool 'paint' raises TypeError: 'int' object is not callable"),
        (made(lambda arguments, pixels, size: (pixels, size)), "`draw` of tool 'paint' makes tuple"),
        (made(grey, drawn_size=lambda arguments, size: size[0]), "`drawn_size` of tool 'paint'"),
        (made(grey, drawn_size=lambda arguments, size: size / 2), r"`drawn_size` of tool 'paint' is float32 \[2\]"),
        (
            made(grey, accepts=lambda arguments, size: arguments["x"] > 1),
            "`execute` of tool 'paint' raises KeyError: 'x'",
        ),
        (
            dataclasses.replace(CROP_IMAGE, arguments=list(CROP_IMAGE.arguments)),
            "'crop_image_normalized' must be hashable",
        ),
        (dataclasses.replace(CROP_IMAGE, execute=None), "'crop_image_normalized' has no `execute`"),
        (dataclasses.replace(CROP_IMAGE, outcomes=(Outcome("other", "Other."),)), "none of its outcomes"),
        (dataclasses.replace(CROP_IMAGE, execute=lambda *given: None), "gives a NoneType"),
    ],
)
def test_a_device_tool_that_cannot_be_one(tool, message):
    with pytest.raises(ToolError, match=message):
        tables(scripted_model.vocabulary(), (tool,))


def test_a_text_with_other_braces():
    text = dataclasses.replace(CROP_IMAGE, outcomes=(*CROP_IMAGE.outcomes, Outcome("json", 'Write {"a": 1}.')))
    with pytest.raises(ToolError, match="crop_image_normalized: json has"):
        tables(scripted_model.vocabulary(), (text,))


@dataclasses.dataclass(frozen=True)
class Date(Argument):
    """An argument of a kind that nobody knows."""

    kind: ClassVar[str] = "date"


def test_an_argument_that_no_parser_can_read():
    with pytest.raises(ToolError, match="tool 'paint': no parser can read the argument 'when', a Date: use Number"):
        drawing_tool("paint", "Paints.", (Date("when"),), grey, shows="Here it is")


def test_two_tools_of_one_name():
    with pytest.raises(ToolError, match="two tools are called 'rotate'"):
        tables(scripted_model.vocabulary(), (ROTATE, ROTATE))


def test_a_text_that_the_device_would_have_to_read():
    with pytest.raises(ToolError, match="'label'"):
        Tool("find", "Finds.", (Text("label"),), execute=CROP_IMAGE.execute)


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tools_of_mine.py").write_text(
        "from pixel_jax.tools import ROTATE\nimport dataclasses\nTURN = dataclasses.replace(ROTATE, name='turn')\n"
    )
    found = find_tools(("crop_image_normalized", "select_frames", "tools_of_mine:TURN"))
    assert found[:2] == RELEASED and found[2].name == "turn"
    assert find_tools(("rotate", "enhance", "draw_box")) == (ROTATE, ENHANCE, DRAW_BOX)
    for name, message in [
        ("zoom", "no tool is called 'zoom'.*module:name"),
        ("not_there:TURN", "no module 'not_there'"),
        ("tools_of_mine:OTHER", "OTHER"),
        ("tools_of_mine:dataclasses", "is a module"),
        ("../evil:TURN", "written as module:name"),
    ]:
        with pytest.raises(ToolError, match=message):
            find_tools((name,))


def test_the_current_directory_is_searched_last(tmp_path, monkeypatch):
    """A file there does not stand for a module that is installed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "colorsys.py").write_text("raise SystemExit('imported')\n")
    with pytest.raises(ToolError, match="has no 'TURN'"):
        find_tools(("colorsys:TURN",))
