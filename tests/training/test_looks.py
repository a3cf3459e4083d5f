"""What a look finds: the loss that tuning has, the answers that a rollout gives, the pixels that its rows saw."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from pixel_jax.data.example import Example, ReadReport
from pixel_jax.data.packed import Packing
from pixel_jax.data.questions import assign_shapes
from pixel_jax.data.read import read_examples
from pixel_jax.evaluation import transcript as traces
from pixel_jax.evaluation.transcript import make_transcript
from pixel_jax.rollouts.limits import single_answer
from pixel_jax.rollouts.rollout import rollout, static_shape
from pixel_jax.rollouts.shapes import BatchShape, prompt_shape
from pixel_jax.rollouts.trajectory import STOP_ANSWER, executed_calls, to_host
from pixel_jax.training.answers import given_answer
from pixel_jax.training.looks import AllLooks, Asker, HeldOutLoss, Sampling, draw_rollouts, written
from pixel_jax.training.optimizer import OptimizerConfig, make_optimizer
from pixel_jax.training.scorers import ScorerConfig
from pixel_jax.training.stages import Collected, Questions, Scored, Weighed
from pixel_jax.training.state import init_state
from pixel_jax.training.steps import ForwardConfig, make_sft_step
from tests.rollouts import scripted_model

COUNT = 5
CALL = scripted_model.CROP + "0.05, 0.11, 0.71, 0.82" + '], "target_image": 1' + scripted_model.CLOSE


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Questions about pictures of one size, with traces of one turn or two."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for i in range(COUNT):
        Image.fromarray(scripted_model.image(i, 120, 150)).save(folder / f"{i}.png")
        answer = "73"[i % 2]
        written = [CALL, f"\\boxed{{{answer}}}"][i % 2 :]
        lines.append({"question": "Which digit?", "images": [f"{i}.png"], "answer": answer, "turns": written})
    (folder / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return read_examples(folder / "d.jsonl", turns=True)[0]


def state_of(model, **more):
    return init_state(model, make_optimizer(OptimizerConfig(learning_rate=1e-3), 1), **more)


@pytest.mark.parametrize("normalizer", ["row", "token"])
def test_the_loss_is_the_one_that_tuning_has_on_the_same_rows(examples, normalizer):
    """Rows of two traces or one, of which a step makes one batch and a look three, the last half empty."""
    shapes, limits = [BatchShape(96, 3, 3, 16)], single_answer(scripted_model.CONFIG)
    words, tables = scripted_model.vocabulary(), scripted_model.token_tables()
    make = lambda size: Packing(examples, words, tables, limits, shapes, size=size, seed=0, report=ReadReport("d"))
    packing = make(2)
    rows = len(packing.order.packed(0)[0])
    assert 2 < rows <= COUNT
    forward = ForwardConfig(remat=False, micro_batches=rows)
    whole = make(rows)
    (places,) = whole.order.packed(0)
    batch = whole.collate(map(whole.load, places), rows)
    step = make_sft_step(forward, make_optimizer(OptimizerConfig(learning_rate=1e-3), 1), normalizer=normalizer)
    _, report = step(state_of(scripted_model.model()), batch)
    state = state_of(scripted_model.model())
    metrics, found = HeldOutLoss(packing, forward, normalizer, 2 * rows)(state)
    assert found == [] and metrics["loss"] == pytest.approx(float(report.metrics["loss"]), rel=1e-5)
    assert metrics["loss"] > 0.1


@pytest.fixture(scope="module")
def asked(examples):
    limits = single_answer(scripted_model.CONFIG)
    shape = prompt_shape(1, 160, 160, 96, limits, video=False)
    return assign_shapes(examples, [shape], scripted_model.vocabulary(), limits, ReadReport("d"))


def ask(asked, model, **more):
    by = Sampling(scripted_model.vocabulary(), scripted_model.token_tables(), **more)
    limits = dataclasses.replace(scripted_model.CONFIG, temperature=1.7, later_temperature=2.0)  # as training explores
    look = Asker(asked, by, limits, ScorerConfig(), batch=3, drawn=2, seed=0, dtype=None)
    assert look.limits.temperature == 1 and look.limits.group_size == 1 and look.limits.later_temperature is None
    return look(state_of(model))


def test_numbers_are_of_every_question_once(asked):
    """Two batches of three for five questions: the sixth row repeats the last."""
    seen = []

    def watched(*arguments):
        seen.append(to_host(rollout(*arguments)))
        return seen[-1]

    metrics, found = ask(asked, scripted_model.model(), roll=watched)
    words = scripted_model.vocabulary()
    rows = [(t, row) for t in seen for row in range(3)][:COUNT]
    assert len(seen) == 2
    texts = [words.to_bytes(t.tokens[row][t.loss_mask[row]]).decode() for t, row in rows]
    right = [given_answer(text) == x.example.answer[0] for text, x in zip(texts, asked, strict=True)]
    mean = lambda of: float(np.mean([of(t)[row] for t, row in rows]))
    assert metrics["questions"] == COUNT and metrics["accuracy"] == pytest.approx(np.mean(right))
    assert metrics["rapr"] == pytest.approx(mean(lambda t: executed_calls(t) > 0))
    assert metrics["finished"] == pytest.approx(mean(lambda t: t.stop == STOP_ANSWER))
    assert metrics["response_tokens"] == pytest.approx(mean(lambda t: t.loss_mask.sum(axis=1)))
    assert metrics["unboxed"] == pytest.approx(np.mean([given_answer(text) is None for text in texts]))
    # The handful that is drawn: the first questions, what was written, whether it is right.
    assert [x.title for x in found] == [x.example.id for x in asked[:2]]
    assert [x.correct for x in found] == right[:2] and [x.reference for x in found] == ["7", "3"]
    for item, text in zip(found, texts, strict=False):
        assert "".join(turn.text for turn in item.turns if turn.role == "assistant")[-5:] in text


def test_looks_add_up():
    first, second = lambda state: ({"loss": state}, ["a"]), lambda state: ({"accuracy": 1}, ["b"])
    assert AllLooks(first, second)(3) == ({"loss": 3, "accuracy": 1}, ["a", "b"])


def drawable(config):
    """(rollout, queries, prompts) of images and videos."""
    prompts = scripted_model.prompts(4, video=True)
    return (
        to_host(rollout(scripted_model.model(), prompts, jax.random.key(7), config)),
        scripted_model.queries(4, video=True),
        prompts,
    )


@pytest.fixture(scope="module")
def kept():
    return drawable(scripted_model.CONFIG)


def check_drawn(kept, queries, prompts, config):
    """What is cut out on the host from what training keeps, against a rollout that kept its pixels."""
    shape = static_shape(prompts, config, None)
    examples = [Example(f"q{i}", query.question, (), (str(i),)) for i, query in enumerate(queries)]
    collected = Collected(Questions(0, prompts, examples), kept, kept, shape)
    correct = np.array([[0, 1, 0, 1]] * 4, np.float32)
    reward = np.arange(16, dtype=np.float32).reshape(4, 4) / 4
    weighed = Weighed(
        Scored(collected, reward, {"answer": correct, "my:own": reward - correct}, correct),
        reward - 1.5,
        np.ones(4, bool),
    )
    rows = [0, 3, 5, 14]
    texts, pixels = written(kept, scripted_model.vocabulary()), scripted_model.with_pixels(kept, prompts, config)
    for row, item in zip(rows, draw_rollouts(weighed, rows, scripted_model.vocabulary(), config), strict=True):
        known = {"answer": given_answer(texts[row]), "reference": str(row // 4), "correct": row % 2 == 1}
        known |= {"reward": row / 4, "advantage": row / 4 - 1.5, "title": f"q{row // 4}"}
        known["terms"] = {"answer": row % 2, "my:own": row / 4 - row % 2}
        known["tools"] = prompts.tables.tools
        assert item == make_transcript(pixels, row, queries[row // 4], scripted_model.vocabulary(), **known)
    drawn = draw_rollouts(weighed, range(16), scripted_model.vocabulary(), config)
    assert any(turn.pictures for item in drawn for turn in item.turns)


@pytest.mark.slow
def test_drawn_rollouts_show_the_pixels_that_their_rows_saw(kept):
    check_drawn(*kept, scripted_model.CONFIG)


@pytest.mark.slow
def test_drawn_rollouts_show_grey_where_their_rows_saw_it():
    config = dataclasses.replace(scripted_model.CONFIG, blank=True)
    check_drawn(*drawable(config), config)


def test_pictures_are_kept_smaller_with_boxes_in_their_place(kept):
    t, (query, *_), prompts = kept
    t = scripted_model.with_pixels(t, prompts)
    large, small = (
        [make_transcript(t, row, query, scripted_model.vocabulary(), side=side) for row in range(4)]
        for side in (None, 75)
    )
    for a, b in zip(large, small, strict=True):
        assert a.pictures[0].boxes == b.pictures[0].boxes
        assert (a.pictures[0].width, a.pictures[0].height) == (b.pictures[0].width, b.pictures[0].height) == (150, 120)
        assert traces.drawn(a.pictures[0]).shape == (120, 150, 3) and traces.drawn(b.pictures[0]).shape == (60, 75, 3)
    assert any(item.pictures[0].boxes for item in small)
