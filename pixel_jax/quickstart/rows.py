"""The rows that each phase trains on, drawn from seeds."""

from collections.abc import Sequence

import numpy as np

from pixel_jax.data import miniature, synthesis
from pixel_jax.data.traces import Trace, Turn
from pixel_jax.quickstart.vocabulary import CUE
from pixel_jax.rollout.prompts import Query

MARGIN = 8  # pixels of the scene around a digit that a reference box leaves: one pixel of the overview


def reference_box(scene: miniature.Scene) -> synthesis.Box:
    x1, y1, x2, y2 = scene.digit
    return synthesis.outward((x1 - MARGIN, y1 - MARGIN, x2 + MARGIN, y2 + MARGIN), miniature.SIDE, miniature.SIDE)


def scene_query(scene: miniature.Scene) -> Query:
    return Query(miniature.QUESTION, [scene.image])


def clip_query(clip: miniature.Clip) -> Query:
    return Query(miniature.VIDEO_QUESTION, list(clip.frames), is_video=True)


def locate_row(rng: np.random.Generator, scenes: miniature.SceneConfig, split: str) -> Trace:
    """Where is the digit? The call is given up to its box; the four coordinates are learned."""
    scene = miniature.draw_scene(rng, split, scenes)
    box = synthesis.written_box(reference_box(scene))
    turn = Turn(((synthesis.opening_zoom(CUE), False), (box, True)), ends=False)
    return Trace(scene_query(scene), (turn,), str(scene.label))


def read_row(rng: np.random.Generator, scenes: miniature.SceneConfig, split: str) -> Trace:
    """Which digit is it? The picture is a scene with a large card or what a box drawn by an unsteady hand cuts out."""
    scene = miniature.draw_scene(rng, split, scenes)
    image = scene.image
    if scene.small or rng.random() < 0.5:
        jitter = rng.uniform(-8, 8, 4) if scene.small else rng.uniform(-24, 24, 4)
        x1, y1, x2, y2 = np.clip(np.array(scene.digit) + (-MARGIN, -MARGIN, MARGIN, MARGIN) + jitter, 0, miniature.SIDE)
        image = image[round(y1) : round(y2), round(x1) : round(x2)]
    turn = Turn(((synthesis.SENTENCES.answer, False), (str(scene.label), True)), ends=False)
    return Trace(Query(miniature.QUESTION, [image]), (turn,), str(scene.label))


def label_of(traces: Sequence[Trace]) -> list[str]:
    return [trace.answer for trace in traces]
