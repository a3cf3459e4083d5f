"""Recommendation scores by hand."""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import roc_auc_score

from unlearn_jax.metrics import recommendation


def test_two_token_softmax_and_its_area():
    rng = np.random.default_rng(0)
    logits, liked = rng.normal(0, 5, (50, 9)), rng.random(50) < 0.4
    found = recommendation.like_probability(logits, no=3, yes=7)
    np.testing.assert_allclose(found, softmax(logits[:, [3, 7]], axis=-1)[:, 1])
    assert recommendation.like_auc(logits, liked, no=3, yes=7) == pytest.approx(roc_auc_score(liked, found))


def test_the_score_of_tallrec():
    """Softmax over all words, then over the two probabilities: another order, and another area, than of Yes against No."""
    rng = np.random.default_rng(1)
    logits, liked = rng.normal(0, 3, (200, 9)), rng.random(200) < 0.4
    expected = softmax(softmax(logits, axis=-1)[:, [3, 7]], axis=-1)[:, 1]
    found = recommendation.tallrec_probability(logits, no=3, yes=7)
    np.testing.assert_allclose(found, expected)
    area = recommendation.tallrec_auc(logits, liked, no=3, yes=7)
    assert area == pytest.approx(roc_auc_score(liked, expected))
    assert abs(area - recommendation.like_auc(logits, liked, no=3, yes=7)) > 1e-3
    # Yes is a thousand times as likely as No, and neither is what the model would say.
    elsewhere, undecided = np.array([[-20.0, -13.1, 0.0]]), np.array([[0.0, 0.1, -9.0]])
    for function, first in ((recommendation.like_probability, True), (recommendation.tallrec_probability, False)):
        assert (function(elsewhere, no=0, yes=1) > function(undecided, no=0, yes=1)).item() is first


def test_hit_and_valid_ratio():
    titles = ["The Matrix", "Heat", "Alien", "Aliens"]
    cases = [
        ("the MATRIX\n", "The Matrix"),  # valid, right
        ("I would say heat.\nAlien", "Heat"),  # only the first line counts
        ("Heat", "Alien"),  # valid, wrong
        ("Aliens", "Aliens"),  # contains two titles: not valid
        ("Casablanca", "Heat"),  # none: not valid
    ]
    found = recommendation.hit_ratio([g for g, _ in cases], [titles] * 5, [t for _, t in cases])
    np.testing.assert_array_equal(found.valid, [1, 1, 1, 0, 0])
    np.testing.assert_array_equal(found.correct, [1, 1, 0, 0, 0])
    assert found.valid_ratio == pytest.approx(3 / 5)
    assert found.hit_ratio == pytest.approx(2 / 3)
    assert found.hit_ratio_of_all == pytest.approx(2 / 5) == pytest.approx(found.valid_ratio * found.hit_ratio)


def test_reported_ratios_are_counts():
    """LLMEraser's MovieLens rows: 41 and 42 right among 92 valid of 95."""
    for right, value in ((42, 0.4565), (41, 0.4456)):
        texts = ["a"] * right + ["b"] * (92 - right) + ["?"] * 3
        found = recommendation.hit_ratio(texts, [["a", "b"]] * 95, ["a"] * 95)
        assert found.hit_ratio == pytest.approx(value, abs=1e-4) and found.valid_ratio == pytest.approx(
            0.9684, abs=1e-4
        )


def test_nothing_valid_and_nothing_given():
    found = recommendation.hit_ratio(["?"], [["a"]], ["a"])
    assert (found.valid_ratio, found.hit_ratio, found.hit_ratio_of_all) == (0, 0, 0)
    with pytest.raises(ValueError, match="0 generations"):
        recommendation.hit_ratio([], [], [])
    with pytest.raises(ValueError, match="1 candidate lists"):
        recommendation.hit_ratio(["a", "b"], [["a"]], ["a", "b"])
