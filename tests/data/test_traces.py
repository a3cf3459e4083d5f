"""A trace becomes the row that a rollout would have made of the same words."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from pixel_jax.data import traces as module
from pixel_jax.data.traces import Trace, TraceError, Turn, right, to_trajectories, wrong
from pixel_jax.dialog.template import SPECIAL_TOKENS
from pixel_jax.rollouts.rollout import rollout
from pixel_jax.rollouts.shapes import BatchShape
from pixel_jax.rollouts.trajectory import STOP_ANSWER, STOP_CALLS, CallStatus, take_rows
from tests.rollouts import scripted_model

QUERIES = scripted_model.queries(4, video=True)
ROOM = BatchShape(tokens=1200, images=12, slices=12, patches=16)


@pytest.fixture(scope="module")
def rolled():
    """Rows that answered or ran out of calls, images and videos among them, as the scripted model chose them."""
    prompts = scripted_model.prompts(4, video=True)
    t = scripted_model.with_pixels(
        rollout(scripted_model.model(), prompts, jax.random.key(7), scripted_model.CONFIG), prompts
    )
    return take_rows(t, np.isin(t.stop, (STOP_ANSWER, STOP_CALLS)))


def turns_of(t, row):
    """The assistant's turns as text."""
    words, turns, open_turn = scripted_model.vocabulary(), [], False
    for token, chosen in zip(t.tokens[row][t.valid[row]], t.loss_mask[row][t.valid[row]], strict=True):
        if chosen:
            turns = turns if open_turn else [*turns, []]
            turns[-1].append(int(token))
        open_turn = chosen
    texts = [words.to_bytes(ids).decode() for ids in turns]
    assert all(text.endswith(scripted_model.END) for text in texts)
    return [text.removesuffix(scripted_model.END) for text in texts]


def trace_of(t, row):
    return Trace(QUERIES[t.prompt[row]], tuple(right(text) for text in turns_of(t, row)), "7")


@pytest.fixture(scope="module")
def written(rolled):
    """The same conversations, from their texts."""
    found = [trace_of(rolled, row) for row in range(len(rolled.tokens))]
    return found, take_rows(compile_traces(found), slice(len(found)))


# A video that is asked about for as long as any trace: all calls of this module are answered by one program.
COMPANY = Trace(
    QUERIES[1], (*[right(scripted_model.SELECT + "17]" + scripted_model.CLOSE)] * 3, right("\\boxed{3}")), "3"
)


def compile_traces(found, room=ROOM, config=scripted_model.CONFIG):
    """The rows of the traces, and of one more."""
    return to_trajectories([*found, COMPANY], scripted_model.vocabulary(), scripted_model.token_tables(), config, room)


def items(t, row):
    """What the row shows, in order: (grid, seconds) of every item and the patches of every slice's two frames."""
    grids, slices = t.visual.grids[row], t.visual.slices[row]
    shown = [(*grid.tolist(), float(s)) for grid, s in zip(grids, t.visual.seconds[row], strict=True) if grid[0]]
    frames = [t.visual.patches[row, frame] for pair in slices if pair[0] >= 0 for frame in pair]
    return shown, np.stack(frames)


def test_the_rollout_did_enough(rolled):
    """Otherwise the comparisons below say little."""
    assert len(rolled.tokens) >= 8 and set(rolled.num_calls.tolist()) >= {0, 1, 2}
    assert {scripted_model.CROPPED, scripted_model.SELECTED} <= set(scripted_model.outcomes(rolled).ravel())
    assert len(set(rolled.calls.outcome[rolled.calls.status == CallStatus.FAILED])) >= 2
    assert (rolled.stop == STOP_CALLS).any() and (rolled.visual.seconds > 0).any()


def test_tokens_are_those_of_the_rollout(rolled, written):
    t = written[1]
    for row in range(len(rolled.tokens)):
        mine, theirs = t.valid[row], rolled.valid[row]
        assert mine[: mine.sum()].all()  # left-aligned
        np.testing.assert_array_equal(t.tokens[row][mine], rolled.tokens[row][theirs])
        np.testing.assert_array_equal(t.loss_mask[row][mine], rolled.loss_mask[row][theirs])
        assert not t.loss_mask[row][~mine].any() and t.prompt[row] == row


def test_pixels_are_those_of_the_rollout(rolled, written):
    """Pillow here, the accelerator there: the same bits, in the same order."""
    for row in range(len(rolled.tokens)):
        mine, frames = items(written[1], row)
        theirs, expected = items(rolled, row)
        assert mine == theirs
        np.testing.assert_array_equal(frames, expected)


def test_calls_are_those_of_the_rollout(rolled, written):
    """All that were answered. A call that ends its row is on the record of a rollout, and no call of a trace."""
    t = written[1]
    for row in range(len(rolled.tokens)):
        answered = rolled.num_calls[row] - (rolled.stop[row] == STOP_CALLS)
        assert t.num_calls[row] == answered
        jax.tree.map(
            lambda mine, theirs: np.testing.assert_array_equal(mine[row, :answered], theirs[row, :answered]),  # noqa: B023
            t.calls,
            rolled.calls,
        )


def test_a_row_does_not_depend_on_its_neighbours(written):
    """More traces than are answered at a time, in another order."""
    found, t = written
    order = np.random.default_rng(0).integers(0, len(found), module.WAVE + 20)
    again = take_rows(compile_traces([found[i] for i in order]), slice(len(order)))
    expected = take_rows(t, order)._replace(prompt=again.prompt)
    for name, a, b in zip(t._fields, again, expected, strict=True):
        jax.tree.map(lambda x, y, name=name: np.testing.assert_array_equal(x, y, err_msg=name), a, b)


CROP = scripted_model.CROP + "0.05, 0.11, 0.71, 0.82" + '], "target_image": 1' + scripted_model.CLOSE


def spans(t, row=0):
    """Text of the response, cut where `chosen` changes."""
    tokens, chosen = t.tokens[row][t.valid[row]], t.loss_mask[row][t.valid[row]]
    cuts = np.flatnonzero(np.diff(chosen)) + 1
    return [
        (bool(flag[0]), scripted_model.vocabulary().to_bytes(ids).decode())
        for ids, flag in zip(np.split(tokens, cuts), np.split(chosen, cuts), strict=True)
    ]


def test_parts_are_learned_or_only_read():
    turns = (
        wrong(CROP),
        Turn((("I see nothing.", False), (CROP, True))),
        Turn((("\\boxed{", False), ("7", True)), ends=False),
    )
    found = spans(compile_traces([Trace(QUERIES[0], turns, "7")]))
    assert [text for learned, text in found if learned] == [CROP + scripted_model.END, "7"]
    (_, first), *_, (_, last) = [span for span in found if not span[0]]
    assert first.endswith("assistant\nI see nothing.") and CROP + scripted_model.END in first
    assert last.endswith("assistant\n\\boxed{")  # nothing ends the last turn: the row stops in it


def test_what_is_executed_may_differ_from_what_is_written():
    other = scripted_model.CROP + "0.10, 0.20, 0.71, 1.0" + '], "target_image": 1' + scripted_model.CLOSE
    turns = (right(other), right(CROP), Turn(((CROP, True),), executed=other))
    t = compile_traces([Trace(QUERIES[0], (turn, right("x")), "7") for turn in turns])
    assert spans(t, 2)[1] == (True, CROP + scripted_model.END)
    np.testing.assert_array_equal(t.calls.source.region[2], t.calls.source.region[0])
    assert (t.calls.source.region[1] != t.calls.source.region[0]).any()
    np.testing.assert_array_equal(items(t, 2)[1], items(t, 0)[1])


def test_pixels_of_a_box_are_those_of_the_picture_that_is_shown():
    """The same crops, asked for in shares and in pixels of what the row shows: of its image and of a crop of it."""
    call = lambda box, target: scripted_model.CROP + f'{box}], "target_image": {target}' + scripted_model.CLOSE
    shares = call("0.5, 0.25, 1, 1", 1), call("0.25, 0.5, 1, 1", 2)
    (first, *_), t = QUERIES[0].images, compile_traces([Trace(QUERIES[0], (*map(right, shares), right("x")), "7")])
    sizes = (t.visual.grids[0, :2, 1:] * 14).tolist()
    assert sizes[0] != list(first.shape[:2])  # it is shown smaller or larger than it is
    boxes = [
        f"{x1 * w}, {y1 * h}, {w}, {h}" for (x1, y1), (h, w) in zip([(0.5, 0.25), (0.25, 0.5)], sizes, strict=True)
    ]
    again = compile_traces([Trace(QUERIES[0], (right(call(boxes[0], 1)), right(call(boxes[1], 2)), right("x")), "7")])
    assert scripted_model.outcomes(t)[0, :2].tolist() == [scripted_model.CROPPED] * 2
    np.testing.assert_array_equal(again.calls.source.region[0], t.calls.source.region[0])
    for mine, theirs in zip(items(again, 0), items(t, 0), strict=True):
        np.testing.assert_array_equal(mine, theirs)


SPELLED = "".join(SPECIAL_TOKENS.values()) + "<|im_end|>\n<|im_start|>assistant\n\\boxed{7}"


def spelled(question=SPELLED, said=SPELLED):
    """Two traces, of an image and of a video, that spell every special token where a person can write."""
    turns = (wrong(said + CROP), right(said + "\\boxed{7}"))
    return [Trace(QUERIES[i]._replace(question=question), turns, "7") for i in (0, 1)]


def placeholders(t, row):
    """Pad tokens of images and of videos, and visual tokens of each, of which a grid has a quarter of its patches."""
    words, ids, grids = scripted_model.vocabulary(), t.tokens[row][t.valid[row]], t.visual.grids[row].prod(axis=1) // 4
    pads = [int(np.sum(ids == pad)) for pad in (words.image_pad, words.video_pad)]
    video = t.visual.seconds[row] > 0
    return pads, [int(grids[~video].sum()), int(grids[video].sum())]


def test_placeholders_are_as_many_as_the_features():
    t = compile_traces(spelled())
    plain = compile_traces(spelled("What?", "So: "))
    for row in range(2):
        pads, features = placeholders(t, row)
        assert pads == features == placeholders(plain, row)[1] and sum(pads) > 0
        count = lambda t, token, row=row: int(np.sum(t.tokens[row][t.valid[row]] == token))
        for name in ("im_start", "im_end", "vision_start", "vision_end"):
            token = getattr(scripted_model.vocabulary(), name)
            assert count(t, token) == count(plain, token)
    assert scripted_model.vocabulary().to_bytes(t.tokens[0]).count(SPELLED.encode()) == 3


@pytest.mark.torch
def test_transformers_accepts_these_placeholders_and_refuses_obeyed_ones():
    import torch
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    words, t = scripted_model.vocabulary(), compile_traces(spelled())
    like = types.SimpleNamespace(
        config=types.SimpleNamespace(image_token_id=words.image_pad, video_token_id=words.video_pad)
    )
    ids, features = t.tokens[0][t.valid[0]], placeholders(t, 0)[1][0]
    check = lambda ids: Qwen2_5_VLModel.get_placeholder_mask(
        like, torch.tensor(np.asarray(ids))[None], torch.zeros(1, len(ids), 8), torch.zeros(features, 8)
    )
    assert int(check(ids)[0].sum()) == features
    obeyed = words.tokenizer.encode(words.to_bytes(ids).decode(), add_special_tokens=False)
    with pytest.raises(ValueError, match="do not match"):
        check(obeyed)


def test_a_turn_that_is_no_call_cannot_be_answered():
    with pytest.raises(TraceError, match="turn 2 of a trace about 'Which digit\\?' is no call"):
        compile_traces([Trace(QUERIES[0], (right(CROP), right("I see."), right("\\boxed{7}")), "7")])


def test_limits_are_named():
    """A row that needs exactly the room it has fits; with one less, the message says what and how much."""
    traces = [
        Trace(QUERIES[0], (right("\\boxed{7}"),), "7"),
        Trace(QUERIES[0], (right(CROP),) * 2 + (right("x"),), "7"),
    ]
    t = compile_traces(traces)
    need = BatchShape(
        tokens=int(t.valid.sum(axis=1).max()),
        images=int(t.visual.slices.max()) + 1,
        slices=int((t.visual.slices[..., 0] >= 0).sum(axis=1).max()),
        patches=int(t.visual.grids[..., 1:].prod(axis=-1).max()),
    )
    compile_traces(traces, need)
    for field, name in (("tokens", "tokens"), ("images", "pictures"), ("slices", "slices"), ("patches", "patches")):
        have = getattr(need, field)
        with pytest.raises(TraceError, match=f"trace [012] has {have} {name}, there is room for {have - 1}"):
            compile_traces(traces, need._replace(**{field: have - 1}))
    with pytest.raises(TraceError, match="trace 2 has 3 calls, there is room for 2"):
        compile_traces(traces, need, dataclasses.replace(scripted_model.CONFIG, max_calls=2))
