"""Tools that make pictures, one of what another made: in the rollout, in written traces and made again, the bits of Pillow."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from pixel_jax.data.traces import Trace, right, to_trajectories
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.ops import host_crop_resize
from pixel_jax.parallel import make_mesh, shard
from pixel_jax.rollouts.materialize import materialize_on_host
from pixel_jax.rollouts.prompts import build_prompts, tables
from pixel_jax.rollouts.rollout import host_rollout, rollout
from pixel_jax.rollouts.shapes import BatchShape
from pixel_jax.rollouts.trajectory import STOP_CALLS, CallStatus, take_prompts, to_host
from pixel_jax.tools import CROP_IMAGE, ENHANCE, ROTATE
from pixel_jax.training.batch import from_trajectories
from pixel_jax.training.steps import ForwardConfig, make_score_step
from tests.rollouts import scripted_model

TOOLS = (CROP_IMAGE, ROTATE, ENHANCE)
CONFIG = dataclasses.replace(scripted_model.CONFIG, max_new_tokens=4, max_calls=4, max_response=400, group_size=6)
CALL = '<tool_call>\n{"name": "%s", "arguments": {%s}}\n</tool_call>'
TURN = CALL % ("rotate", '"by": "90", "target_image": 1')
CROP = CALL % ("crop_image_normalized", '"bbox_2d": [0.1, 0.2, 0.9, 0.7], "target_image": 2')
FLIP = CALL % ("rotate", '"by": "flip", "target_image": 3')
BRIGHT = CALL % ("enhance", '"quality": "contrast", "factor": 1.75, "target_image": 2')
NONE = CALL % ("rotate", '"by": "45", "target_image": 1')
FAR = CALL % ("rotate", '"by": "180", "target_image": 9')
START, ANSWER = "assistant\n", "\\boxed{7}"
# Rotate, crop or enhance what came second, flip what came third; or wrong, or out of range.
AFTER = {TURN: 0.55, NONE: 0.15, FAR: 0.1, CROP: 0.1, ANSWER: 0.1}
CHAIN = {
    START: AFTER | {CROP: 0.5, FLIP: 0.5, BRIGHT: 0.7},
    **{x: {scripted_model.END: 1.0} for x in (*AFTER, FLIP, BRIGHT)},
}


@functools.cache
def words() -> Vocabulary:
    return scripted_model.vocabulary_of(CHAIN, TOOLS)


@pytest.fixture(scope="module")
def made():
    model, token_tables = scripted_model.network(words(), CHAIN), tables(words(), TOOLS)
    prompts = build_prompts(
        scripted_model.queries(3), words(), token_tables, CONFIG, shape=scripted_model.shape(CONFIG)
    )
    return model, token_tables, prompts, to_host(rollout(model, prompts, jax.random.key(1), CONFIG))


@pytest.fixture(scope="module")
def pixels(made):
    """The rows with what they saw."""
    *_, prompts, t = made
    return scripted_model.with_pixels(t, prompts, CONFIG)


def expected(query, t, row) -> list[np.ndarray]:
    """What Pillow makes of the row's calls, in order; only of those that were carried out."""
    pictures, found = list(query.images), []
    for call in np.flatnonzero(t.calls.status[row] == CallStatus.DONE):
        tool, source = TOOLS[t.calls.tool[row, call]], t.calls.source
        # Which picture was asked for is what the text says; the region is tested where crops are.
        target = {CROP_IMAGE: 2, ROTATE: 1, ENHANCE: 2}[tool]
        by = int(t.calls.values.units[row, call, 0])
        target = 3 if tool == ROTATE and by == 4 else target
        image = Image.fromarray(pictures[target - 1])
        if tool == ROTATE:
            image = image.transpose({0: Image.Transpose.ROTATE_270, 4: Image.Transpose.FLIP_TOP_BOTTOM}[by])
        elif tool == ENHANCE:
            image = ImageEnhance.Contrast(image).enhance(1.75)
        else:
            image = image.crop([round(x * side) for x, side in zip((0.1, 0.2, 0.9, 0.7), image.size * 2, strict=True)])
        pictures.append(np.asarray(image))
        size = source.size[row, call, 0]
        found.append(host_crop_resize(pictures[-1], (0, 0, *image.size), tuple(size.tolist())))
    return found


def patches(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    grid = image.reshape(height // 28, 2, 14, width // 28, 2, 14, 3)
    return grid.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 588)


def test_what_is_shown_is_pillows(made, pixels):
    *_, prompts, t = made
    queries, seen_tools, longest = scripted_model.queries(3), set(), 0
    first = prompts.shape.images
    for row in range(len(t.stop)):
        query = queries[t.prompt[row]]
        if len(query.images) > 1:
            continue
        done = np.flatnonzero(t.calls.status[row] == CallStatus.DONE)
        for call, image in zip(done, expected(query, t, row), strict=True):
            shown = patches(image)
            np.testing.assert_array_equal(pixels.visual.patches[row, first + call][: len(shown)], shown)
            seen_tools.add(int(t.calls.tool[row, call]))
        longest = max(longest, len(done))
    assert seen_tools == {0, 1, 2} and longest >= 3, (seen_tools, longest)


def test_the_host_makes_the_same_pixels(made, pixels):
    *_, prompts, t = made
    found = materialize_on_host(t, np.repeat(prompts.images, CONFIG.group_size), TOOLS, CONFIG).visual.patches
    room = found.shape[2]
    np.testing.assert_array_equal(found, pixels.visual.patches[:, :, :room])
    assert not pixels.visual.patches[:, :, room:].any()


def test_sampler_and_trainer_agree(made, pixels):
    """What is made again is what the sampler saw: its log-probabilities are those that the pixels lead to."""
    model, *_, t = made
    scored, _ = make_score_step(ForwardConfig(remat=False))(model, from_trajectories(pixels))
    np.testing.assert_allclose(np.asarray(scored)[t.loss_mask], t.logprobs[t.loss_mask], atol=2e-5)


def test_calls_that_cannot_be_carried_out_are_answered(made):
    outcomes = set(scripted_model.outcomes(made[-1], TOOLS).ravel())
    assert {"malformed", "rotate: no such image", "rotate: shown", "enhance: shown"} <= outcomes


def test_written_traces_are_the_rollouts(made, pixels):
    """The same turns, written: the same tokens, records and pixels."""
    _, token_tables, prompts, t = made
    rows = [row for row in range(len(t.stop)) if t.num_calls[row]][:6]
    queries, traces = scripted_model.queries(3), []
    for row in rows:
        ids, chosen = t.tokens[row][t.valid[row]], t.loss_mask[row][t.valid[row]]
        runs = np.split(ids, np.flatnonzero(np.diff(chosen)) + 1)[1::2]
        turns = [words().to_bytes(run).decode().removesuffix(scripted_model.END) for run in runs]
        traces.append(Trace(queries[t.prompt[row]], tuple(map(right, turns)), "7"))
    written = to_trajectories(traces, words(), token_tables, CONFIG, BatchShape(700, 8, 8, 16))
    for mine, row in enumerate(rows):
        np.testing.assert_array_equal(written.tokens[mine][written.valid[mine]], t.tokens[row][t.valid[row]])
        count = int(written.num_calls[mine])
        here, there = (jax.tree.map(lambda x, at=at: x[at, :count], t.calls) for t, at in ((written, mine), (t, row)))  # noqa: B023
        jax.tree.map(np.testing.assert_array_equal, here, there)
        frames = lambda t, row: [t.visual.patches[row, i] for i in t.visual.slices[row, :, 0] if i >= 0]
        for x, y in zip(frames(written, mine), frames(pixels, row), strict=True):
            np.testing.assert_array_equal(x[:16], y[:16])


@pytest.mark.slow
def test_however_it_is_run(made):
    """Step by step from the host, and from a queue."""
    model, _, prompts, t = made
    key, queued = jax.random.key(1), dataclasses.replace(CONFIG, in_flight=1)
    for again in (host_rollout(model, prompts, key, CONFIG), rollout(model, prompts, key, queued)):
        jax.tree.map(np.testing.assert_array_equal, to_host(again)._replace(logprobs=None), t._replace(logprobs=None))


@pytest.mark.slow
def test_on_eight_devices(made, pixels):
    """Rows of several shards, each with its own calls; and what they saw made again there."""
    model, _, prompts, t = made
    mesh, order = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), np.array([2, 0, 1, 0])
    four = take_prompts(prompts, order)
    found = to_host(rollout(shard(model, mesh), four, jax.random.key(1), CONFIG))
    rows = (order[:, None] * CONFIG.group_size + np.arange(CONFIG.group_size)).reshape(-1)
    same = lambda x, y: np.testing.assert_array_equal(x, y[rows])
    jax.tree.map(same, found._replace(logprobs=None, prompt=None), t._replace(logprobs=None, prompt=None))
    same(scripted_model.with_pixels(found, four, CONFIG, mesh).visual.patches, pixels.visual.patches)


@pytest.mark.slow
def test_where_no_call_is_left_nothing_is_drawn(made):
    """As an evaluation without operations asks: whoever calls is at the end of its row, and has seen its prompt alone."""
    model, _, prompts, _ = made
    config = dataclasses.replace(CONFIG, max_calls=0)
    t = to_host(rollout(model, prompts, jax.random.key(1), config))
    assert (t.calls.status != CallStatus.DONE).all() and (t.num_calls > 0).any()
    assert (t.stop[t.num_calls > 0] == STOP_CALLS).all()
    seen = scripted_model.with_pixels(t, prompts, config).visual
    assert seen.patches.shape[1] == prompts.shape.images and seen.patches.any(axis=(1, 2, 3)).all()
