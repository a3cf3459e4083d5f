"""The experiment in small: everybody gets the same budget, and the evaluator is fair."""

import dataclasses
import json

import numpy as np
import pytest

from unlearn_jax.experiment.evaluator import UNLIMITED, Evaluator, best_rates
from unlearn_jax.experiment.results import beaten, loose, run_experiment, table
from unlearn_jax.experiment.setup import METHODS, ExperimentConfig, Run, Setup

SMALL = ExperimentConfig(
    people=5,
    width=8,
    layers=1,
    strangers=10,
    holdout=3,
    pretraining=60,
    shares=(0.2,),
    seeds=1,
    rates=(1e-2,),
    batch=8,
    max_steps=80,
    tolerance=0.05,
    erasure={"newton_steps": 1, "solver": {"max_steps": 6}},
    methods=("L-BFGS", "NPO", "SISA"),
)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "small.json"
    return run_experiment(SMALL, path, log=lambda line: None), path


def check(found, methods):
    (run,) = found["runs"]
    rows = {row["method"]: row for row in run["rows"]}
    assert list(rows) == ["before", "cold retrain", "erase", *methods, *UNLIMITED]
    assert rows["L-BFGS, unlimited"]["gradients"] <= rows["erase, unlimited"]["gradients"]
    budget = rows["erase"]["gradients"]
    for name in methods:
        assert rows[name]["gradients"] <= budget
        assert rows[name]["gradients"] > 0.7 * budget or name == "SISA"
    numbers = [x for row in rows.values() for name, x in row.items() if name != "method"]
    assert np.isfinite(numbers).all() and "cosine" not in rows["before"]
    # 4 of 20 facts: the edit drives them away and comes nearer to the warm retrain than doing nothing.
    assert run["count"] == 4 and rows["erase"]["nll_forget"] > rows["before"]["nll_forget"] + 0.02
    assert rows["erase"]["kl_forget"] < rows["before"]["kl_forget"]
    assert rows["erase"]["objective"] < rows["before"]["objective"]


def test_the_experiment_in_small(result):
    found, path = result
    check(found, SMALL.methods)
    assert json.loads(path.read_text()) == json.loads(json.dumps(found))


@pytest.mark.slow
def test_all_methods_in_small(tmp_path):
    check(
        run_experiment(dataclasses.replace(SMALL, methods=METHODS), tmp_path / "all.json", log=lambda line: None),
        METHODS,
    )


def test_a_run_goes_on_where_it_stopped(result):
    found, path = result
    lines = []
    assert run_experiment(SMALL, path, log=lines.append) == json.loads(json.dumps(found)) and not lines
    with pytest.raises(ValueError, match="not of"):
        run_experiment(dataclasses.replace(SMALL, people=6), path)


def test_the_table_and_its_exceptions(result):
    text = table(result[0]["runs"])
    assert "20.0% removed, 1 seed" in text and all(name in text for name in SMALL.methods)


def rows(**divergence):
    return [{"method": name} | ({"kl_forget": x} if x else {"diverged": True}) for name, x in divergence.items()]


def test_who_is_nearer():
    runs = [
        {"share": 0.1, "seed": 0, "rows": rows(erase=1.0, NPO=2.0, RMU=0.5)},
        {"share": 0.1, "seed": 1, "rows": rows(erase=1.0, NPO=3.0, RMU=0.7)},
        {"share": 0.4, "seed": 0, "rows": rows(erase=1.0, NPO=3.0, RMU=None)},
    ]
    (sentence,) = beaten(runs, "kl_forget")
    assert sentence.startswith("10.0% removed: RMU is nearer in kl_forget, by 0.4 [")
    text = table(runs, columns=("kl_forget", "auc"))
    assert "2.5 ± 6" in text and "diverged" in text and "10.0% removed, 2 seeds" in text


def test_references_that_are_no_minima_are_named():
    run = {"seed": 3, "share": 0.05, "norms": {"trained": 1e-9, "warm": 2e-4, "cold": float("nan")}}
    assert loose([run]) == [
        f"seed 3, 5.0% removed: {name} stopped at a gradient of {norm} of a fresh adapter's"
        for name, norm in (("warm", "2.0e-04"), ("cold", "nan"))
    ]


def test_the_best_learning_rate_of_each_method():
    numbers = {0.001: {"kl_forget": 0.1, "kl_retain": 0.1}, 0.01: {"kl_forget": 0.0, "kl_retain": 0.15}}
    numbers[0.1] = {"diverged": True}
    made = [{"method": "before"}]
    made += [{"method": name, "rate": rate, **found} for name in METHODS for rate, found in numbers.items()]
    assert best_rates(made) == {name: (0.01,) for name in METHODS}


@pytest.mark.slow
def test_the_evaluator_finds_the_reference_without_fault():
    setup = Setup.of(SMALL)
    run = Run.of(setup, 3)
    evaluator = Evaluator.of(setup, run, 0.2)
    own = evaluator(evaluator.warm)
    assert max(own[name] for name in ("kl_forget", "kl_retain", "kl_holdout", "distance")) < 1e-6
    assert own["objective"] == 0 and own["cosine"] == pytest.approx(1)
    assert evaluator(evaluator.cold)["forget_quality"] == 1
    assert evaluator(run.adapter)["nll_forget"] < own["nll_forget"]
