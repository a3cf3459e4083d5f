"""The quickstart's experiment about the miniature tier: its lesson "zoom" with the pictures and questions of the set.

Models are trained on the photographs of the training split, on items that are drawn as those of the set are, by other random
numbers. Close-ups of the marks, which the overview shows, take the place of large cards.
"""

import dataclasses
import functools

import numpy as np
from PIL import Image

from pixel_jax.data import synthesis
from pixel_jax.data.traces import Trace, Turn, right
from pixel_jax.quickstart.config import QuickstartConfig
from pixel_jax.quickstart.lesson import scene_query
from pixel_jax.quickstart.miniature import Box, Scene, SceneConfig
from pixel_jax.quickstart.zoom import CUE, ZOOM, reference_box, unsteady
from pixel_jax.search_set.items import DIFFICULTIES, DIGIT_QUESTION, LARGER_QUESTION, TIERS, background, draw_item
from pixel_jax.search_set.photographs import Photograph
from pixel_jax.search_set.writing import Photographs, SetConfig

TIER = TIERS["miniature"]
CLOSE = (1.6, 2.2)  # side of a close-up, in longer sides of the marks


@functools.cache
def photographs(split: str) -> tuple[Photograph, ...]:
    """The photographs of a split of the set that needs no folder, with the usual seed."""
    return tuple(Photographs.of(SetConfig(tiers=(TIER.name,))).splits[split])


def draw_scene(rng: np.random.Generator, split: str, config: SceneConfig, *, small: bool | None = None) -> Scene:
    """Draws an item of the miniature tier, or, if not `small`, a close-up of its marks; None: by `config.small_share`."""
    if small is None:
        small = bool(rng.random() < config.small_share)
    some = photographs(split)
    image = background(rng, some[rng.integers(len(some))], TIER.size)
    if split == "train":
        image = tinted(rng, image)
    kind, difficulty = TIER.kinds[rng.integers(len(TIER.kinds))], DIFFICULTIES[rng.integers(len(DIFFICULTIES))]
    item = draw_item(rng, image, TIER, kind, difficulty)
    evidence = union(item.boxes)
    shown = item.image if small else close_up(rng, item.image, evidence)
    return Scene(shown, item.answer, small, evidence, evidence, question=item.question)


def tinted(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Mixes the channels of a picture, as the quickstart does: few photographs teach boxes that hold for new ones."""
    mix = np.eye(3) + rng.normal(0, 0.35, (3, 3))
    mix *= rng.uniform(0.6, 1.2) / mix.sum(axis=1, keepdims=True).clip(0.5)
    matrix = np.concatenate([mix, rng.normal(0, 30, (3, 1))], axis=1)
    turned = np.rot90(image, int(rng.integers(4)))
    return np.array(Image.fromarray(np.ascontiguousarray(turned)).convert("RGB", tuple(matrix.ravel())))


def union(boxes: tuple[Box, ...]) -> Box:
    """The smallest box that holds all boxes."""
    low, high = np.min(boxes, axis=0)[:2], np.max(boxes, axis=0)[2:]
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def close_up(rng: np.random.Generator, image: np.ndarray, box: Box) -> np.ndarray:
    """A square part of the picture with the box in it, enlarged to the size of the picture."""
    side = min(round(max(box[2] - box[0], box[3] - box[1]) * rng.uniform(*CLOSE)), image.shape[0])
    corner = []
    for low, high in ((box[0], box[2]), (box[1], box[3])):
        first, last = max(0, high - side), min(low, image.shape[0] - side)
        corner.append(int(rng.integers(first, last, endpoint=True)))
    x, y = corner
    part = Image.fromarray(image[y : y + side, x : x + side])
    return np.asarray(part.resize(TIER.size, Image.Resampling.BICUBIC))


def look_row(rng: np.random.Generator, scenes: SceneConfig) -> Trace:
    """A row of phase 1 with a call: the text up to the box is given, and the box and the answer are learned."""
    scene = draw_scene(rng, "train", scenes, small=True)
    reference = reference_box(scene)
    opening, call = synthesis.opening_zoom(CUE), synthesis.crop_call(CUE, reference)
    shown = synthesis.crop_call(CUE, unsteady(rng, reference))
    look = Turn(((opening, False), (call.removeprefix(opening), True)), executed=shown)
    answer = str(scene.label)
    return Trace(scene_query(scene), (look, right(synthesis.final_answer(answer))), answer)


def read_row(rng: np.random.Generator, scenes: SceneConfig) -> Trace:
    """A row of phase 1 about a close-up: the text up to the answer is given, and the answer is learned."""
    scene = draw_scene(rng, "train", scenes, small=False)
    answer = str(scene.label)
    turn = Turn(((synthesis.SENTENCES.answer, False), (answer, True)), ends=False)
    return Trace(scene_query(scene), (turn,), answer)


def warm_start_row(rng: np.random.Generator, config: QuickstartConfig) -> Trace:
    """A trace of phase 2 of any kind, in the shares of `config.traces.mix`. There are no videos."""
    mix = config.traces.mix
    if rng.random() < mix.direct:
        scene = draw_scene(rng, "train", config.scenes)
        return synthesis.direct_trace(scene_query(scene), str(scene.label))
    kind = synthesis.draw_kind(rng, synthesis.IMAGE_KINDS, mix.image)
    scene = draw_scene(rng, "train", config.scenes, small=True)
    reference = reference_box(scene)
    return synthesis.image_trace(
        rng, scene_query(scene), CUE, reference, str(scene.label), kind, shown=unsteady(rng, reference)
    )


SEARCH = dataclasses.replace(
    ZOOM,
    title="A model that searches photographs",
    introduction="Photographs carry cards with printed digits, which are hidden from the overview: it looks the same without "
    "them. The model may zoom in, as often as it likes, or answer at once. It is asked for the digit on the magenta card, or "
    "which of the two digits there is the larger.",
    questions=(DIGIT_QUESTION, LARGER_QUESTION),
    pieces=(*ZOOM.pieces, "left", "right"),
    scene=lambda rng, split, scenes, hard=None: draw_scene(rng, split, scenes, small=hard),
    look_row=look_row,
    read_row=read_row,
    warm_start=warm_start_row,
    rows={
        **ZOOM.rows,
        "accuracy_small": "… items of the set",
        "accuracy_large": "… close-ups",
        "rapr_small": "… items of the set",
        "rapr_large": "… close-ups",
        "zoom_small": "made to zoom, items of the set",
        "direct_small": "made to answer at once, items of the set",
    },
)
