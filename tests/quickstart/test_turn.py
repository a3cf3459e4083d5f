"""The lesson with `rotate`: cards lie as a scene says, traces bring them upright, the arms differ in the tool alone."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from pixel_jax.config import load
from pixel_jax.data.shapes import BatchShape
from pixel_jax.data.traces import Trace, right, to_trajectories
from pixel_jax.evaluation import transcript as saved_traces
from pixel_jax.quickstart import miniature, turn
from pixel_jax.quickstart.config import QuickstartConfig
from pixel_jax.quickstart.lesson import scene_query
from pixel_jax.quickstart.miniature import SceneConfig
from pixel_jax.quickstart.page import page
from pixel_jax.quickstart.pipeline import run_seed
from pixel_jax.quickstart.summary import summarise
from pixel_jax.quickstart.task import lesson_of
from pixel_jax.quickstart.vocabulary import build_vocabulary, pieces
from pixel_jax.rollouts.prompts import tables
from pixel_jax.rollouts.trajectory import CallStatus
from pixel_jax.tools import ROTATE
from tests.evaluation.test_report import Reader
from tests.quickstart.test_quickstart import LIMITS, ROOT, SMALLEST, numbers, result, shipped

SCENES = SceneConfig(small_share=0.0, on_side=0.5)
CLOCKWISE = {0: None, 1: Image.Transpose.ROTATE_270, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_90}
SIDES = {"top": 0, "right": 3, "bottom": 2, "left": 1}  # quarter turns clockwise that bring it to the top


@pytest.fixture(scope="module")
def words():
    return build_vocabulary(turn.TURN)


@pytest.fixture(scope="module")
def scenes():
    return [miniature.draw_scene(np.random.default_rng(i), "test", SCENES) for i in range(40)]


def turned(picture: np.ndarray, turns: int) -> np.ndarray:
    """By Pillow."""
    image = Image.fromarray(picture)
    return np.asarray(image if CLOCKWISE[turns] is None else image.transpose(CLOCKWISE[turns]))


def lies(picture: np.ndarray) -> str:
    """The side of the card that its bar is at."""
    bar, card = (
        np.argwhere((picture == colour).all(axis=2)).mean(axis=0) for colour in (miniature.BAR, miniature.CARD)
    )
    down, across = bar - card
    return ("bottom" if down > 0 else "top") if abs(down) > abs(across) else ("right" if across > 0 else "left")


def test_a_scene_says_how_its_card_lies(scenes):
    assert {scene.turns for scene in scenes} == {0, 1, 3}
    for scene in scenes:
        assert SIDES[lies(scene.image)] == scene.turns
        assert lies(turned(scene.image, scene.turns)) == "top"
    shares = np.mean([scene.turns > 0 for scene in scenes])
    assert 0.25 < shares < 0.75


def test_scenes_of_the_other_lesson_have_no_bar():
    scene = miniature.draw_scene(np.random.default_rng(0), "test", SceneConfig(), small=False)
    assert scene.turns == 0 and not (scene.image == miniature.BAR).all(axis=2).any()


def test_every_piece_is_one_token_and_a_turn_is_two(words):
    for piece in pieces(turn.TURN):
        assert len(words.encode(piece)) == 1, piece
    for turns in turn.BY:
        assert len(words.encode(turn.call(turns))) == 2


def test_the_last_call_of_a_trace_brings_the_card_upright(words):
    config = dataclasses.replace(SMALLEST, lesson="turn", scenes=SCENES)
    traces = [turn.warm_start_row(np.random.default_rng(i), config) for i in range(60)]
    limits = dataclasses.replace(LIMITS, max_calls=turn.MOST_CALLS)
    rows = to_trajectories(traces, words, tables(words, turn.TURN.tools), limits, BatchShape(160, 3, 3, 16))
    made = np.sum(rows.calls.status == CallStatus.DONE, axis=1)
    assert set(made) == {0, 1, 2}
    for trace, count, values in zip(traces, made, rows.calls.values.units[:, :, 0], strict=True):
        picture = trace.query.images[0]
        if count:
            degrees = int(ROTATE.arguments[0].options[values[count - 1]])
            assert lies(turned(picture, degrees // 90)) == "top"
        if count == 2:  # the mistake before it is one, and is not learned
            assert lies(turned(picture, int(ROTATE.arguments[0].options[values[0]]) // 90)) != "top"
            assert not any(learned for _, learned in trace.turns[0].parts)


def test_first_turns_are_counted_by_whether_they_are_right(words, scenes):
    lying = [scene for scene in scenes if scene.turns][:4]
    asked = [lying[0].turns, 4 - lying[1].turns, lying[2].turns, None]
    end = right("The answer is \\boxed{1}")
    turns = [(end,) if by is None else (right(turn.call(by)), end) for by in asked]
    traces = [Trace(scene_query(scene), made, "1") for scene, made in zip(lying, turns, strict=True)]
    rows = to_trajectories(traces, words, tables(words, turn.TURN.tools), LIMITS, BatchShape(160, 3, 3, 16))
    assert turn.right_turns(rows, lying) == {"right_turn": 0.5}


def test_the_arms_differ_in_the_tool_alone():
    config = load(QuickstartConfig, shipped("quickstart_rotate"))
    assert load(QuickstartConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config
    arms = {name: lesson_of(config).arm_config(config, name) for name in lesson_of(config).arms}
    assert arms["tool"] == config and config.rl.rollout.max_calls > 0
    without = arms["no_tool"]
    assert without.rl.rollout.max_calls == 0 and dataclasses.replace(without, rl=config.rl) == config
    assert dataclasses.replace(without.rl, rollout=dataclasses.replace(without.rl.rollout, max_calls=2)) == config.rl


def test_the_page_has_a_dash_for_what_an_arm_cannot_do():
    config = load(QuickstartConfig, shipped("quickstart_rotate"))
    found = result(0.0)
    names = {"small": "on_side", "large": "upright", "zoom_on_side": "turned_on_side", "zoom_iou": "right_turn"}

    def renamed(values):
        for old, new in names.items():
            values = {name.replace(old, new): value for name, value in values.items()}
        return values

    with_tool, without = (renamed(found["rl"][arm]) for arm in ("curiosity", "no_curiosity"))
    del without["turned_on_side"], without["right_turn"]
    summary = summarise({0: {**found, "sft": renamed(found["sft"]), "rl": {"tool": with_tool, "no_tool": without}}})
    assert summary["accuracy_gap"] == pytest.approx(0.25)
    texts = Reader(page(config, summary, [])).texts
    assert texts.count("–") == 2 and "With the tool minus without the tool, accuracy: 0.250." in " ".join(texts)


@pytest.mark.slow
def test_a_run_ends_with_both_arms_judged(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    limits = dataclasses.replace(LIMITS, max_calls=2)
    rl = dataclasses.replace(SMALLEST.rl, rollout=limits)
    config = dataclasses.replace(SMALLEST, lesson="turn", scenes=SCENES, rl=rl)
    directory = tmp_path / "seed-0"
    found = run_seed(config, directory)
    assert set(found["rl"]) == {"tool", "no_tool"}
    assert "turned_on_side" in found["rl"]["tool"] and "turned_on_side" not in found["rl"]["no_tool"]
    assert found["rl"]["no_tool"]["rapr"] == found["rl"]["no_tool"]["operations"] == 0
    traces = [item for name in ("tool", "no_tool") for item in saved_traces.load(directory / name / "traces.json")]
    html = page(config, summarise({0: numbers(found) | {"seconds": found["seconds"]}}), traces)
    assert "with the tool" in html and "without the tool" in html
