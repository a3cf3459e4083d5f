"""Tools: operations on images that a model can call. One file a tool."""

from pixel_jax.tools.crop_image import CROP_IMAGE
from pixel_jax.tools.draw_box import DRAW_BOX
from pixel_jax.tools.enhance import ENHANCE
from pixel_jax.tools.rotate import ROTATE
from pixel_jax.tools.select_frames import SELECT_FRAMES
from pixel_jax.tools.tool import (
    Argument,
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

RELEASED = (CROP_IMAGE, SELECT_FRAMES)  # the tools of the released checkpoints, in the order of their prompt

__all__ = [
    "CROP_IMAGE",
    "DRAW_BOX",
    "ENHANCE",
    "RELEASED",
    "ROTATE",
    "SELECT_FRAMES",
    "Argument",
    "Box",
    "Choice",
    "Integer",
    "Integers",
    "Number",
    "Outcome",
    "Text",
    "Tool",
    "ToolError",
    "check_tools",
]
