"""The paper's choice of frames, as the released checkpoints know it (Pixel Reasoner code, `experience_maker.py`)."""

from pixel_jax.tools.tool import Integers, Tool

SELECT_FRAMES = Tool(
    "select_frames",
    "Select frames from a video.",
    (
        Integers(
            "target_frames",
            "List of frame indices to select from the video (no more than 8 frames in total).",
            most=16,
            item_description="Frame index from 1 to 16.",
        ),
    ),
)
