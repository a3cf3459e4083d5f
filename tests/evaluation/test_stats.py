"""Intervals and paired tests, against scipy, coverage by simulation, enumeration and textbook values."""

import math

import numpy as np
import pytest
import scipy.stats

from pixel_jax.evaluation.stats import bootstrap, over_seeds, paired, proportion


def test_wilson_interval_of_a_textbook_example():
    found = proportion([True] * 8 + [False] * 2)
    assert (found["mean"], found["n"]) == (0.8, 10)
    z = 1.959963984540054
    centre = (0.8 + z * z / 20) / (1 + z * z / 10)
    half = z / (1 + z * z / 10) * math.sqrt(0.8 * 0.2 / 10 + z * z / 400)
    assert found["low"] == pytest.approx(centre - half) and found["high"] == pytest.approx(centre + half)


def test_intervals_cover():
    rng = np.random.default_rng(0)
    covered = [(lambda f: f["low"] <= 0.3 <= f["high"])(proportion(rng.random(60) < 0.3)) for _ in range(600)]
    assert 0.92 <= np.mean(covered) <= 0.985
    covered = [(lambda f: f["low"] <= 2 <= f["high"])(over_seeds(rng.normal(2, 1, 3))) for _ in range(600)]
    assert 0.92 <= np.mean(covered) <= 0.975


def test_little_data_says_so():
    assert over_seeds([0.5])["high"] == math.inf
    nothing = proportion([])
    assert math.isnan(nothing["mean"]) and (nothing["low"], nothing["high"]) == (0.0, 1.0)


def test_bootstrap_against_scipy():
    rng = np.random.default_rng(1)
    for values in (rng.random(60) < 0.8, rng.random((40, 8)).mean(axis=1), rng.exponential(size=25)):
        values = np.asarray(values, float)
        options = {"n_resamples": 9999, "method": "percentile", "rng": np.random.default_rng(2)}
        wanted = scipy.stats.bootstrap((values,), np.mean, **options).confidence_interval
        found = bootstrap(values)
        width = wanted.high - wanted.low
        assert found["mean"] == pytest.approx(values.mean()) and found["n"] == len(values)
        assert abs(found["low"] - wanted.low) < 0.05 * width and abs(found["high"] - wanted.high) < 0.05 * width


def test_bootstrap_of_a_rate_against_scipy():
    rng = np.random.default_rng(3)
    calls = rng.integers(0, 5, 50)
    failed = rng.binomial(calls, 0.3)
    options = {"n_resamples": 9999, "method": "percentile", "paired": True, "rng": np.random.default_rng(4)}
    rate = lambda x, y, axis: np.sum(x, axis=axis) / np.sum(y, axis=axis)
    wanted = scipy.stats.bootstrap((failed, calls), rate, **options).confidence_interval
    found = bootstrap(failed, calls)
    assert found["mean"] == pytest.approx(failed.sum() / calls.sum())
    assert found["low"] == pytest.approx(wanted.low, abs=0.01) and found["high"] == pytest.approx(wanted.high, abs=0.01)
    assert math.isnan(bootstrap([0, 0], [0, 0])["mean"]) and math.isnan(bootstrap([])["high"])


@pytest.mark.parametrize("hits", [[0] * 4, [1], [1] * 30])
def test_questions_that_are_all_alike_have_wilsons_interval(hits):
    found, wanted = bootstrap(hits, bounds=(0, 1)), proportion(np.array(hits, bool))
    assert [found[name] for name in ("mean", "n")] == [wanted[name] for name in ("mean", "n")]
    assert found["low"] == pytest.approx(wanted["low"]) and found["high"] == pytest.approx(wanted["high"])


def test_what_has_not_been_seen_widens_an_interval_as_far_as_its_bounds():
    half = bootstrap([0.5] * 10, bounds=(0, 1))
    assert half["mean"] == 0.5 and 0 < half["low"] < 0.5 < half["high"] < 1
    same = paired([1, 0, 1, 0], [1, 0, 1, 0])
    assert same["difference"] == 0 and same["low"] == -same["high"] < -0.4
    rate = bootstrap([0, 0, 0], [4, 0, 2], bounds=(0, 1))  # no operation failed, of two questions with any
    assert rate["high"] == pytest.approx(proportion([False] * 2)["high"]) and rate["n"] == 3
    assert bootstrap([3, 3, 3])["high"] == 3


def test_many_answers_to_few_questions_do_not_narrow_the_interval():
    rng = np.random.default_rng(5)
    questions = rng.random(30) < 0.5
    once, often = bootstrap(questions), bootstrap(np.repeat(questions[:, None], 32, axis=1).mean(axis=1))
    assert once == often


def signs(difference):
    """The two-sided p-value of the sign-flip test, by all 2^n signs."""
    n = len(difference)
    flips = np.array([[1 if bits >> i & 1 else -1 for i in range(n)] for bits in range(2**n)])
    sums, seen = flips @ difference, abs(np.sum(difference))
    return np.mean(np.abs(sums) >= seen - 1e-9)


def test_paired_test_by_all_signs():
    rng = np.random.default_rng(6)
    for _ in range(3):
        first, second = rng.random((2, 10))
        found = paired(first, second)
        assert found["p"] == pytest.approx(signs(second - first))
        assert found["difference"] == pytest.approx(np.mean(second - first)) and found["n"] == 10
        assert found["better"] == np.sum(second > first) and found["better"] + found["worse"] == 10


def test_paired_test_of_right_and_wrong_is_mcnemars():
    first = np.array([1] * 30 + [0] * 12 + [1] * 3 + [0] * 20)
    second = np.array([1] * 30 + [1] * 12 + [0] * 3 + [0] * 20)
    found = paired(first, second)
    assert (found["better"], found["worse"]) == (12, 3)
    assert found["p"] == pytest.approx(2 * sum(math.comb(15, i) for i in range(4)) / 2**15)
    # and the sign-flip test that it stands for
    difference = (second - first)[second != first]
    assert found["p"] == pytest.approx(signs(difference))
    options = {"permutation_type": "samples", "vectorized": True, "rng": np.random.default_rng(7)}
    mean = lambda x, axis: np.mean(x, axis=axis)
    drawn = scipy.stats.permutation_test((difference,), mean, n_resamples=9999, **options)
    assert found["p"] == pytest.approx(drawn.pvalue, abs=0.01)


def test_paired_test_against_scipys_t_test_and_under_the_null():
    rng = np.random.default_rng(8)
    first = rng.random(80)
    second = first + rng.normal(0.05, 0.2, 80)
    wanted = scipy.stats.ttest_rel(second, first).pvalue
    assert paired(first, second)["p"] == pytest.approx(wanted, abs=0.02)
    assert paired(first, first)["p"] == 1.0
    low = [paired(*rng.integers(0, 2, (2, 40)), seed=i)["p"] < 0.05 for i in range(200)]
    assert np.mean(low) <= 0.08
    with pytest.raises(ValueError, match="same questions"):
        paired([1, 0], [1])
