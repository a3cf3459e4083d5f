"""Shapes worked out from what examples take: everything fits, little is padding, and few programs are compiled."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference

from pixel_jax.config import ConfigError, load
from pixel_jax.data.example import ReadReport
from pixel_jax.data.packed import PackedOrder
from pixel_jax.data.questions import assign_shapes, describe_shapes, padding
from pixel_jax.data.shapes import AutoShapes, cover, training_work
from pixel_jax.ops import most_pixels
from pixel_jax.rollouts.prompts import PromptError
from pixel_jax.rollouts.shapes import BatchShape
from pixel_jax.train_config import TrainConfig
from tests.data.test_questions import some_examples
from tests.rollouts import scripted_model
from tests.training.tiny_model import tiny_config

NEEDS = st.builds(
    BatchShape,
    *(st.integers(1, 5000), st.integers(1, 32), st.integers(1, 32), st.integers(4, 8000)),
    *(st.integers(28, 3000), st.integers(28, 3000), st.booleans()),
)
WORK = training_work(tiny_config())


@given(st.lists(NEEDS, min_size=1, max_size=25), st.booleans(), st.integers(1, 20), st.integers(1, 4))
def test_all_needs_are_held_by_few_shapes(needs, packed, least, most):
    shapes = cover(needs, WORK, packed=packed, least=least, most=most)
    kinds = {need.video for need in needs}
    assert {shape.video for shape in shapes} == kinds and len(shapes) <= most * len(kinds)
    assert all(any(shape.holds(need) for shape in shapes) for need in needs)
    assert shapes == cover(needs[::-1], WORK, packed=packed, least=least, most=most)  # not by their order
    if not packed:
        # No shape has more room than its largest needs, in steps.
        for side, step in enumerate((64, 1, 1, 64, 32, 32)):
            largest = max(shape[side] for shape in shapes)
            assert largest - max(need[side] for need in needs) < step


def test_needs_that_are_alike_share_a_shape_and_others_do_not():
    small, large, film = BatchShape(600, 1, 1, 1000), BatchShape(3000, 4, 4, 8000), BatchShape(2500, 32, 16, 500)
    needs = [small] * 90 + [small._replace(tokens=620)] * 90 + [large] * 40 + [film] * 40
    shapes = cover(needs, WORK, packed=True, least=8)
    assert len(shapes) == 3 and shapes == sorted(shapes, key=WORK)
    assert [shape[1:3] for shape in shapes] == [(1, 1), (32, 16), (4, 4)] and shapes[0].tokens == 640
    # What would not fill a batch in an epoch is not worth a shape.
    assert cover(needs[:4] + needs[-1:], WORK, packed=True, least=8) == [BatchShape(2560, 32, 16, 1024)]


def test_packed_rows_have_room_for_as_many_pictures_as_go_with_their_words():
    """Traces about one picture each, one of them three times as long as most: rows of it have room for three pictures."""
    needs = [BatchShape(630, 1, 1, 400)] * 60 + [BatchShape(1900, 1, 1, 400)] * 6
    (shape,) = cover(needs, WORK, packed=True, most=1)
    rows = sum(map(len, PackedOrder(needs, [shape], 4, 0).packed(0)))
    assert shape == BatchShape(1920, 3, 3, 448) and rows == 60 / 3 + 6


@given(st.integers(1, 1200), st.integers(1, 1200), st.integers(1, 40), st.integers(40, 2000), st.data())
def test_no_picture_within_a_size_is_shown_larger_than_said(height, width, low, high, data):
    low, high = low * 784, high * 784
    bound = most_pixels(height, width, min_pixels=low, max_pixels=high)
    part = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    for size in ((height, width), part):
        if max(size) > 200 * min(size):
            continue
        shown = math.prod(reference(*size, 28, low, high))
        assert shown <= bound or shown > high  # which is refused wherever it comes up
    assert bound % 784 == 0 and bound <= high


def worked_out(examples, memory=2**30, report=None, config=scripted_model.CONFIG, rows=2):
    return assign_shapes(
        examples, AutoShapes(WORK, rows, memory), scripted_model.vocabulary(), config, report or ReadReport("here")
    )


def test_questions_have_the_shapes_that_they_need(tmp_path):
    """A small and a large picture, and a clip: by the pictures' own sizes, none made smaller."""
    report = ReadReport("here", drop=True)
    examples = some_examples(tmp_path)
    asked = worked_out([*examples[:3]] * 4 + examples[3:], report=report)
    assert len(report.dropped) == 1 and not report.mended and all(x.prompt.scale == 1.0 for x in asked)
    shapes = {x.example.id: x.shape for x in asked}
    assert (shapes["clip"].video, shapes["clip"].images, shapes["clip"].height, shapes["clip"].width) == (
        True,
        2,
        64,
        64,
    )
    assert not shapes["large"].video and (shapes["large"].height, shapes["large"].width) == (704, 512)
    prompt = next(x for x in asked if x.example.id == "large")
    (high, wide) = reference(700, 500, 28, scripted_model.CONFIG.min_pixels, scripted_model.CONFIG.max_pixels)
    assert prompt.prompt.patches == high * wide // 196
    wasted = padding(asked)
    assert 0 <= wasted["tokens"] < 1 and f"{wasted['patches']:.1%} of the patches" in describe_shapes(asked)


def test_pictures_that_fill_the_memory_are_made_smaller_and_counted(tmp_path):
    report = ReadReport("here")
    small, large = some_examples(tmp_path)[:2]
    asked = worked_out([small, large], memory=3 * 350 * 250, report=report)
    assert asked[1].prompt.sizes == [(350, 250)] and asked[0].prompt.scale == 1.0
    assert report.mended == {"a picture was made smaller to fit its batch shape": 1}
    wordy = small._replace(id="wordy", question="7" * 200)
    config = dataclasses.replace(scripted_model.CONFIG, max_tokens=200)
    with pytest.raises(PromptError, match=r"wordy: a prompt of \d+ tokens .*config.rl.rollout.max_tokens says"):
        worked_out([wordy], config=config)


PLACES = {"model": "m", "data": "d", "out": "o"}
TRACES = {"trace_tokens": 512, "trace_frames": 3, "trace_patches": 64}
PROMPTS = {"image_buffer": (1, 64, 64), "prompt_width": 128}


def test_shapes_by_hand_are_whole_or_not_there():
    assert load(TrainConfig, PLACES).trace_shapes is None and load(TrainConfig, PLACES).prompt_shapes is None
    config = load(TrainConfig, {**PLACES, **TRACES, "buckets": (4, 256), "video_frames": 16, "video_patches": 32})
    assert config.trace_shapes[0] == BatchShape(4, 3, 3, 32) and config.trace_shapes[-1] == BatchShape(512, 16, 16, 32)
    still, video = load(TrainConfig, {**PLACES, **PROMPTS, "rl": {"iterations": 1}}).prompt_shapes
    assert (still.video, video.video, still.tokens, video.height) == (False, True, 128, 64)
    for whole in (TRACES, PROMPTS):
        for names in itertools.combinations(whole, len(whole) - 1):
            with pytest.raises(ConfigError, match=f"{', '.join(whole)} come together"):
                load(TrainConfig, {**PLACES, **{name: whole[name] for name in names}})
    for lonely, needed in (("video_patches", "video_frames"), ("video_prompt_width", "video_buffer")):
        with pytest.raises(ConfigError, match=f"{needed}, {lonely} come together"):
            load(TrainConfig, {**PLACES, lonely: 3})
    with pytest.raises(ConfigError, match="video_frames needs trace_tokens"):
        load(TrainConfig, {**PLACES, "video_frames": 3, "video_patches": 3})
    with pytest.raises(ConfigError, match=r"buckets \(3,\) need trace_tokens"):
        load(TrainConfig, {**PLACES, "buckets": (3,)})


def test_the_work_of_a_row_is_that_of_its_room():
    """Twice the pictures are twice the patches; a row is dearer in every side that grows."""
    shape = BatchShape(512, 2, 2, 256)
    for side in ("tokens", "slices", "patches"):
        assert WORK(shape._replace(**{side: 2 * getattr(shape, side)})) > WORK(shape)
    assert np.isclose(
        WORK(shape._replace(slices=4)) - WORK(shape), WORK(shape._replace(slices=6)) - WORK(shape._replace(slices=4))
    )
