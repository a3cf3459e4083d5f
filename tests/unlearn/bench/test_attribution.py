"""The linear datamodelling score: its correlations against scipy, and the measurement at its smallest."""

import dataclasses
import json

import numpy as np
import pytest
from scipy.stats import spearmanr

from unlearn_jax.bench import attribution
from unlearn_jax.bench.attribution import METHODS, ONE, AttributionSetting, measure, scores, subset

SMALL = AttributionSetting(
    subsets=3, people=5, questions=2, width=16, rank=2, epochs=4, batch=5, pretraining=60, tests=6, orders=2
)


def test_correlations_are_those_of_scipy(monkeypatch):
    monkeypatch.setattr(attribution, "RESAMPLES", 60)
    random = np.random.default_rng(0)
    truth, noise = random.normal(size=(2, 50, 7))
    predicted = np.round(truth + noise, 1)  # with ties
    found = scores({"retrain": truth[:, None], "erase": predicted, "gradient": -truth, "erase, solved": truth})
    expected = np.mean([spearmanr(predicted[:, i], truth[:, i]).statistic for i in range(7)])
    assert found["erase"]["mean"] == pytest.approx(expected)
    assert found["erase"]["low"] < expected < found["erase"]["high"] and found["gradient"]["mean"] == pytest.approx(-1)
    assert set(found) == set(METHODS)
    wide = found["erase"]["high"] - found["erase"]["low"]
    names = {"retrain": truth[:, None], "erase": predicted, "gradient": truth, "erase, solved": truth}
    few = scores({name: x[:10] for name, x in names.items()})
    assert few["erase"]["high"] - few["erase"]["low"] > wide
    constant = scores(
        {"retrain": truth[:, None], "erase": np.zeros_like(truth), "gradient": truth, "erase, solved": truth}
    )
    assert constant["erase"]["mean"] == 0 and constant["gradient"]["mean"] == pytest.approx(1)
    orders = np.stack([truth, predicted, truth], axis=1)
    several = scores({"retrain": orders, "erase": truth, "gradient": truth, "erase, solved": truth})
    means = (2 * truth + predicted) / 3
    expected = np.mean([spearmanr(truth[:, i], means[:, i]).statistic for i in range(7)])
    assert several["erase"]["mean"] == pytest.approx(expected)
    others = (truth + predicted) / 2
    expected = np.mean([spearmanr(truth[:, i], others[:, i]).statistic for i in range(7)])
    assert several[ONE]["mean"] == pytest.approx(expected)
    assert scores({name: truth[:2, None] for name in ("retrain", *METHODS)}) == {}


def test_subsets_are_drawn_by_their_number():
    one, two = (subset(SMALL, 40, number) for number in (0, 1))
    assert len(one) == len(set(one.tolist())) == 4 and (one != two).any()
    np.testing.assert_array_equal(subset(SMALL, 40, 0), one)


@pytest.mark.slow
def test_the_measurement_in_small_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path = tmp_path / "scores.json"
    found = measure(SMALL, path)
    assert json.loads(path.read_text()) == found
    losses = {name: np.array(x) for name, x in found["losses"].items()}
    assert losses["before"].shape == (6,) and all(losses[name].shape == (3, 6) for name in METHODS)
    assert losses["retrain"].shape == (3, 2, 6)
    assert all(-1 <= found["scores"][name]["mean"] <= 1 for name in METHODS)
    assert all((losses[name] != losses["before"]).any() for name in ("retrain", *METHODS))
    del found["losses"]["erase"][2]
    path.write_text(json.dumps(found))
    found["losses"]["erase"] = measure(SMALL, path)["losses"]["erase"]  # one is missing, and computed
    monkeypatch.setattr(attribution, "erase", None)  # nothing is computed again
    assert measure(SMALL, path)["losses"] == found["losses"]
    with pytest.raises(ValueError, match="not of"):
        measure(dataclasses.replace(SMALL, people=6), path)
