"""The rows that each phase trains on, drawn from seeds."""

import dataclasses

import numpy as np

from pixel_jax.data import miniature, synthesis
from pixel_jax.data.miniature import SceneConfig
from pixel_jax.data.traces import Trace, Turn
from pixel_jax.quickstart.vocabulary import CUE
from pixel_jax.rollout.prompts import Query

MARGIN = 10  # pixels of the scene around a digit that a reference box leaves: what a box may miss by
OVERVIEW_PIXEL = 8  # pixels of the scene
MOST_CALLS = 3  # of a trace: two misses, then the reference


@dataclasses.dataclass(frozen=True)
class WarmStartConfig:
    """What the warm start is shown."""

    mix: synthesis.Mix = synthesis.Mix()
    video_share: float = 0.15  # of the traces
    box_noise: float = 0.0  # standard deviation of the written boxes' edges, in pixels of the overview


def reference_box(scene: miniature.Scene) -> synthesis.Box:
    x1, y1, x2, y2 = scene.digit
    return synthesis.outward((x1 - MARGIN, y1 - MARGIN, x2 + MARGIN, y2 + MARGIN), miniature.SIDE, miniature.SIDE)


def scene_query(scene: miniature.Scene) -> Query:
    return Query(miniature.QUESTION, [scene.image])


def clip_query(clip: miniature.Clip) -> Query:
    return Query(miniature.VIDEO_QUESTION, list(clip.frames), is_video=True)


# Phase 1, ground and read. The rest of a row is the dialog as it will be; only coordinates and digits are learned, so that
# nothing is said yet about when to look closer.


def locate_row(rng: np.random.Generator, scenes: SceneConfig, split: str) -> Trace:
    """Where is the digit? The call is given up to its box; the four coordinates are learned."""
    scene = miniature.draw_scene(rng, split, scenes)
    box = synthesis.written_box(reference_box(scene))
    turn = Turn(((synthesis.opening_zoom(CUE), False), (box, True)), ends=False)
    return Trace(scene_query(scene), (turn,), str(scene.label))


def read_row(rng: np.random.Generator, scenes: SceneConfig, split: str) -> Trace:
    """Which digit is it? The picture is a scene with a large card, or what a box drawn by an unsteady hand cuts out."""
    scene = miniature.draw_scene(rng, split, scenes)
    image = scene.image
    if scene.small or rng.random() < 0.5:
        jitter = rng.uniform(-8, 8, 4) if scene.small else rng.uniform(-24, 24, 4)
        x1, y1, x2, y2 = np.clip(np.array(scene.digit) + (-MARGIN, -MARGIN, MARGIN, MARGIN) + jitter, 0, miniature.SIDE)
        image = image[round(y1) : round(y2), round(x1) : round(x2)]
    turn = Turn(((synthesis.SENTENCES.answer, False), (str(scene.label), True)), ends=False)
    return Trace(Query(miniature.QUESTION, [image]), (turn,), str(scene.label))


# Phase 2, the warm start.


def warm_start_row(rng: np.random.Generator, scenes: SceneConfig, split: str, config: WarmStartConfig) -> Trace:
    """A trace of any kind, in the shares of `config`."""
    if rng.random() < config.video_share:
        clip = miniature.draw_clip(rng, split, scenes)
        kind = synthesis.draw_kind(rng, synthesis.VIDEO_KINDS, config.mix.video)
        return synthesis.video_trace(rng, clip_query(clip), CUE, [clip.target + 1], str(clip.label), kind)
    direct = rng.random() < config.mix.direct
    if direct:
        scene = miniature.draw_scene(rng, split, scenes)
        return synthesis.direct_trace(scene_query(scene), str(scene.label))
    kind = synthesis.draw_kind(rng, synthesis.IMAGE_KINDS, config.mix.image)
    # A large card leaves nothing to miss and nothing to be too far from.
    scene = miniature.draw_scene(rng, split, scenes, small=None if kind == "single" else True)
    reference = reference_box(scene)
    learned = noisy(rng, reference, config.box_noise)
    return synthesis.image_trace(rng, scene_query(scene), CUE, reference, str(scene.label), kind, learned=learned)


def noisy(rng: np.random.Generator, box: synthesis.Box, deviation: float) -> synthesis.Box:
    """`box` with a normal error on each edge, `deviation` in pixels of the overview; at least one hundredth a side."""
    hundredths = 100 * np.array(box) + rng.normal(0, 100 * deviation * OVERVIEW_PIXEL / miniature.SIDE, 4)
    x1, y1, x2, y2 = np.clip(np.round(hundredths), 0, 100)
    x1, y1 = min(x1, 99), min(y1, 99)
    return tuple(float(x) / 100 for x in (x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)))
