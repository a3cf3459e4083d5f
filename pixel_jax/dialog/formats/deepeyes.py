"""The format of DeepEyes (Visual-Agent/DeepEyes): `image_zoom_in_tool` with `bbox_2d` and an optional `label`.

Source: `verl/workers/agent/envs/mm_process_engine/prompt.py` (SYSTEM_PROMPT_V2, USER_PROMPT_V2) and `visual_toolbox_v2.py`:
boxes are in pixels of the original image, every call is about the first image and the label is ignored; a picture comes
back as `<tool_response><image>...</tool_response>`, an error as `Error: ...`, with the text of a Python exception, for which
there are two fixed ones here. There a box is not padded (no `pad`) and needs more than 30 pixels a side (`min_crop` 30), and
the model answers in `<answer>...</answer>`.
"""

from pixel_jax.dialog.formats.format import CallFormat, Spelled, Spelling
from pixel_jax.tools.tool import Box, Coordinates

SCHEMA = (
    '{"type":"function","function":{"name":"image_zoom_in_tool","description":"Zoom in on a specific region of an image by '
    'cropping it based on a bounding box (bbox) and an optional object label.","parameters":{"type":"object","properties":'
    '{"bbox_2d":{"type":"array","items":{"type":"number"},"minItems":4,"maxItems":4,"description":"The bounding box of the '
    "region to zoom in, as [x1, y1, x2, y2], where (x1, y1) is the top-left corner and (x2, y2) is the bottom-right corner."
    '"},"label":{"type":"string","description":"The name or label of the object in the specified bounding box (optional)."'
    '}},"required":["bbox"]}}}'  # as released: the argument is called bbox_2d
)
SYSTEM = """You are a helpful assistant.

# Tools
You may call one or more functions to assist with the user query.
You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

# How to call a tool
Return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>

**Example**:  
<tool_call>  
{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [10, 20, 100, 200], "label": "the apple on the desk"}}  
</tool_call>"""  # noqa: W291
THINK_FIRST = (
    "\nThink first, call **image_zoom_in_tool** if needed, then answer. Format strictly as:  <think>...</think>  "
    "<tool_call>...</tool_call> (if tools needed)  <answer>...</answer> "
)
INVALID = "Error: ZOOM IN ARGUMENTS ARE INVALID"
DEEPEYES = CallFormat(
    "deepeyes",
    spellings=(
        Spelling(
            "crop_image_normalized",
            "image_zoom_in_tool",
            (Spelled("bbox_2d", Box("bbox_2d")), Spelled("target_image", value=1)),
            schema=SCHEMA,
            label="label",
            texts=(
                ("shown", f"<tool_response>{{images}}{THINK_FIRST}</tool_response>"),
                ("too small", INVALID),
            ),
        ),
    ),
    coordinates=Coordinates.PIXELS,
    system=SYSTEM,
    malformed="Error: Invalid tool call format",
)
