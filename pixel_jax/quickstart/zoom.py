"""The lesson "zoom", the paper's: digits too small to read in the overview, and the tools that zoom in and select frames."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pixel_jax.data import synthesis
from pixel_jax.data.traces import Trace, Turn, right
from pixel_jax.quickstart import miniature
from pixel_jax.quickstart.config import QuickstartConfig, WarmStartConfig
from pixel_jax.quickstart.lesson import Arm, Lesson, scene_query
from pixel_jax.quickstart.miniature import SceneConfig
from pixel_jax.rollouts.prompts import Query
from pixel_jax.rollouts.trajectory import CallStatus, Trajectories
from pixel_jax.tools import RELEASED
from pixel_jax.training.rl import RLConfig

CUE = "the card"
MAX_TARGETS = 4  # images a trace can name

MARGIN = 20  # pixels of the scene around a digit that a reference box leaves: what a box may miss by
JITTER = 7.0  # pixels of the scene, standard deviation of the edges of the boxes that are executed in training
MOST_CALLS = 3  # of a trace: two misses, then the reference


def reference_box(scene: miniature.Scene) -> synthesis.Box:
    """The box around the digit of a scene."""
    x1, y1, x2, y2 = scene.digit
    return synthesis.outward((x1 - MARGIN, y1 - MARGIN, x2 + MARGIN, y2 + MARGIN), miniature.SIDE, miniature.SIDE)


def clip_query(clip: miniature.MiniatureClip) -> Query:
    """The question about a video."""
    return Query(miniature.VIDEO_QUESTION, list(clip.frames), is_video=True)


# Phase 1, ground and read. A row is a dialog of phase 2 whose first words carry no loss: the decision to look closer is
# learned in phase 2.


def look_row(rng: np.random.Generator, scenes: SceneConfig, split: str = "train") -> Trace:
    """A row of phase 1 with a call: the text up to the box is given, and the box and the answer are learned."""
    scene = miniature.draw_scene(rng, split, scenes)
    reference = reference_box(scene)
    opening, call = synthesis.opening_zoom(CUE), synthesis.crop_call(CUE, reference)
    shown = synthesis.crop_call(CUE, unsteady(rng, reference))
    look = Turn(((opening, False), (call.removeprefix(opening), True)), executed=shown)
    return Trace(scene_query(scene), (look, right(synthesis.final_answer(str(scene.label)))), str(scene.label))


def read_row(rng: np.random.Generator, scenes: SceneConfig, split: str = "train") -> Trace:
    """A row of phase 1 about a large card: the text up to the digit is given, and the digit is learned."""
    scene = miniature.draw_scene(rng, split, scenes, small=False)
    turn = Turn(((synthesis.SENTENCES.answer, False), (str(scene.label), True)), ends=False)
    return Trace(scene_query(scene), (turn,), str(scene.label))


def unsteady(rng: np.random.Generator, box: synthesis.Box) -> synthesis.Box:
    """The box with a normal error on each edge, in whole hundredths, similar to the errors of a sampled policy.

    A row shows the crop of this box, although the exact box is learned, so that reading does not depend on exact boxes.
    """
    hundredths = 100 * np.array(box) + rng.normal(0, 100 * JITTER / miniature.SIDE, 4)
    x1, y1, x2, y2 = np.clip(np.round(hundredths), 0, 100)
    x1, y1 = min(x1, 99), min(y1, 99)
    return float(x1) / 100, float(y1) / 100, float(max(x2, x1 + 1)) / 100, float(max(y2, y1 + 1)) / 100


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
    # With a large card a crop can neither miss the digit nor be too large.
    scene = miniature.draw_scene(rng, split, scenes, small=None if kind == "single" else True)
    reference = reference_box(scene)
    shown = unsteady(rng, reference)
    return synthesis.image_trace(rng, scene_query(scene), CUE, reference, str(scene.label), kind, shown=shown)


# ---- reports


def without_curiosity(config: RLConfig) -> RLConfig:
    """The configuration of the arm whose reward is that of right answers alone."""
    return dataclasses.replace(config, reward=dataclasses.replace(config.reward, alpha=0.0, beta=0.0))


def first_box_iou(trajectories: Trajectories, scenes: Sequence[miniature.Scene]) -> dict[str, float]:
    """The mean overlap (IoU) of the first box with the reference box; 0 where nothing was cropped."""
    calls, overlaps = trajectories.calls, np.zeros(len(scenes))
    for i, scene in enumerate(scenes):
        if calls.status[i, 0] != CallStatus.DONE:
            continue
        x1, y1, x2, y2 = calls.source.region[i, 0, 0]
        a1, b1, a2, b2 = synthesis.in_pixels(reference_box(scene), miniature.SIDE, miniature.SIDE)
        both = max(min(x2, a2) - max(x1, a1), 0) * max(min(y2, b2) - max(y1, b1), 0)
        overlaps[i] = both / ((x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - both)
    return {"zoom_iou": float(overlaps.mean())}


def arrangement(config: QuickstartConfig) -> list[str]:
    """The settings that make the learning trap visible, in words."""
    weights = np.array(config.scenes.frequencies or (1.0,) * 10)
    shares = ", ".join(f"{100 * x:.0f}" for x in weights / weights.sum())
    return [
        f"Box padding is {config.rl.rollout.pad:g} of the image (the released recipe: 0.1). At 448 pixels a tenth on each "
        "side would undo the zoom.",
        f"Reinforcement learning explores at {config.temperatures}; every number of the tables is sampled at 1. A call is "
        "a dozen tokens, each of which can go wrong at that temperature, and an answer is three: looking closer fails "
        "first, although the warm start can do it. That is the "
        "learning trap. For the same reason curiosity pays up to a rate of "
        f"{config.rl.reward.threshold:g} in a group (the paper: 0.3): a call that such a temperature breaks does not count.",
        f"{config.scenes.small_share:.0%} of the scenes have a small digit; the rest can be read at once. The digits are "
        "not equally frequent, so that a guess is right now and then and answering at once has some merit. In percent, 0 "
        f"to 9: {shares}.",
        f"{config.traces.mix.direct:.0%} of the image traces of the warm start answer directly; of the others "
        f"{config.traces.mix.image[0]:.0%} look once (the paper: 30 %), because mistakes carry no loss and only those "
        "traces teach a first call.",
    ]


SENTENCES = synthesis.SENTENCES
ZOOM = Lesson(
    title="A model that reasons in pixel space",
    introduction="Photographs carry a card with a handwritten digit. Small digits cannot be read in the overview the model "
    "sees first; it may zoom in, from the full-resolution image, as often as it likes, or answer at once. After instruction "
    "tuning on synthesized traces, reinforcement learning starts twice from the same checkpoint: once with the curiosity "
    "reward of Pixel Reasoner, once without.",
    tools=RELEASED,
    questions=(miniature.QUESTION, miniature.VIDEO_QUESTION),
    pieces=(
        synthesis.opening_zoom(CUE),
        synthesis.opening_select(CUE),
        *(synthesis.END_TARGET % target for target in range(1, MAX_TARGETS + 1)),
        synthesis.END_FRAMES,
        SENTENCES.missed,
        SENTENCES.too_large,
        SENTENCES.wrong_frames,
    ),
    scene=lambda rng, split, scenes, hard=None: miniature.draw_scene(rng, split, scenes, small=hard),
    is_hard=lambda scene: scene.small,
    look_row=look_row,
    read_row=read_row,
    warm_start=lambda rng, config: warm_start_row(rng, config.scenes, "train", config.traces),
    most_calls=MOST_CALLS,
    most_images=miniature.NUM_FRAMES + MOST_CALLS,
    hard="small",
    easy="large",
    look="zoom",
    opening=synthesis.opening_zoom(CUE),
    measure=first_box_iou,
    arms={
        "curiosity": Arm("with curiosity", lambda config: config),
        "no_curiosity": Arm("without curiosity", without_curiosity),
    },
    rows={
        "accuracy": "accuracy, free to choose",
        "accuracy_small": "… small digits",
        "accuracy_large": "… large digits",
        "rapr": "rate of pixel-space reasoning",
        "rapr_small": "… small digits",
        "rapr_large": "… large digits",
        "greedy_accuracy": "accuracy, greedy",
        "greedy_rapr": "rate, greedy",
        "zoom_small": "made to zoom, small digits",
        "direct_small": "made to answer at once, small digits",
        "zoom_iou": "overlap of the box with the reference (IoU)",
    },
    arrangement=arrangement,
)
