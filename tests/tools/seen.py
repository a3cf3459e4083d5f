"""A trajectory's record read back: outcomes by name, and where its views were cut from."""

import numpy as np

from pixel_jax.rollouts.trajectory import CallStatus

# What the golden file calls the outcomes of the tools of the paper.
NAMES = {
    "crop_image_normalized: shown": "CROP",
    "crop_image_normalized: no such image": "BAD_IMAGE_INDEX",
    "crop_image_normalized: no such frame": "BAD_VIDEO_INDEX",
    "crop_image_normalized: no such selection": "BAD_SELECTED_INDEX",
    "crop_image_normalized: too small": "CROP_TOO_SMALL",
    "select_frames: shown": "FRAMES",
    "select_frames: no video": "SELECT_ON_IMAGE",
    "select_frames: too many frames": "TOO_MANY_FRAMES",
    "select_frames: out of range": "FRAMES_OUT_OF_RANGE",
    "malformed": "MALFORMED",
}


def outcomes(t, token_tables) -> list[list[str]]:
    """Of each row, what each call came to; "" of one that was not carried out."""
    kinds = [NAMES[str(kind)] for kind in token_tables.observations.kinds]
    return [
        [kinds[kind] if kind >= 0 else "" for kind in row[:count]]
        for row, count in zip(t.calls.outcome, t.num_calls, strict=True)
    ]


def views(t) -> list[list[list[int]]]:
    """Of each row's calls that showed something: the call, the image, the region of a crop."""
    found = []
    for row in range(len(t.stop)):
        shown = []
        for call in np.flatnonzero(t.calls.status[row] == CallStatus.DONE):
            source = t.calls.source
            for image, region in zip(source.image[row, call].tolist(), source.region[row, call].tolist(), strict=True):
                if image >= 0:
                    shown.append([int(call), image, *(region if t.calls.tool[row, call] == 0 else [])])
        found.append(shown)
    return found
