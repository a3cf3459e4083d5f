"""What operations gain and harm, where the evidence lies, and what the modes show, against sums done by hand and by sets."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixel_jax.data.example import Example
from pixel_jax.evaluation import summary
from pixel_jax.evaluation.evidence import EvidenceError, boxes_of, crops_of, held, looked_at, misread, region_of
from pixel_jax.evaluation.exchange import CASES, exchange
from pixel_jax.evaluation.modes import MODES
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.prompts import Query
from pixel_jax.rollouts.trajectory import CallStatus, no_calls
from pixel_jax.rollouts.views import GREY
from pixel_jax.tools import RELEASED
from tests.evaluation.test_evaluate import records_of


def means(row):
    return {name: row[name]["mean"] for name in CASES}


def test_the_four_cases_are_counted_and_the_gain_is_split_by_the_evidence():
    without = records_of([[0.0], [1.0], [1.0], [0.0], [0.0]], lambda i: "ab"[i % 2])
    used = records_of([[1.0], [0.0], [1.0], [0.0], [1.0]], lambda i: "ab"[i % 2])
    used[0] |= {"evidence": [1.0], "crop_area": [0.1]}
    used[4] |= {"evidence": [0.5], "crop_area": [0.3]}
    found = exchange(list(reversed(without)), used)
    assert list(found) == ["all", "a", "b"] and found["all"]["questions"] == 5
    assert means(found["all"]) == pytest.approx({"gain": 0.4, "harm": 0.2, "both": 0.2, "neither": 0.2})
    assert found["all"]["gain_held"]["mean"] == pytest.approx(0.5) and found["b"]["gain_held"] is None
    assert found["all"]["gain"]["low"] < 0.4 < found["all"]["gain"]["high"]
    difference = summary.compare(without, used)["difference"]
    assert found["all"]["gain"]["mean"] - found["all"]["harm"]["mean"] == pytest.approx(difference)
    (row, *_) = summary.exchange_rows({"own": {"exchange": {"none": found}}})
    assert row[:4] == ["own", "none", "all", "5"] and row[4].startswith("40.0 [") and row[-1].startswith("50.0 [")
    rates = summary.summarise(used)["all"]
    assert rates["evidence"]["mean"] == 0.5 and rates["crop_area"]["mean"] == pytest.approx(0.2)


@given(
    st.lists(st.tuples(*[st.lists(st.sampled_from([0.0, 1.0]), min_size=3, max_size=3)] * 2), min_size=1, max_size=6)
)
def test_the_cases_of_many_answers_are_those_of_all_pairs_of_answers(pairs):
    found = exchange(records_of([a for a, _ in pairs]), records_of([b for _, b in pairs]))["all"]
    drawn = [(x, y) for a, b in pairs for x in a for y in b]
    counted = {"gain": (0.0, 1.0), "harm": (1.0, 0.0), "both": (1.0, 1.0), "neither": (0.0, 0.0)}
    assert means(found) == pytest.approx({name: drawn.count(case) / len(drawn) for name, case in counted.items()})


BOX = st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(1, 9), st.integers(1, 9)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@given(st.lists(BOX, max_size=3), st.lists(BOX, min_size=1, max_size=3))
def test_evidence_is_held_as_sets_of_pixels_say(crops, boxes):
    cells = lambda b: {(x, y) for x in range(b[0], b[2]) for y in range(b[1], b[3])}
    shares = [max((len(cells(c) & cells(b)) / len(cells(b)) for c in crops), default=0.0) for b in boxes]
    assert held(np.array(crops, float).reshape(-1, 4), np.array(boxes, float)) == pytest.approx(min(shares))


def example(**fields):
    return Example("q", "?", ("a.png",), ("7",), fields=fields)


def test_crops_are_those_that_a_call_cut_out_of_the_first_picture():
    calls = no_calls(1, 4, 1, RELEASED)
    for number, (status, image) in enumerate([(CallStatus.DONE, 0), (CallStatus.FAILED, 0), (CallStatus.DONE, -2)]):
        calls.status[0, number] = status
        calls.source.image[0, number, 0] = image
        calls.source.region[0, number, 0] = (10, 10, 30, 20)
    calls = calls._replace(picture=None)
    (one,) = [
        type(calls)(
            *(x[0] if isinstance(x, np.ndarray) else x for x in calls[:3]),
            {},
            type(calls.source)(*(x[0] for x in calls.source)),
            calls.drawn[0],
        )
    ]
    assert crops_of(one).tolist() == [[10, 10, 30, 20]]
    # The picture is 200 x 100 in its file and 100 x 50 in the rollout.
    found = looked_at(example(box=[20, 20, 60, 40]), ((100, 200), (50, 100)), [one])
    assert found == {"evidence": [1.0], "crop_area": [pytest.approx(200 / 5000)]}
    half = looked_at(example(box=[[20, 20, 60, 40], [20, 30, 60, 50]]), ((100, 200), (50, 100)), [one])
    assert half["evidence"] == [0.5] and looked_at(example(), ((1, 1), (1, 1)), [one]) == {}


def test_what_is_no_box_is_named():
    assert boxes_of(example(box=[1, 2, 3, 4])).tolist() == [[1, 2, 3, 4]]
    odd = [
        example(box=value)
        for value in ("left", [3, 2, 1, 4], [1, 2, 3], [[1, 2, 3, 4], [1, 2]], {"x": 1}, [-1, 0, 2, 2])
    ]
    assert all(boxes_of(x) is None for x in odd) and len(misread([*odd, example(), example(box=[1, 2, 3, 4])])) == len(
        odd
    )
    assert misread([example(box=[1, 2, 3, 4])._replace(images=("a.png", "b.png"))]) == ["q"]


def test_what_each_mode_shows():
    image = np.arange(50 * 80 * 3, dtype=np.uint8).reshape(50, 80, 3)
    query, asked = Query("?", [image]), example(box=[[30, 10, 40, 20], [44, 12, 50, 16]])
    limits = RolloutConfig()
    assert MODES["operations"].show(asked, query) is query and MODES["operations"].limits(limits) is limits
    assert MODES["blank"].limits(limits) == dataclasses.replace(limits, blank=True)
    (grey,) = MODES["blind"].show(asked, query).images
    assert grey.shape == image.shape and np.all(grey == GREY)
    (seen,) = MODES["evidence"].show(asked, query).images
    np.testing.assert_array_equal(seen, image[0:30, 20:60])  # half of 20 pixels around the two
    assert region_of(asked, query) == (20, 0, 60, 30)
    for name in ("none", "blind", "evidence"):
        assert MODES[name].limits(limits).max_calls == 0 and MODES[name].guidelines == "notool"
    with pytest.raises(EvidenceError, match="q: there is no reference box"):
        MODES["evidence"].show(example(), query)
    with pytest.raises(EvidenceError, match="outside the picture, 80 x 50"):
        MODES["evidence"].show(example(box=[90, 0, 99, 9]), query)
