"""The rollout as a whole: one program, the same tokens however it is run, and trajectories that say what happened."""

import re
import types

import jax
import numpy as np
import pytest
from PIL import Image

from pixel_jax.dialog.grammar import parse_turn
from pixel_jax.models import LanguageModel
from pixel_jax.ops import smart_resize
from pixel_jax.parallel import make_mesh, shard
from pixel_jax.parallel.sharding import batch_sharding
from pixel_jax.rollouts import decode_loop, timing, trajectory, views
from pixel_jax.rollouts.materialize import materialize, materialize_on_host
from pixel_jax.rollouts.prompts import PromptError, Query, build_prompts
from pixel_jax.rollouts.rollout import compiled_rollout, layout, put_prompts, rollout, static_shape, traced_settings
from pixel_jax.rollouts.trajectory import CallStatus, take_prompts
from pixel_jax.training.batch import from_trajectories
from pixel_jax.training.steps import ForwardConfig, make_score_step
from tests.rollouts import scripted_model

KEY = jax.random.key(7)
FORBIDDEN = re.compile(r"callback|infeed|outfeed|\bsend\b|\brecv\b|host_compute|custom-call.*(python|Callback)", re.I)


def slow(*values):
    """Further values of a test that one value of it in the fast suite stands for."""
    return pytest.param(*values, marks=pytest.mark.slow)


def replace(config, **fields):
    import dataclasses

    return dataclasses.replace(config, **fields)


@pytest.fixture(scope="module")
def trajectories():
    return trajectory.to_host(rollout(scripted_model.model(), scripted_model.prompts(4), KEY, scripted_model.CONFIG))


@pytest.fixture(scope="module")
def mixed():
    """Images and videos in one batch."""
    return trajectory.to_host(
        rollout(scripted_model.model(), scripted_model.prompts(4, video=True), KEY, scripted_model.CONFIG)
    )


def response(t, row):
    """Text after the prompt, and each of its turns by who wrote it: [(chosen, text), ...]."""
    words = scripted_model.vocabulary()
    spans, chosen = [], None
    for token, mine, valid in zip(t.tokens[row], t.loss_mask[row], t.valid[row], strict=True):
        if not valid:
            continue
        if mine != chosen:
            spans.append((bool(mine), []))
            chosen = mine
        spans[-1][1].append(int(token))
    return [(mine, words.to_bytes(ids).decode()) for mine, ids in spans]


def test_rows_differ_and_everything_happens(trajectories):
    stops = set(trajectories.stop.tolist())
    assert trajectory.STOP_ANSWER in stops
    assert len(set(trajectories.num_calls.tolist())) >= 3
    seen = set(scripted_model.outcomes(trajectories).ravel())
    missing = "crop_image_normalized: no such image"
    assert {scripted_model.CROPPED, scripted_model.MALFORMED, "select_frames: no video", missing} <= seen


@pytest.mark.parametrize("which", ["trajectories", "mixed"])
def test_the_conversation_is_what_the_host_would_have_said(which, request):
    """Turn by turn: the calls are those the host parser reads, the observations follow them, the images fit."""
    t = request.getfixturevalue(which)
    for row in range(t.tokens.shape[0]):
        spans = response(t, row)
        assert not spans[0][0]  # the prompt
        turns = [text for mine, text in spans if mine]
        shown = [text for mine, text in spans[1:] if not mine]
        calls = [parse_turn(text) for text in turns]
        assert sum(turn.required for turn in calls) == t.num_calls[row]
        assert len(shown) in (len(turns), len(turns) - 1)
        for i, text in enumerate(shown):
            assert text.startswith("\n<|im_start|>user\n\n")
            assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
            outcome = scripted_model.outcomes(t)[row, i]
            assert ("Here is the cropped image" in text) == (outcome == scripted_model.CROPPED)
            assert ("Here are the selected frames" in text) == (outcome == scripted_model.SELECTED)
            assert (calls[i].call is None) <= (outcome == scripted_model.MALFORMED)
        # Every visual token belongs to an image or video the row was shown, and none is missing.
        tokens = t.tokens[row][t.valid[row]]
        pads = np.isin(tokens, [scripted_model.vocabulary().image_pad, scripted_model.vocabulary().video_pad]).sum()
        assert pads == (t.visual.grids[row].prod(axis=1) // 4).sum()


def test_crops_are_pillows(trajectories):
    """What the model saw of a box is what Pillow makes of it."""
    prompts, checked = scripted_model.prompts(4), 0
    queries, trajectories = scripted_model.queries(4), scripted_model.with_pixels(trajectories, prompts)
    for row in range(trajectories.tokens.shape[0]):
        first = prompts.shape.images
        query = queries[trajectories.prompt[row]]
        source = trajectories.calls.source
        for i in np.flatnonzero(scripted_model.outcomes(trajectories)[row] == scripted_model.CROPPED):
            x1, y1, x2, y2 = source.region[row, i, 0].tolist()
            size = smart_resize(y2 - y1, x2 - x1, min_pixels=784, max_pixels=4 * 784)
            picture = Image.fromarray(query.images[source.image[row, i, 0]]).crop((x1, y1, x2, y2))
            # One pass a call: the order of Pillow 12 under every release.
            across = picture.resize((size[1], picture.height), Image.Resampling.BICUBIC)
            expected = np.asarray(across.resize(size[::-1], Image.Resampling.BICUBIC))
            expected = expected.reshape(size[0] // 28, 2, 14, size[1] // 28, 2, 14, 3).transpose(0, 3, 1, 4, 6, 2, 5)
            expected = expected.reshape(-1, 588)
            patches = trajectories.visual.patches[row, first + i]
            np.testing.assert_array_equal(patches[: len(expected)], expected)
            assert not patches[len(expected) :].any()
            assert trajectories.visual.grids[row, first + i].tolist() == [1, size[0] // 14, size[1] // 14]
            checked += 1
    assert checked >= 3


def test_sampler_and_trainer_agree(mixed):
    """Log-probabilities recorded while sampling with caches are those of one full forward over the trajectory."""
    rows = from_trajectories(scripted_model.with_pixels(mixed, scripted_model.prompts(4, video=True)))
    scored, _ = make_score_step(ForwardConfig(remat=False))(scripted_model.model(), rows)
    np.testing.assert_allclose(np.asarray(scored)[mixed.loss_mask], mixed.logprobs[mixed.loss_mask], atol=2e-5)
    assert mixed.loss_mask.sum() > 40


def same_tokens(a, b, rows_a=slice(None), rows_b=slice(None)):
    for name in ("tokens", "valid", "loss_mask", "num_calls", "stop"):
        np.testing.assert_array_equal(np.asarray(getattr(a, name))[rows_a], np.asarray(getattr(b, name))[rows_b], name)
    same = lambda x, y: np.testing.assert_array_equal(np.asarray(x)[rows_a], np.asarray(y)[rows_b])
    jax.tree.map(same, (a.calls, a.visual), (b.calls, b.visual))
    np.testing.assert_allclose(np.asarray(a.logprobs)[rows_a], np.asarray(b.logprobs)[rows_b], atol=2e-5)


@pytest.mark.parametrize("in_flight, tail_rows", [slow(1, None), slow(3, None), slow(None, 3), (3, 5)])
def test_how_rows_are_scheduled_does_not_matter(mixed, in_flight, tail_rows):
    """Prompts in a queue, of slots that are given away while others of their group still write; the last rows of a phase that
    end their turns by themselves: the rows stay the same."""
    config = replace(scripted_model.CONFIG, in_flight=in_flight, tail_rows=tail_rows)
    refilled = trajectory.to_host(rollout(scripted_model.model(), scripted_model.prompts(4, video=True), KEY, config))
    same_tokens(refilled, mixed)
    np.testing.assert_array_equal(refilled.prompt, mixed.prompt)


def test_a_row_does_not_depend_on_its_neighbours(trajectories):
    """Prompts 2 and 0 alone, in the other order, under their own keys."""
    alone = rollout(scripted_model.model(), take_prompts(scripted_model.prompts(4), [2, 0]), KEY, scripted_model.CONFIG)
    same_tokens(alone, trajectories, slice(0, 4), slice(8, 12))
    same_tokens(alone, trajectories, slice(4, 8), slice(0, 4))


@pytest.mark.parametrize("tail_rows", [None, slow(2)])
def test_eight_devices_give_the_same_tokens(trajectories, tail_rows):
    """Four shards of rows with different numbers of turns, each with a queue; weights split over fsdp and tensor."""
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    twice, config = (
        take_prompts(scripted_model.prompts(4), [*range(4)] * 2),
        replace(scripted_model.CONFIG, in_flight=4, tail_rows=tail_rows),
    )
    sharded = rollout(shard(scripted_model.model(), mesh), twice, KEY, config)
    assert len(sharded.tokens.sharding.device_set) == 8
    turns = trajectories.num_calls.reshape(4, -1).max(axis=1)
    assert len(set(turns.tolist())) > 1, "the shards must need different numbers of turns"
    for rows in (slice(0, 16), slice(16, 32)):
        same_tokens(sharded, trajectories, rows)
    with pytest.raises(ValueError, match="in_flight 3 prompts cannot be split"):
        rollout(shard(scripted_model.model(), mesh), twice, KEY, replace(config, in_flight=3))


def lowered(model, prompts, config, key=KEY):
    mesh, shape = layout(model, prompts, config)
    return compiled_rollout.lower(
        model, put_prompts(prompts, mesh), key, *traced_settings(config, ()), shape=shape, mesh=mesh
    )


def test_a_tail_of_rows_keeps_the_kind_of_its_keys():
    lowered(
        scripted_model.model(),
        scripted_model.prompts(1),
        replace(scripted_model.CONFIG, tail_rows=2),
        jax.random.key(7, impl="rbg"),
    )


@pytest.mark.slow
def test_keys_and_values_stay_with_their_heads():
    """Split over `tensor`, no device is sent a cache that it would then hold whole."""
    config = scripted_model.model().config
    text = replace(config.text, num_attention_heads=8, num_key_value_heads=4, mrope_section=(4, 8, 8))
    model = shard(LanguageModel(replace(config, text=text), KEY), make_mesh({"data": 4, "tensor": 2}))
    program = lowered(model, scripted_model.prompts(4), scripted_model.CONFIG).compile().as_text()
    found = set(re.findall(r"= \w+\[([\d,]+)\]", program))
    cache = f"{scripted_model.CONFIG.max_response},{text.head_dim}"
    assert f"4,2,{cache}" in found and f"4,4,{cache}" not in found  # a device's rows, with half of the heads


def test_one_program_without_the_host(monkeypatch):
    """The compiled module talks to nobody. Put a callback into a step and this very test finds it."""
    given = scripted_model.model(), scripted_model.prompts(2), scripted_model.CONFIG
    clean = lowered(*given)
    for text in (clean.as_text(), clean.compile().as_text()):
        assert not FORBIDDEN.search(text)

    honest = decode_loop.sample

    def calls_home(logits, *args, **kwargs):
        logits = jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(logits.shape, logits.dtype), logits)
        return honest(logits, *args, **kwargs)

    monkeypatch.setattr(decode_loop, "sample", calls_home)
    compiled_rollout.clear_cache()
    dirty = lowered(*given)
    assert FORBIDDEN.search(dirty.as_text()) and FORBIDDEN.search(dirty.compile().as_text())
    compiled_rollout.clear_cache()


def test_one_compilation_for_all_image_sizes(trajectories):
    before = compiled_rollout._cache_size()
    model, prompts = scripted_model.model(), scripted_model.prompts(4)
    rollout(model, prompts, KEY, scripted_model.CONFIG)
    size = compiled_rollout._cache_size()
    queries = [Query("Which digit?", [scripted_model.image(i, 60 + 31 * i, 190 - 17 * i)]) for i in range(4)]
    other = build_prompts(
        queries,
        scripted_model.vocabulary(),
        scripted_model.token_tables(),
        scripted_model.CONFIG,
        shape=scripted_model.shape(),
    )
    rollout(model, other, jax.random.key(8), scripted_model.CONFIG)
    assert compiled_rollout._cache_size() == size <= before + 1


def test_limits_end_rows():
    """Calls past the limit are counted and not executed; a full buffer or a long turn ends the row and says so."""
    model, prompts = scripted_model.model(), scripted_model.prompts(4)
    few = trajectory.to_host(rollout(model, prompts, KEY, replace(scripted_model.CONFIG, max_calls=1, max_images=1)))
    spent = few.stop == trajectory.STOP_CALLS
    assert spent.any() and (few.num_calls[spent] == 2).all() and (few.calls.status[spent, 1] == CallStatus.SPENT).all()
    full = few.stop == trajectory.STOP_IMAGES
    assert full.any()
    for row in np.flatnonzero(full):  # the last message is taken back
        assert [mine for mine, _ in response(few, row)] == [False]
    # A crop takes nine tokens to ask for, an answer two.
    config = replace(scripted_model.CONFIG, min_tokens=3, max_new_tokens=8, max_response=20)
    short = trajectory.to_host(rollout(model, prompts, KEY, config))
    long = short.stop == trajectory.STOP_TURN_LENGTH
    assert long.any() and (short.loss_mask.sum(axis=1)[long] >= 8).all()
    assert trajectory.STOP_TOKENS in short.stop
    answered = short.stop == trajectory.STOP_ANSWER
    assert answered.any() and (short.loss_mask.sum(axis=1)[answered] >= 4).all()
    assert (short.valid[:, prompts.tokens.shape[1] :].sum(axis=1) <= 20).all()


def test_an_opening_is_written_for_the_model_and_not_learned():
    words = scripted_model.vocabulary()
    assistant_prefix = words.encode(scripted_model.CROP + "0.05, 0.11, ")
    t = trajectory.to_host(
        rollout(
            scripted_model.model(),
            scripted_model.prompts(2),
            KEY,
            scripted_model.CONFIG,
            assistant_prefix=assistant_prefix,
        )
    )
    width = scripted_model.prompts(2).tokens.shape[1]
    assert (t.tokens[:, width : width + len(assistant_prefix)] == assistant_prefix).all()
    assert (
        not t.loss_mask[:, : width + len(assistant_prefix)].any()
        and t.loss_mask[:, width + len(assistant_prefix)].all()
    )
    assert (t.calls.status[:, 0] != CallStatus.NONE).all()
    assert (scripted_model.outcomes(t)[:, 0] == scripted_model.CROPPED).any()


@pytest.mark.parametrize(
    "query, message",
    [
        (Query("Q", []), "without an image"),
        (Query("Q", [np.zeros((28, 28, 4), np.uint8)]), r"\(28, 28, 4\)"),
        (Query("Q", [np.zeros((28, 28, 3), np.float32)]), "float32"),
        (Query("Q", [np.zeros((30, 40, 3), np.uint8), np.zeros((40, 30, 3), np.uint8)], True), "differ in size"),
        (Query("Q", [np.zeros((28, 28 * 150, 3), np.uint8)]), "4200x28"),
    ],
)
def test_bad_queries_are_named(query, message):
    with pytest.raises(PromptError, match=message):
        build_prompts([query], scripted_model.vocabulary(), scripted_model.token_tables(), scripted_model.CONFIG)


def test_a_prompt_that_does_not_fit_is_named():
    with pytest.raises(PromptError, match="width of 4"):
        room = scripted_model.shape(tokens=4)
        build_prompts(
            scripted_model.queries(1),
            scripted_model.vocabulary(),
            scripted_model.token_tables(),
            scripted_model.CONFIG,
            shape=room,
        )


MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    "which, mesh, at_once",
    [("trajectories", None, True), ("mixed", None, True), ("mixed", MESH, True), ("mixed", MESH, False)],
)
def test_operations_carried_out_again_show_the_same_pixels(which, mesh, at_once, request, monkeypatch):
    """What is timed as operations is what the rollout did; crops made one after another are those made at once."""
    if not at_once:
        monkeypatch.setattr(views, "MAX_VMAP_PIXELS", 0)
        timing._show.clear_cache()
        request.addfinalizer(timing._show.clear_cache)
    model = shard(scripted_model.model(), make_mesh(mesh)) if mesh else scripted_model.model()
    prompts = scripted_model.prompts(4, video=which == "mixed")
    made = scripted_model.with_pixels(request.getfixturevalue(which), prompts)
    none, *again = timing.operations_again(model, prompts, made.calls, scripted_model.CONFIG)
    assert not np.asarray(none[0]).any() and len(again) == scripted_model.CONFIG.max_calls
    rows, count, room = again[0][0].shape[:3]
    shown = made.visual.patches[:, -len(again) * count :].reshape(rows, len(again), count, -1, 588)
    assert not shown[..., room:, :].any()
    executed = made.calls.status == CallStatus.DONE
    assert executed.sum() >= 3
    for number, (patches, features) in enumerate(again):
        np.testing.assert_array_equal(patches, shown[:, number, :, :room])
        assert np.asarray(features)[executed[:, number]].any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("blank", [False, True])
def test_devices_and_the_host_cut_the_same_pixels(blank, mixed):
    """Overviews, crops, frames, blanked ones: on one device, on several, where they are split as the rows, and on none."""
    prompts, config = scripted_model.prompts(4, video=True), replace(scripted_model.CONFIG, blank=blank)
    made = trajectory.to_host(rollout(scripted_model.model(), prompts, KEY, config)) if blank else mixed
    found = scripted_model.with_pixels(made, prompts, config).visual
    images = np.repeat(prompts.images, config.group_size)
    on_host = materialize_on_host(made, images, prompts.tables.tools, config).visual
    room = on_host.patches.shape[2]
    np.testing.assert_array_equal(on_host.patches, found.patches[:, :, :room])
    assert not found.patches[:, :, room:].any()
    jax.tree.map(np.testing.assert_array_equal, on_host._replace(patches=()), found._replace(patches=()))
    observed = np.unique(on_host.patches[:, prompts.shape.images :])
    assert set(observed) == {0, views.GREY} if blank else len(observed) > 200
    mesh = make_mesh(MESH)
    split = materialize(made.visual, images, static_shape(prompts, config, mesh), config, mesh).patches
    np.testing.assert_array_equal(split, found.patches)
    assert split.sharding.is_equivalent_to(batch_sharding(mesh), split.ndim)


def test_the_compiler_is_not_timed(monkeypatch):
    """Work takes the time there is between its end and that of the empty pass before it."""
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(timing.time, "monotonic", lambda: next(clock))
    passes = []

    def again(*arguments):
        for i in range(3):
            passes.append(i)
            yield ()

    monkeypatch.setattr(timing, "operations_again", again)
    rows = trajectory.Trajectories(*[None] * len(trajectory.Trajectories._fields))
    sees = types.SimpleNamespace(config=types.SimpleNamespace(vision=object()))
    assert timing.seconds_of_operations(sees, None, rows, scripted_model.CONFIG) == 2.5 and passes == [0, 1, 2]
