"""Pictures that tools of the host return: shown, worked on by other tools, kept once, and seen again in training."""

import dataclasses
import hashlib

import jax
import numpy as np
import pytest

from pixel_jax.evaluation.transcript import make_transcript
from pixel_jax.ops import host_crop_resize
from pixel_jax.parallel import make_mesh, shard
from pixel_jax.rollouts.materialize import materialize
from pixel_jax.rollouts.prompts import build_prompts, tables
from pixel_jax.rollouts.rollout import HostRollouts, static_shape
from pixel_jax.rollouts.shapes import prompt_shape
from pixel_jax.rollouts.timing import operations_again
from pixel_jax.rollouts.trajectory import STOP_IMAGES, STOP_REASONS, CallStatus, made_by, take_prompts, to_host
from pixel_jax.rollouts.views import GREY
from pixel_jax.tools import CROP_IMAGE, ROTATE, Integer, Text, Tool, ToolError
from pixel_jax.tools.host import ToolReply
from pixel_jax.tools.tool import ANSWERED
from pixel_jax.training.batch import Rows, from_trajectories, take
from pixel_jax.training.replay import pack, unpack
from pixel_jax.training.steps import ForwardConfig, make_score_step
from tests.rollouts import scripted_model
from tests.tools.test_chains import patches

SCAN = Tool(
    "scan",
    "Scans.",
    (Text("how"), Integer("image", default=1)),
    execute=lambda images, how, image: "",
    host=True,
    picture=True,
)
TOOLS = (CROP_IMAGE, ROTATE, SCAN)
CONFIG = dataclasses.replace(scripted_model.CONFIG, max_new_tokens=4, max_calls=4, max_response=480, group_size=8)
CALL = '<tool_call>\n{"name": "%s", "arguments": {%s}}\n</tool_call>'
NEW, PLAIN, FLAT = (CALL % ("scan", f'"how": "{x}"') for x in ("new", "plain", "flat"))
AGAIN = CALL % ("scan", '"how": "again", "image": 2')
TURN = CALL % ("rotate", '"by": "90", "target_image": 2')
CROP = CALL % ("crop_image_normalized", '"bbox_2d": [0.1, 0.2, 0.9, 0.7], "target_image": 2')
LAST = CALL % ("rotate", '"by": "flip", "target_image": 3')
END = "\\boxed{7}"
AFTER = {NEW: 0.3, PLAIN: 0.1, FLAT: 0.1, TURN: 0.15, CROP: 0.1, LAST: 0.1, AGAIN: 0.1, END: 0.05}
CHAIN = {scripted_model.START: AFTER, **{text: {scripted_model.END: 1.0} for text in AFTER}}


def painted(image: np.ndarray) -> np.ndarray:
    """Larger than any picture of a prompt, and of another shape."""
    return np.repeat(255 - image, 2, axis=0)


class Scanner:
    """In the place of workers."""

    def __init__(self):
        self.asked = []

    def call(self, requests):
        self.asked += requests
        return [self.reply(request.images, **request.arguments) for request in requests]

    def reply(self, images, how, image):
        if how == "plain":
            return ToolReply(ANSWERED, "Nothing to be seen.")
        if how == "flat":
            return ToolReply(ANSWERED, "", np.zeros((2, 900, 3), np.uint8))
        return ToolReply(ANSWERED, "Scanned.", painted(images[0]) if how == "new" else images[-1][::-1])

    def facts(self):
        return {}


def asked(words, token_tables, config=CONFIG):
    queries = [query for query in scripted_model.queries(3) if len(query.images) == 1]
    return queries, build_prompts(
        queries, words, token_tables, config, shape=prompt_shape(1, 192, 192, 96, config, video=False)
    )


@pytest.fixture(scope="module")
def made():
    words = scripted_model.vocabulary_of(CHAIN, TOOLS)
    model, token_tables, host = scripted_model.network(words, CHAIN), tables(words, TOOLS), Scanner()
    queries, prompts = asked(words, token_tables)
    t = to_host(HostRollouts(host, words)(model, prompts, jax.random.key(4), CONFIG))
    return words, model, queries, prompts, host, t


@pytest.fixture(scope="module")
def pixels(made):
    """The rows with what they saw."""
    *_, prompts, _, t = made
    return scripted_model.with_pixels(t, prompts, CONFIG)


def pictures_of_row(query, t, row) -> dict[int, np.ndarray]:
    """Of each call that showed something the picture, as NumPy makes it: by what was asked for, from the record."""
    history, found = [query.images[0]], {}
    for call in np.flatnonzero(t.calls.source.image[row, :, 0] != -1):
        tool, units = TOOLS[t.calls.tool[row, call]], t.calls.values.units[row, call]
        if tool == SCAN:
            # What is written as a text is not on record; the number is.
            made = history[-1][::-1] if units[0] == 2 else painted(history[0])
        elif tool == ROTATE:
            made = np.rot90(history[1], -1) if units[0] == 0 else history[2][::-1]
        else:
            height, width = history[1].shape[:2]
            x1, y1, x2, y2 = (
                round(x * side) for x, side in zip((0.1, 0.2, 0.9, 0.7), (width, height) * 2, strict=True)
            )
            made = history[1][y1:y2, x1:x2]
        history.append(made)
        found[int(call)] = made
    return found


def test_what_is_shown_and_made_of_it(made, pixels):
    *_, queries, prompts, host, t = made
    kinds = set()
    for row in range(len(t.stop)):
        for call, picture in pictures_of_row(queries[t.prompt[row]], t, row).items():
            size = tuple(t.calls.source.size[row, call, 0].tolist())
            shown = patches(host_crop_resize(picture, (0, 0, picture.shape[1], picture.shape[0]), size))
            np.testing.assert_array_equal(pixels.visual.patches[row, 1 + call][: len(shown)], shown)
            source = int(t.calls.source.image[row, call, 0])
            kinds.add((TOOLS[t.calls.tool[row, call]].name, "prompt" if source >= 0 else "made"))
    assert kinds >= {("scan", "made"), ("rotate", "made"), ("crop_image_normalized", "made")}, kinds
    outcomes = set(scripted_model.outcomes(t, TOOLS).ravel())
    assert {"scan: answered", "rotate: shown", "crop_image_normalized: shown"} <= outcomes, outcomes


def test_kept_once_and_on_record_by_its_digest(made):
    *_, queries, prompts, host, t = made
    scans = scripted_model.outcomes(t, TOOLS) == "scan: answered"
    returned = scans & (t.calls.drawn[..., 0] > 0)
    assert returned.any() and (scans & ~returned).any()
    assert not t.calls.picture[~returned].any()
    for row, call in np.argwhere(returned):
        kept = prompts.images[t.prompt[row]].find(t.calls.picture[row, call])
        head = np.array(kept.shape, np.int32).tobytes()
        assert t.calls.picture[row, call].tobytes() == hashlib.sha256(head + kept.tobytes()).digest()
        assert t.calls.source.image[row, call].tolist() == [made_by(call)]
        assert t.calls.status[row, call] == CallStatus.DONE and t.calls.drawn[row, call].tolist() == [*kept.shape[:2]]
    for prompt, query in enumerate(queries):  # every row of a prompt that asked was given the same
        same = [x for x in prompts.images[prompt].returned.values() if np.array_equal(x, painted(query.images[0]))]
        assert len(same) == 1


def test_the_host_sees_it_in_later_calls(made):
    *_, queries, _, host, _ = made
    later = [request for request in host.asked if len(request.images) > 1]
    assert any(np.array_equal(request.images[1], painted(request.images[0])) for request in later)


def test_rows_read_text_and_picture(made, pixels):
    words, _, queries, _, _, t = made
    row, call = np.argwhere((scripted_model.outcomes(t, TOOLS) == "scan: answered") & (t.calls.drawn[..., 0] > 0))[0]
    text = words.to_bytes(t.tokens[row][t.valid[row]]).decode()
    height, width = t.calls.source.size[row, call, 0]
    shown = "<|vision_start|>" + "<|image_pad|>" * int(height * width // 28**2) + "<|vision_end|>"
    assert f"\n<|im_start|>user\n\nScanned.{shown}<|im_end|>\n<|im_start|>assistant\n" in text
    drawn = make_transcript(pixels, int(row), queries[t.prompt[row]], words)
    assert any(turn.text == "Scanned." and len(turn.pictures) == 1 for turn in drawn.turns)
    row, _ = np.argwhere((scripted_model.outcomes(t, TOOLS) == "scan: failed") & (t.calls.status == CallStatus.FAILED))[
        0
    ]
    assert "its picture of 900x2 pixels cannot be shown" in words.to_bytes(t.tokens[row][t.valid[row]]).decode()


def test_trained_on_bit_for_bit(made, pixels):
    """From the record and the digests: also after the replay was saved and read again; and the trainer agrees."""
    _, model, _, prompts, _, t = made
    scored, _ = make_score_step(ForwardConfig(remat=False))(model, from_trajectories(pixels))
    np.testing.assert_allclose(np.asarray(scored)[t.loss_mask], t.logprobs[t.loss_mask], atol=2e-5)
    shape = static_shape(prompts, CONFIG, None)
    rows = Rows(from_trajectories(t), np.repeat(prompts.images, CONFIG.group_size))
    some = {i: take(rows, i) for i in (1, 4, 9)}
    back = [x for _, x in sorted(unpack(pack(some)).items())]
    batch, images = jax.tree.map(lambda *xs: np.stack(xs), *back)
    again = materialize(batch.visual, images, shape, CONFIG)
    np.testing.assert_array_equal(again.patches, pixels.visual.patches[[1, 4, 9]])


def test_operations_are_timed_with_it(made, pixels):
    _, model, _, prompts, _, t = made
    _, *views = operations_again(model, prompts, t.calls, CONFIG)
    for number, (shown, _) in enumerate(views):
        np.testing.assert_array_equal(np.asarray(shown)[:, 0], pixels.visual.patches[:, 1 + number])


@pytest.mark.slow
def test_a_picture_too_many_ends_the_row(made):
    words, model, *_ = made
    config = dataclasses.replace(CONFIG, max_images=1)
    _, prompts = asked(words, tables(words, TOOLS), config)
    t = to_host(HostRollouts(Scanner(), words)(model, prompts, jax.random.key(4), config))
    assert "too many images" in {STOP_REASONS[x] for x in t.stop}
    for row in np.flatnonzero(t.stop == STOP_IMAGES):
        last = int(t.num_calls[row]) - 1
        assert t.calls.status[row, last] == CallStatus.SPENT and not t.calls.drawn[row, last].any()
    assert not t.calls.drawn.any()


@pytest.mark.slow
def test_blanked_it_is_grey(made):
    words, model, *_ = made
    config = dataclasses.replace(CONFIG, blank=True)
    _, prompts = asked(words, tables(words, TOOLS), config)
    t = to_host(HostRollouts(Scanner(), words)(model, prompts, jax.random.key(4), config))
    returned, found = np.argwhere(t.calls.drawn[..., 0] > 0), scripted_model.with_pixels(t, prompts, config)
    for row, call in returned:
        height, width = t.calls.source.size[row, call, 0]
        assert (found.visual.patches[row, 1 + call][: height * width // 196] == GREY).all()
    assert len(returned)


def test_a_tool_of_the_device_returns_none():
    with pytest.raises(ToolError, match="'scan' runs on the device: only host tools have `picture`"):
        dataclasses.replace(SCAN, host=False, arguments=(), outcomes=())


@pytest.mark.slow
def test_on_eight_devices(made, pixels):
    words, model, _, prompts, _, t = made
    mesh, order = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), np.array([1, 0, 1, 0])
    four = take_prompts(prompts, order)
    found = to_host(HostRollouts(Scanner(), words)(shard(model, mesh), four, jax.random.key(4), CONFIG))
    rows = (order[:, None] * CONFIG.group_size + np.arange(CONFIG.group_size)).reshape(-1)
    same = lambda x, y: np.testing.assert_array_equal(x, y[rows])
    jax.tree.map(same, found._replace(logprobs=None, prompt=None), t._replace(logprobs=None, prompt=None))
    same(scripted_model.with_pixels(found, four, CONFIG, mesh).visual.patches, pixels.visual.patches)
