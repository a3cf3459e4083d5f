"""Answers: truth ratios from the formulas of TOFU, forget quality at its floors, memorisation by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn_jax.metrics import answers
from unlearn_jax.metrics.answers import exact_memorization, extraction_strength

nlls = st.lists(st.floats(0, 20), min_size=1, max_size=5)


def test_the_mean_over_an_answers_tokens():
    logprob = np.log([[0.5, 0.125, 0.9], [0.2, 0.7, 0.7]])
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    np.testing.assert_allclose(np.exp(-answers.mean_nll(logprob, mask)), [0.25, 0.2])


def test_a_row_without_targets_is_named():
    with pytest.raises(ValueError, match=r"\[\[1\]\]"):
        answers.mean_nll(np.zeros((2, 3)), np.array([[1, 0, 0], [0, 0, 0]]))


def test_padded_infinities_do_not_count():
    assert answers.mean_nll(np.array([[-1.0, -np.inf]]), np.array([[1, 0]])) == 1


@settings(deadline=None)
@given(st.floats(0, 20), nlls)
def test_the_truth_ratio_is_the_published_one_and_below_the_arithmetic(correct, wrong):
    correct, wrong = np.array([correct]), np.array([wrong])
    original = np.exp(wrong.mean(-1) - correct)  # TOFU's forget quality takes this: 1 / R but for the tiny constant
    found = answers.truth_ratio(correct, wrong)
    np.testing.assert_allclose(found * (1 + answers.TINY * np.exp(correct)), 1 / original, rtol=1e-9)
    assert found <= np.exp(-wrong).mean(-1) / np.exp(-correct) * (1 + 1e-12)


@pytest.mark.parametrize(("n", "floor"), [(40, 1.86e-23), (200, 1.94e-119), (400, 1.06e-239)])
def test_nothing_in_common(n, floor):
    """TOFU's forget01, forget05 and forget10 have 40, 200 and 400 questions; these floors stand in published tables."""
    rng = np.random.default_rng(n)
    found = answers.forget_quality(rng.uniform(0.1, 0.4, n), rng.uniform(0.6, 0.9, n))
    assert found == pytest.approx(floor, rel=0.005)
    assert found == pytest.approx(2 / math.comb(2 * n, n), rel=1e-6)


def test_the_same_and_both_directions():
    rng = np.random.default_rng(0)
    one, two = rng.uniform(0.1, 2, 40), rng.uniform(0.3, 2, 40)
    assert answers.forget_quality(one, one) == 1
    assert answers.forget_quality(one, two) == pytest.approx(answers.forget_quality(two, one))
    assert answers.forget_quality(1 / one, 1 / two) == pytest.approx(answers.forget_quality(one, two))


def as_released(correct):
    """The loop of the released code: `k` keeps its last value if nothing matches."""
    for k in range(len(correct)):
        if all(correct[k:]):
            break
    return 1 - k / len(correct) if correct else 0


def test_by_hand():
    correct = np.array([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], bool)
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    # The third: nothing after any prefix comes by itself, and yet 1/4. The last: no tokens.
    np.testing.assert_allclose(extraction_strength(correct, mask), [1, 0.25, 0.25, 1, 0])
    np.testing.assert_allclose(exact_memorization(correct, mask), [1, 0.5, 0.25, 1, np.nan])


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_extraction_strength_is_the_released_loop(pairs):
    correct, mask = (np.array(x)[None] for x in zip(*pairs, strict=True))
    found = extraction_strength(correct, mask)[0]
    np.testing.assert_allclose(found, as_released([c for c, m in pairs if m]), atol=1e-12)
    if mask.any():
        assert found <= max(exact_memorization(correct, mask)[0], 1 / mask.sum()) + 1e-12


def test_utility_is_the_harmonic_mean():
    from scipy.stats import hmean

    scores = np.random.default_rng(0).uniform(0.1, 1, 9)
    assert answers.model_utility(scores) == pytest.approx(hmean(scores))
    assert answers.model_utility([0.5, 0.0]) == 0
    for wrong in ([], [0.5, 1.5], [float("nan")]):
        with pytest.raises(ValueError, match="between 0 and 1"):
            answers.model_utility(wrong)


def test_probabilities_beside_wrong_answers_and_knowledge():
    correct, wrong = np.array([0.0, 1.0]), np.array([[0.0, np.inf], [1.0, 1.0]])
    np.testing.assert_allclose(answers.normalized_probability(correct, wrong), [0.5, 1 / 3], rtol=1e-9)
    assert answers.knowledge([0.25, 3.0]) == pytest.approx(0.375)
