"""Intervals, against coverage by simulation and against textbook values."""

import math

import numpy as np
import pytest

from pixel_jax.evaluation.stats import over_seeds, proportion


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
