"""The format of Mini-o3 (Mini-o3/Mini-o3): `<grounding>{"bbox_2d": [x0, y0, x1, y1], "source": "original_image"}</grounding>`.

Source: `verl/trainer/constants.py` (the prompts), `vllm_async_engine.py` (`process_tool_call`) and `function_tools.py`: boxes
are in shares of the source's width and height (`use_relative_coordinates=True` in the README), which is `original_image` or
`observation_i`, the i-th picture that was shown. There actions are numbered by turns, also failed ones, and here by pictures,
which is the same until a call fails; `source` may be in single quotes, which no JSON has; an error has the text of a Python
exception. A box is not padded (no `pad`), and the model answers in `<answer>...</answer>`.
"""

from pixel_jax.dialog.formats.format import CallFormat, Spelled, Spelling
from pixel_jax.tools.tool import MAX_OPTIONS, Box, Choice, Coordinates

SYSTEM = (
    "You are a helpful assistant. Answer the user's question based on the image provided. Output your thinking process within "
    "the <think> and </think> tags. Whenever you find anything unclear, you can zoom in a specific region in the given image to "
    'see more clearly by outputting <grounding>{"bbox_2d": [x0, y0, x1, y1], "source": "original_image"}</grounding>, where '
    "(x0, y0) and (x1, y1) are the top-left and bottom-right coordinates of the region that you want to zoom in, respectively "
    "(suppose the width and height of the image are 1.0), and 'source' refers to the image that you zoom in and could be either "
    "'original_image' or 'observation_i'. Once the final answer is confirmed, put it within <answer> and </answer>."
)
SHOWN = (
    "After the above Action {2}, here is the the zoom-in image (Observation {3}):\n{images}.\nContinue your reasoning process "
    "inside <think> and </think>. If needed, you can continue to zoom in on the original image or any of the observations, by "
    "outputting <grounding> and </grounding> as before. If the final answer is confirmed, put your final answer inside <answer> "
    "and </answer>."
)
ERROR = (
    "ERROR occurs during grounding. Error Information: %s.\nPlease analyze the error information obtained from the function "
    "tool and adjust your response. Countinue your reasoning process inside <think> and </think>."
)
SOURCES = ("original_image", *(f"observation_{i}" for i in range(1, MAX_OPTIONS)))
MINI_O3 = CallFormat(
    "mini_o3",
    opening="<grounding>",
    closing="</grounding>",
    spellings=(
        Spelling(
            "crop_image_normalized",
            None,
            (
                Spelled("bbox_2d", Box("bbox_2d")),
                Spelled("target_image", Choice("source", options=SOURCES), add=1),
            ),
            texts=(
                ("shown", SHOWN),
                ("no such image", ERROR % "Error in predicting the source observation"),
                ("too small", ERROR % "The bounding box is not valid: it is {0}x{1} pixels"),
            ),
        ),
    ),
    coordinates=Coordinates.SHARES,
    system=SYSTEM,
    malformed=ERROR % "The grounding argument cannot be read",
)
