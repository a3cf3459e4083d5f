"""Iterations that teach nothing are said, and a run of them is explained from its counts."""

import numpy as np
import pytest

from pixel_jax.parallel.sharding import WHOLE
from pixel_jax.training.diagnosis import PATIENCE, Diagnosis, causes, outcome_metrics, remark
from pixel_jax.training.rewards import Row
from pixel_jax.training.stages import Scored

GOOD = {"nonzero_variance": 0.25, "all_right": 0.5, "all_wrong": 0.25, "unboxed": 0.0, "finished": 1.0}
EASY = GOOD | {"nonzero_variance": 0.0, "all_right": 0.75, "all_wrong": 0.25}
HARD = GOOD | {"nonzero_variance": 0.0, "all_right": 0.0, "all_wrong": 1.0}


def test_counts_of_groups_and_rows():
    texts = ["\\boxed{7}", "<answer>7</answer>", "7", "\\boxed{7", "\\boxed{}", "\\boxed{1}", "\\boxed{1}", "one"]
    rows = [Row(text, (text,), (), "answer", np.zeros(1, np.int32)) for text in texts]
    correct = np.array([[1, 1], [0, 0.5], [0.9, 0.1], [0, 0]])
    scored = Scored(None, correct, {}, correct, rows)
    assert outcome_metrics(scored, WHOLE) == {"all_right": 0.25, "all_wrong": 0.5, "unboxed": 3 / 8}
    alone = outcome_metrics(scored._replace(correct=None), WHOLE)  # a reward that asks for no answer
    assert alone == {"unboxed": 3 / 8}
    assert remark(alone | {"nonzero_variance": 0.0}) == "no group taught anything (100% of equal rewards)"
    # A scoring of one's own may not say what the rows wrote.
    assert outcome_metrics(scored._replace(rows=()), WHOLE) == {"all_right": 0.25, "all_wrong": 0.5}


def test_what_is_said_of_an_iteration():
    assert remark(GOOD) == ""
    assert remark(EASY) == "no group taught anything (75% all right, 25% all wrong)"
    assert remark(EASY | {"all_right": 0.5}) == (
        "no group taught anything (50% all right, 25% all wrong, 25% of equal rewards)"
    )


@pytest.mark.parametrize(
    ("metrics", "rows", "temperature", "words"),
    [
        (EASY, 8, 1.0, ["too easy"]),
        (HARD, 8, 1.0, ["too hard"]),
        (HARD | {"unboxed": 0.9}, 8, 1.0, ["90% of the rows give no answer in"]),
        (
            HARD | {"finished": 0.25, "unboxed": 0.75},
            8,
            1.0,
            ["75% of the rows reached a limit", "75% of the rows give no answer"],
        ),
        (HARD, 2, 0.2, ["too hard", "2 rows a group", "temperature 0.2"]),
        (GOOD | {"nonzero_variance": 0.0, "all_right": 0.0}, 8, 1.0, ["rewards of a group are all equal"]),
    ],
)
def test_causes_follow_from_the_counts(metrics, rows, temperature, words):
    found = causes(metrics, rows, temperature)
    assert len(found) == len(words) and all(word in said for word, said in zip(words, found, strict=True))


def test_a_run_of_them_is_warned_of_ever_less_often(capsys):
    lessons, warned = Diagnosis(8, 1.0), []
    for metrics in [HARD] * (PATIENCE - 1) + [GOOD] + [HARD] * (4 * PATIENCE):
        assert bool(lessons(metrics)) is (metrics is HARD)
        warned.append(capsys.readouterr().err.count("so nothing is learned. Likely: in 100% of the groups"))
    begun = PATIENCE  # the good one ends the first
    assert np.flatnonzero(warned).tolist() == [begun + n - 1 for n in (PATIENCE, 2 * PATIENCE, 4 * PATIENCE)]
