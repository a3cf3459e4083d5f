"""The lesson "turn": digits on cards that lie on their side, and the tool `rotate`, which is not the paper's."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from pixel_jax.data import synthesis
from pixel_jax.data.traces import Trace, Turn, right, wrong
from pixel_jax.quickstart import miniature
from pixel_jax.quickstart.config import QuickstartConfig
from pixel_jax.quickstart.lesson import Arm, Lesson, scene_query
from pixel_jax.quickstart.miniature import Scene, SceneConfig
from pixel_jax.rollouts.trajectory import CallStatus, Trajectories
from pixel_jax.tools import ROTATE
from pixel_jax.tools.calls import read
from pixel_jax.tools.tool import Choice
from pixel_jax.training.rl import RLConfig

OPENING = 'The card lies on its side. I will turn the image.\n<tool_call>\n{"name": "rotate", "arguments": {"by": "'
BY = {1: "90", 2: "180", 3: "270"}  # quarter turns clockwise -> the tool's argument
END = '", "target_image": 1}}\n</tool_call>'
NOT_UPRIGHT = "The card is not upright. "
MOST_CALLS = 2  # of a trace: a wrong turn, then the right one


def call(turns: int) -> str:
    """A turn of the assistant that rotates the first image by `turns` quarter turns clockwise."""
    return OPENING + BY[turns] + END


def look_row(rng: np.random.Generator, scenes: SceneConfig) -> Trace:
    """A row of phase 1 with a call: the text up to the angle is given, and the angle and the answer are learned."""
    scene = miniature.draw_scene(rng, "train", scenes, on_side=True)
    look = Turn(((OPENING, False), (BY[scene.turns] + END, True)))
    return Trace(scene_query(scene), (look, right(synthesis.final_answer(str(scene.label)))), str(scene.label))


def read_row(rng: np.random.Generator, scenes: SceneConfig) -> Trace:
    """A row of phase 1 about an upright card: the text up to the digit is given, and the digit is learned."""
    scene = miniature.draw_scene(rng, "train", scenes, on_side=False)
    turn = Turn(((synthesis.SENTENCES.answer, False), (str(scene.label), True)), ends=False)
    return Trace(scene_query(scene), (turn,), str(scene.label))


def warm_start_row(rng: np.random.Generator, config: QuickstartConfig) -> Trace:
    """A trace of phase 2: upright cards are read at once; for the others `config.turns` has the shares."""
    scene = miniature.draw_scene(rng, "train", config.scenes)
    answer = str(scene.label)
    if not scene.turns or rng.random() < config.turns.direct:
        return synthesis.direct_trace(scene_query(scene), answer)
    turns = (right(call(scene.turns)), right(synthesis.final_answer(answer)))
    if rng.random() < config.turns.corrected:
        other = int(rng.choice([x for x in BY if x != scene.turns]))
        turns = (wrong(call(other)), right(NOT_UPRIGHT + call(scene.turns)), turns[1])
    return Trace(scene_query(scene), turns, answer)


# ---- reports


def without_the_tool(config: RLConfig) -> RLConfig:
    """The configuration of the arm without calls: a call gets an error message, and the card must be read as it lies."""
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, max_calls=0))


def right_turns(trajectories: Trajectories, scenes: Sequence[Scene]) -> dict[str, float]:
    """The share of first calls that bring the card upright."""
    calls = trajectories.calls
    by_argument = ROTATE.arguments[0]
    assert isinstance(by_argument, Choice)
    wanted = np.array([by_argument.options.index(BY[scene.turns]) for scene in scenes])
    done = calls.status[:, 0] == CallStatus.DONE
    by = read(ROTATE, jax.tree.map(lambda x: x[:, 0], calls.values))["by"]
    return {"right_turn": float(np.mean(done & (by == wanted)))}


def arrangement(config: QuickstartConfig) -> list[str]:
    """Says what the traces show and what the model must learn."""
    return [
        f"{config.scenes.on_side:.0%} of the cards lie on their left or right side. A bar along their top says which way is "
        "up. In the first phase the network reads upright cards only, and learns which way to turn the others: as one that "
        "was trained on pictures as people take them.",
        f"In the warm start {config.turns.direct:.0%} of the traces about such cards answer at once, rightly; of the others "
        f"{config.turns.corrected:.0%} turn the wrong way first. Both arms start from it: one may call the tool, the other "
        "is told that no call is left, and can learn to read the cards as they lie. Right answers are all that is rewarded.",
        f"Reinforcement learning samples at {config.temperatures}.",
    ]


TURN = Lesson(
    title="A model that turns pictures the right way up",
    introduction="Photographs carry a card with a handwritten digit. Most cards lie on their side. A tool of the user's "
    "own, rotate, turns the picture; the model may call it, or answer at once. After instruction tuning on traces, "
    "reinforcement learning starts twice from the same checkpoint: once with the tool, once without.",
    tools=(ROTATE,),
    questions=(miniature.QUESTION,),
    pieces=(OPENING, *(by + END for by in BY.values()), NOT_UPRIGHT),
    scene=lambda rng, split, scenes, hard=None: miniature.draw_scene(rng, split, scenes, on_side=hard),
    is_hard=lambda scene: scene.turns > 0,
    look_row=look_row,
    read_row=read_row,
    warm_start=warm_start_row,
    most_calls=MOST_CALLS,
    most_images=1 + MOST_CALLS,
    hard="on_side",
    easy="upright",
    look="turned",
    opening=OPENING,
    measure=right_turns,
    arms={
        "tool": Arm("with the tool", lambda config: config),
        "no_tool": Arm("without the tool", without_the_tool),
    },
    rows={
        "accuracy": "accuracy, free to choose",
        "accuracy_on_side": "… cards on their side",
        "accuracy_upright": "… upright cards",
        "rapr": "rate of turning the picture",
        "rapr_on_side": "… cards on their side",
        "rapr_upright": "… upright cards",
        "greedy_accuracy": "accuracy, greedy",
        "greedy_rapr": "rate, greedy",
        "turned_on_side": "made to turn it, cards on their side",
        "direct_on_side": "made to answer at once, cards on their side",
        "right_turn": "first turns that bring the card upright, where made to turn",
    },
    arrangement=arrangement,
)
