"""Synthesized traces: the kinds, what they show and what is learned of them, read back by the grammar and carried out."""

import numpy as np
import pytest

from pixel_jax.data import synthesis
from pixel_jax.data.synthesis import IMAGE_KINDS, VIDEO_KINDS, Mix
from pixel_jax.data.traces import Trace, right, to_trajectories
from pixel_jax.dialog.grammar import parse_turn
from pixel_jax.quickstart import miniature
from pixel_jax.quickstart.vocabulary import build_vocabulary
from pixel_jax.quickstart.zoom import CUE
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.prompts import Query, tables
from pixel_jax.rollouts.shapes import BatchShape
from pixel_jax.rollouts.trajectory import take_rows
from tests.rollouts import scripted_model

WIDTH, HEIGHT = 400, 300
REFERENCE = (0.5, 0.4, 0.62, 0.56)
SHOWN = (0.48, 0.41, 0.65, 0.55)  # what an unsteady hand made of it
ROOM = BatchShape(tokens=200, images=10, slices=10, patches=24)
CONFIG = RolloutConfig(
    min_pixels=784,
    max_pixels=4704,
    crop_min_pixels=784,
    crop_max_pixels=4704,
    select_min_pixels=784,
    select_max_pixels=4704,
    video_min_pixels=784,
    video_max_pixels=784,
    pad=0.0,
)


def picture(seed=0, height=HEIGHT, width=WIDTH):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


IMAGE = Query(miniature.QUESTION, [picture()])
VIDEO = Query(miniature.VIDEO_QUESTION, [picture(i, 90, 120) for i in range(5)], True)


def image_trace(kind, seed=0, shown=None):
    return synthesis.image_trace(np.random.default_rng(seed), IMAGE, CUE, REFERENCE, "stop", kind, shown=shown)


def video_trace(kind, frames=(2, 3), seed=0):
    return synthesis.video_trace(np.random.default_rng(seed), VIDEO, CUE, frames, "2", kind)


def text(turn):
    return "".join(part for part, _ in turn.parts)


def call(written):
    """The call of a turn, as the grammar reads it."""
    return parse_turn(written).call


def box_of(written):
    return tuple(number.units + number.micros / 1e6 for number in call(written).arguments["bbox_2d"])


def target_of(written):
    return call(written).arguments["target_image"].units


@pytest.fixture(scope="module")
def vocabulary():
    return build_vocabulary()


@pytest.fixture(scope="module")
def carried_out(vocabulary):
    """Every kind of trace, and what became of it."""
    traces = [synthesis.direct_trace(IMAGE, "stop")]
    traces += [image_trace(kind, shown=shown) for kind in IMAGE_KINDS for shown in (None, SHOWN)]
    traces += [video_trace(kind) for kind in VIDEO_KINDS]
    # A video that is asked about for as long as any image: all calls are answered by one program.
    company = Trace(VIDEO, (*[right(synthesis.select_call(CUE, [1]))] * 3, right("1")), "1")
    t = to_trajectories([*traces, company], vocabulary, tables(vocabulary), CONFIG, ROOM)
    return traces, take_rows(t, slice(len(traces)))


def test_kinds_are_drawn_in_their_shares():
    mix = Mix()
    assert mix.direct == pytest.approx(2000 / 7500)
    rng = np.random.default_rng(0)
    for kinds, shares in ((IMAGE_KINDS, mix.image), (VIDEO_KINDS, mix.video), (IMAGE_KINDS, (6, 0, 3, 1))):
        drawn = [synthesis.draw_kind(rng, kinds, shares) for _ in range(4000)]
        for kind, share in zip(kinds, np.array(shares) / sum(shares), strict=True):
            assert abs(drawn.count(kind) / 4000 - share) <= 4 * np.sqrt(share * (1 - share) / 4000)


def test_boxes_grow_to_hundredths_outward():
    assert synthesis.outward((101, 50, 199, 149.5), 400, 300) == (0.25, 0.16, 0.5, 0.5)
    assert synthesis.outward((-8, 4, 408, 320), 400, 300) == (0.0, 0.01, 1.0, 1.0)
    assert synthesis.in_pixels((0.25, 0.16, 0.5, 0.5), 400, 300) == (100, 48, 200, 150)


@pytest.mark.parametrize("reference", [REFERENCE, (0.0, 0.0, 0.1, 0.1), (0.3, 0.3, 0.84, 0.84), (0.0, 0.4, 1.0, 0.65)])
def test_a_missing_box_touches_nothing_of_the_reference(reference):
    rng = np.random.default_rng(0)
    boxes = np.array([synthesis.missing_box(rng, reference) for _ in range(200)])
    shared = np.minimum(boxes[:, 2:], reference[2:]) - np.maximum(boxes[:, :2], reference[:2])
    assert (shared <= 0).any(axis=1).all()
    assert (boxes >= 0).all() and (boxes <= 1).all()
    sides = np.round(boxes[:, 2:] - boxes[:, :2], 6)
    assert (sides >= 0.1).all() and (sides <= 0.4).all() and len(np.unique(boxes, axis=0)) > 20


def test_what_cannot_be_missed_is_refused():
    with pytest.raises(ValueError, match="leaves too little of the image"):
        synthesis.missing_box(np.random.default_rng(0), (0.02, 0.02, 0.98, 0.98))
    with pytest.raises(ValueError, match="all 5 frames are the reference"):
        video_trace("reselect", frames=(1, 2, 3, 4, 5))
    with pytest.raises(ValueError, match="'sideways'"):
        image_trace("sideways")
    with pytest.raises(ValueError, match="'sideways'"):
        video_trace("sideways")


@pytest.mark.parametrize(
    "reference", [REFERENCE, (0.0, 0.0, 0.07, 0.11), (0.89, 0.93, 1.0, 1.0), (0.2, 0.3, 0.9, 0.95)]
)
def test_a_loose_box_contains_the_reference(reference):
    rng = np.random.default_rng(0)
    boxes = np.array([synthesis.loose_box(rng, reference, (3.0, 6.0)) for _ in range(200)])
    assert (boxes[:, :2] <= reference[:2]).all() and (boxes[:, 2:] >= reference[2:]).all()
    assert (boxes >= 0).all() and (boxes <= 1).all()
    side, least = np.round(boxes[:, 2:] - boxes[:, :2], 6), np.array(reference[2:]) - reference[:2]
    assert (side >= np.minimum(3 * least, 1) - 1e-6).all() and (side <= np.minimum(6 * least + 0.02, 1) + 1e-6).all()


def test_turns_of_every_kind():
    looks = {"single": 1, "recrop": 2, "recrop_twice": 3, "further": 2}
    for kind, count in looks.items():
        turns = image_trace(kind).turns
        assert [parse_turn(text(turn)).required for turn in turns] == [True] * count + [False]
        assert text(turns[-1]) == "The answer is \\boxed{stop}"
        targets = [target_of(text(turn)) for turn in turns[:-1]]
        assert targets == ([1, 2] if kind == "further" else [1] * count)
        if kind != "further":
            assert box_of(text(turns[-2])) == REFERENCE
    assert [text(turn) for turn in synthesis.direct_trace(IMAGE, "stop").turns] == ["The answer is \\boxed{stop}"]
    for kind, count in {"single": 1, "reselect": 2}.items():
        turns = video_trace(kind).turns
        selected = [call(text(turn)).arguments["target_frames"] for turn in turns[:-1]]
        assert len(selected) == count and selected[-1] == (2, 3)
        assert all(set(other) <= {1, 4, 5} and len(other) == 2 for other in selected[:-1])


def test_mistakes_are_read_and_not_learned(carried_out, vocabulary):
    """Learned are the tokens of the right turns, their ends included, and nothing else."""
    wrong = {"single": 0, "recrop": 1, "recrop_twice": 2, "further": 1}
    traces, t = carried_out
    expected = [0] + [wrong[kind] for kind in IMAGE_KINDS for _ in range(2)] + [0, 1]
    for row, (trace, mistakes) in enumerate(zip(traces, expected, strict=True)):
        spans, inside = [], False
        for token, chosen in zip(t.tokens[row][t.valid[row]], t.loss_mask[row][t.valid[row]], strict=True):
            if chosen:
                spans = spans if inside else [*spans, []]
                spans[-1].append(int(token))
            inside = chosen
        learned = [text(turn) + "<|im_end|>" for turn in trace.turns[mistakes:]]
        assert [vocabulary.to_bytes(span).decode() for span in spans] == learned
        everything = vocabulary.to_bytes(t.tokens[row][t.valid[row]]).decode()
        for turn in trace.turns[:mistakes]:
            assert "assistant\n" + text(turn) + "<|im_end|>" in everything


def test_every_kind_is_carried_out_without_error(carried_out):
    traces, t = carried_out
    for row, trace in enumerate(traces):
        seen = [outcome for outcome in scripted_model.outcomes(t)[row] if outcome]
        shows = scripted_model.SELECTED if trace.query.is_video else scripted_model.CROPPED
        assert seen == [shows] * (len(trace.turns) - 1)
        assert t.num_calls[row] == len(seen)


def test_the_reference_is_written_whatever_is_shown(carried_out):
    traces, t = carried_out
    cut_out = {synthesis.in_pixels(box, WIDTH, HEIGHT) for box in (REFERENCE, SHOWN)}
    seen = set()
    for row, trace in enumerate(traces):
        if trace.query.is_video:
            assert t.calls.source.image[row, len(trace.turns) - 2, :3].tolist() == [1, 2, -1]
            continue
        looks = [i for i, turn in enumerate(trace.turns[:-1]) if turn.parts[-1][1]]
        for i in looks:
            if target_of(text(trace.turns[i])) == 1:
                assert box_of(text(trace.turns[i])) == REFERENCE
                seen.add(tuple(t.calls.source.region[row, i, 0].tolist()))
    assert seen == cut_out and len(seen) == 2


@pytest.mark.parametrize("seed", range(5))
def test_a_further_zoom_counts_from_the_first_crop(seed):
    """The second box, in shares of the first, is the reference in the image, give or take the hundredths of the crop."""
    for shown in (None, SHOWN):
        first, second, _ = image_trace("further", seed, shown).turns
        x1, y1, x2, y2 = synthesis.in_pixels(box_of(text(first)), WIDTH, HEIGHT)
        for written, meant in ((text(second), REFERENCE), (second.executed, shown or REFERENCE)):
            within = synthesis.in_pixels(box_of(written), x2 - x1, y2 - y1)
            found = np.array(within) + (x1, y1, x1, y1)
            wanted = np.clip(synthesis.in_pixels(meant, WIDTH, HEIGHT), (x1, y1, x1, y1), (x2, y2, x2, y2))
            step = np.array([x2 - x1, y2 - y1] * 2) / 100 + 1
            assert (np.abs(found - wanted) <= step).all()
            assert (found[:2] <= wanted[:2]).all() and (found[2:] >= wanted[2:]).all()


def test_a_further_zoom_lands_on_the_reference(carried_out):
    traces, t = carried_out
    for row, trace in enumerate(traces):
        if trace.query.is_video or len(trace.turns) != 3 or target_of(text(trace.turns[1])) == 1:
            continue
        exact = np.array(synthesis.in_pixels((REFERENCE, SHOWN)[(row - 1) % 2], WIDTH, HEIGHT))
        loose, close = t.calls.source.region[row, :2, 0]
        assert (loose[:2] <= exact[:2]).all() and (loose[2:] >= exact[2:]).all()
        assert (close[:2] <= exact[:2]).all() and (close[2:] >= exact[2:]).all()
        assert (close[2:] - close[:2] < loose[2:] - loose[:2]).all()
        step = np.tile(loose[2:] - loose[:2], 2) / 100 + 1
        assert (np.abs(close - exact) <= step).all()
