"""The linear datamodelling score: its correlations against scipy, and the measurement at its smallest."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import spearmanr

from unlearn_jax.bench import attribution
from unlearn_jax.bench.attribution import METHODS, ONE, AttributionSetting, measure, scores, subset
from unlearn_jax.people.task import PeopleTask

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
    assert scores({"retrain": truth[:, None], "before": truth[0], "kronfluence": truth[:49]}) == {}  # it lacks a subset


def test_subsets_are_drawn_by_their_number():
    one, two = (subset(SMALL, 40, number) for number in (0, 1))
    assert len(one) == len(set(one.tolist())) == 4 and (one != two).any()
    np.testing.assert_array_equal(subset(SMALL, 40, 0), one)


@pytest.mark.slow
@pytest.mark.torch
def test_scores_of_libraries_tend_to_those_of_gradients(tmp_path):
    """With a large damping a score is a product of two gradients, which are those of the model in JAX."""
    from unlearn_jax.bench.influences import LearnedFacts, gradients

    task = PeopleTask.of(SMALL.config(str(tmp_path)))
    items = task.items()
    random = np.random.default_rng(0)
    adapter = jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.3, x.shape), x.dtype), task.model.fresh)
    tests = task.model.words.encode([(row.question, row.paraphrase) for row in list(items.values())[:5]])
    examples = {name: x for name, x in task.encode(items).items() if name != "id"}
    facts = LearnedFacts(task.model.base, adapter, task.config.network.heads, examples, tests)
    slopes, learned = (np.asarray(attribution._gradients(task.model.loss(), adapter, x)) for x in (tests, examples))
    expected = slopes @ learned.T
    ours, theirs = (gradients(facts.twin(), rows.tensors) for rows in (facts.tests, facts.learned))
    close = {"rtol": 1e-3, "atol": 1e-4 * np.abs(expected).max()}
    np.testing.assert_allclose(sum(ours[name] @ theirs[name].T for name in ours), expected, **close)
    if importlib.util.find_spec("kronfluence"):
        np.testing.assert_allclose(1e6 * facts._kronfluence(1e6), expected, **close)
        assert np.isfinite(facts.kronfluence()["EK-FAC, damping by its heuristic"]()).all()
    if importlib.util.find_spec("bergson"):
        assert facts._bergson().shape == expected.shape


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
