"""The format of Qwen3-VL's own zoom: `image_zoom_in_tool` with `bbox_2d` from 0 to 1000, `label` and `img_idx` from 0.

Source: QwenLM/Qwen-Agent, `qwen_agent/tools/image_zoom_in_qwen3vl.py` (schema; `x / 1000 * width`; all pictures of the dialog
are counted from 0) and `nous_fncall_prompt.py` (the system message, without a word before it); QwenLM/Qwen3-VL,
`cookbooks/think_with_images.ipynb` ("relative coords with ranging [0, 1000]"); the model's chat template puts what a tool
returns between `<tool_response>` and `</tool_response>`, each with a line of its own, into a user message. There a box is
not padded (no `pad`). The label is ignored.
"""

from pixel_jax.dialog.formats.format import TOOLS_PROMPT, CallFormat, Spelled, Spelling
from pixel_jax.tools.tool import Box, Coordinates, Integer

SCHEMA = (
    '{"type": "function", "function": {"name": "image_zoom_in_tool", "description": "Zoom in on a specific region of an image '
    'by cropping it based on a bounding box (bbox) and an optional object label", "parameters": {"type": "object", '
    '"properties": {"bbox_2d": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4, "description": '
    '"The bounding box of the region to zoom in, as [x1, y1, x2, y2], where (x1, y1) is the top-left corner and (x2, y2) is the '
    'bottom-right corner"}, "label": {"type": "string", "description": "The name or label of the object in the specified '
    'bounding box"}, "img_idx": {"type": "number", "description": "The index of the zoomed-in image (starting from 0)"}}, '
    '"required": ["bbox_2d", "label", "img_idx"]}}}'
)
RESPONSE = "<tool_response>\n%s\n</tool_response>"
QWEN3_VL = CallFormat(
    "qwen3_vl",
    spellings=(
        Spelling(
            "crop_image_normalized",
            "image_zoom_in_tool",
            (Spelled("bbox_2d", Box("bbox_2d")), Spelled("target_image", Integer("img_idx"), add=1)),
            schema=SCHEMA,
            label="label",
            texts=(
                ("shown", RESPONSE % "{images}"),
                ("no such image", RESPONSE % "Error: Invalid input image"),
                ("too small", RESPONSE % "Tool Execution Error: the box is {0}x{1} pixels"),
            ),
        ),
    ),
    coordinates=Coordinates.SHARES,
    places=-3,
    response=RESPONSE % "{text}{images}",
    system=TOOLS_PROMPT,
    malformed=RESPONSE % "Tool Execution Error: the call cannot be read",
)
