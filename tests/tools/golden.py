"""What the two tools of the paper make of prompts and written traces, in terms that no refactoring changes.

    python -m tests.tools.golden    (writes golden.npz; made with the code before tools were values)

Tokens (system prompts, calls and observations among them), log-probabilities, outcomes by name, where views were cut from and
their patches: of rollouts with images and with videos, and of traces with an error of every kind.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib

import jax
import jaxlib
import numpy as np

import tests.conftest  # noqa: F401, the flags of the compiler: log-probabilities are equal to the bit under the same alone
from pixel_jax.data.traces import Trace, right, to_trajectories
from pixel_jax.dialog.tokenizer import Vocabulary, build_tokenizer
from pixel_jax.rollouts.prompts import build_prompts, tables
from pixel_jax.rollouts.rollout import rollout
from pixel_jax.rollouts.shapes import BatchShape
from tests.rollouts import scripted_model
from tests.tools import seen

FILE = pathlib.Path(__file__).parent / "golden.npz"
LIMITS = dataclasses.replace(scripted_model.CONFIG, max_calls=6, max_images=40)
ROOM = BatchShape(tokens=2600, images=24, slices=24, patches=16)

CROPS = (  # of two images
    '[0.1, 0.2, 0.9, 0.8], "target_image": 1',
    '[0.25, 0.25, 0.75, 1], "target_image": 3',  # of the crop before
    '[10, 20, 30.5, 56], "target_image": 2',  # pixels of what was shown
    '[-0.5, 1e-1, 0.5, 12E-1, 7, 8], "target_image": 1',
    '[0.1, 0.2, 0.9, 0.8], "target_image": 9',
    '[0.1, 0.2, 0.11, 0.8], "target_image": 1',
    '[0.1, 0.2, 0.9, 0.8], "target_image": 1.0',
    '[0.9, 0.2, 0.1, 0.8], "target_image": 1',
    '[0.1, 0.2, 0.9], "target_image": 1',
    '[0.1, 0.2, 0.9, 0.8], "target_image": 0, "why": "small"',
    '[0.1, 0.2, 0.9, 0.8], "target_image": 1234567',
    '[0.123456789, 0.2, 0.9, 0.8], "target_image": -2',
)
FRAMES = (  # of five
    "[1, 2]",
    "[0, 6, -2]",
    "[]",
    "[1, 2, 3, 4, 5, 1, 2, 3, 4]",
    "[1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2]",
    "[5, 3, 3]",
    "[1.0]",
    "[1000000]",
)
CROP = '<tool_call>\n{"name": "crop_image_normalized", "arguments": {"bbox_2d": %s}}\n</tool_call>'
SELECT = '<tool_call>\n{"name": "select_frames", "arguments": {"target_frames": %s}}\n</tool_call>'
OTHERS = (
    '<tool_call>{"name": "zoom_in", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "select_frames"}</tool_call>',
    "<tool_call>not JSON</tool_call>",
    "</tool_call>",
    'thinking {"arguments": <tool_call> {"arguments": {"target_image": 2, "bbox_2d": [0,0,1,1]}, '
    '"name": "crop_image_normalized"} </tool_call> \n',
)


def conversations() -> list[Trace]:
    """Every call above, five to a trace, about two images and about a video."""
    stills = scripted_model.queries(3)[2]
    video = scripted_model.queries(2, video=True)[1]
    video = video._replace(images=[scripted_model.image(50 + i, 96, 128) for i in range(5)])
    of_video = [*(SELECT % x for x in FRAMES), *(CROP % x for x in CROPS), *OTHERS]
    before = [CROP % '[0, 0, 1, 1], "target_image": 7', CROP % '[0, 0, 0.7, 1], "target_image": 5', *of_video]
    of_images = [*(CROP % x for x in CROPS), *(SELECT % x for x in FRAMES), *OTHERS]
    found = []
    for query, calls in ((stills, of_images), (video, before)):
        for i in range(0, len(calls), 5):
            turns = [right(text) for text in (*calls[i : i + 5], "\\boxed{7}")]
            found.append(Trace(query, tuple(turns), "7"))
    return found


@functools.cache
def vocabulary(pieces: tuple[str, ...]) -> Vocabulary:
    return Vocabulary.of(build_tokenizer(pieces))


def make(pieces: tuple[str, ...]) -> dict[str, np.ndarray]:
    """All of it, as arrays; what is text is JSON in bytes. `pieces`: of the vocabulary."""
    words = vocabulary(pieces)
    token_tables, model = tables(words), scripted_model.network(words)
    found = {}
    for name, video in (("image", False), ("video", True)):
        prompts = build_prompts(
            scripted_model.queries(4, video=video),
            words,
            token_tables,
            scripted_model.CONFIG,
            shape=scripted_model.shape(video=video),
        )
        t = scripted_model.with_pixels(rollout(model, prompts, jax.random.key(7), scripted_model.CONFIG), prompts)
        found |= {f"{name}.{key}": x for key, x in facts(t, token_tables).items()}
    t = to_trajectories(conversations(), words, token_tables, LIMITS, ROOM)
    return found | {f"trace.{key}": x for key, x in facts(t, token_tables).items()}


def facts(t, token_tables) -> dict[str, np.ndarray]:
    outcomes, views = seen.outcomes(t, token_tables), seen.views(t)
    digests = [hashlib.sha256(np.ascontiguousarray(row).tobytes()).hexdigest() for row in t.visual.patches]
    return {
        "tokens": t.tokens.astype(np.int16),
        "valid": np.packbits(t.valid),
        "loss_mask": np.packbits(t.loss_mask),
        "logprobs": t.logprobs[t.loss_mask],
        "grids": t.visual.grids.astype(np.int16),
        "slices": t.visual.slices.astype(np.int16),
        "num_calls": t.num_calls,
        "stop": t.stop,
        "text": packed({"outcomes": outcomes, "views": views, "patches": digests}),
    }


def packed(value) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def unpacked(data: np.ndarray):
    return json.loads(data.tobytes())


def machine() -> str:
    """Where log-probabilities are equal to the bit: the same compiler, the same instructions."""
    lines = pathlib.Path("/proc/cpuinfo")
    flags = [x for x in lines.read_text().splitlines() if x.startswith("flags")] if lines.exists() else []
    return f"{jaxlib.__version__} {hashlib.sha256(''.join(flags[:1]).encode()).hexdigest()[:16]}"


if __name__ == "__main__":
    words = tuple(scripted_model.pieces())
    np.savez_compressed(FILE, about=packed({"machine": machine(), "pieces": words}), **make(words))
    print(FILE, FILE.stat().st_size)
