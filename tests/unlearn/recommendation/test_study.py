"""Cells of a small study: what they hold, that they are computed once, and the page that is made of them."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from small_study import FEW, make_config, model, tokenizer

from pixel_jax.cli import UserError
from pixel_jax.config import ConfigError
from unlearn_jax.recommendation.report import REPORT, REPORTED
from unlearn_jax.recommendation.study import COMMANDS, RecommendationStudy
from unlearn_jax.studies import cells
from unlearn_jax.studies.cells import Cell, best_rate, cells_of, read_cell, run_cells
from unlearn_jax.studies.methods import METHODS
from unlearn_jax.studies.page import write_page
from unlearn_jax.studies.study import alone
from unlearn_jax.studies.table import rows_of, text


def make_study(config):
    return RecommendationStudy.of(config, model(), tokenizer())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small study with a few methods."""
    config = make_config(tmp_path_factory.mktemp("tallrec"), methods=FEW)
    study = make_study(config)
    run_cells(study, cells_of(config))
    return config, study


def row(config, method, **changes):
    cell = Cell("remove", 0.2, 0, method)._replace(**changes)
    return read_cell(config, cell)["row"]


def check_methods(config, methods):
    tuned = [name for name in methods if METHODS[name].tuned]
    files = list(pathlib.Path(config.cells).iterdir())
    assert len(files) == len(methods) + 1 + 2 * len(tuned) == len(cells_of(config))
    for name in methods:
        found = row(config, name)
        assert 0 <= found["auc"] <= 1 and found["auc_error"] > 0
        assert found["kl_forget"] >= -1e-6 and found["kl_kept"] >= -1e-6
        if METHODS[name].cost == "edit":
            assert 0 < found["gradients"] <= row(config, "erase")["gradients"] * 1.001
        assert ("rate" in found) == METHODS[name].tuned
    assert row(config, "retrain, cold")["kl_forget"] == pytest.approx(0, abs=1e-7)
    assert row(config, "retrain, cold")["gradients"] == 2 * 10 and row(config, "corrupted")["gradients"] == 0
    assert row(config, "corrupted")["kl_forget"] > 1e-6


def test_every_cell_is_there_and_costs_no_more_than_the_edit(run):
    check_methods(run[0], FEW)


@pytest.mark.slow
def test_every_method_has_its_cell(tmp_path):
    config = make_config(tmp_path)
    run_cells(make_study(config), cells_of(config))
    check_methods(config, METHODS)
    assert row(config, "retrain, other order")["kl_forget"] > 1e-6
    assert row(config, "SISA")["shards"] >= 1 and row(config, "retrain, warm")["kl_forget"] > 1e-6


def test_the_learning_rate_is_the_best_of_the_tuning_seed(run):
    config, _ = run
    tried = {rate: row(config, "NPO", seed=config.tuning_seed, rate=rate) for rate in config.learning_rates}
    assert all("auc" not in found for found in tried.values())  # the test users take no part in the choice
    best = min(tried, key=lambda rate: tried[rate]["kl_forget"] + tried[rate]["kl_kept"])
    assert row(config, "NPO")["rate"] == best == best_rate(config, "remove", "NPO")


def test_a_finished_cell_is_not_computed_again(run, monkeypatch):
    config, study = run
    monkeypatch.setattr(cells, "_compute", lambda *arguments: pytest.fail("computed again"))
    run_cells(study, cells_of(config))
    with pytest.raises(ConfigError, match=r"config\.batch is 5, the cell .* has 4"):
        read_cell(dataclasses.replace(config, batch=5), cells_of(config)[0])


def test_a_study_that_is_interrupted_goes_on_to_the_same_numbers(run, tmp_path, monkeypatch):
    config, _ = run
    names = [cell for cell in cells_of(config) if cell.seed == 0 and not METHODS[cell.method].tuned]
    again = dataclasses.replace(config, cells=str(tmp_path / "cells"), out=str(tmp_path / "out"))
    compute, count = cells._compute, []

    def stop(study, case, cell):
        count.append(cell)
        if len(count) == 3:
            raise KeyboardInterrupt
        return compute(study, case, cell)

    monkeypatch.setattr(cells, "_compute", stop)
    with pytest.raises(KeyboardInterrupt):
        run_cells(make_study(again), names)
    assert len(list((tmp_path / "cells").iterdir())) == 2
    monkeypatch.setattr(cells, "_compute", compute)
    run_cells(make_study(again), names)
    for cell in names:
        one, other = (read_cell(x, cell)["row"] for x in (config, again))
        assert {k: x for k, x in one.items() if k != "seconds"} == {k: x for k, x in other.items() if k != "seconds"}


def test_a_retrain_is_the_training_without_the_rows(run):
    """Bit for bit: the adapter of a training whose removed rows hold other numbers."""
    _, study = run
    case = study.case("remove", 0.2, 0)
    other = {name: np.array(x) for name, x in case.after.items()}
    for name in ("hidden", "labels"):
        other[name][case.touched] = other[name][(case.touched + 1) % 12][:, ...]
    again = study.trained(other, 0, weights=case.weights)[0]
    for name, x in case.retrained()[0].items():
        np.testing.assert_array_equal(x, again[name])


@pytest.mark.parametrize(
    "kind", [*(pytest.param(x, marks=pytest.mark.slow) for x in ("query_removal", "query_replacement")), "response"]
)
def test_corrected_rows_are_asked_and_answered_as_they_should_be(tmp_path, kind):
    config = make_config(tmp_path, form="llara", edits=(kind,), methods=("corrupted", "retrain, cold", "erase"))
    study = make_study(config)
    run_cells(study, cells_of(config))
    found = {name: read_cell(config, Cell(kind, 0.2, 0, name))["row"] for name in config.methods}
    for numbers in found.values():
        assert 0 <= numbers["valid_ratio"] <= 1
        assert numbers["hit_ratio_of_all"] == pytest.approx(numbers["hit_ratio"] * numbers["valid_ratio"])
    assert found["retrain, cold"]["kl_right"] == 0 < found["corrupted"]["kl_right"]
    case = study.case(kind, 0.2, 0)
    (change,) = case.edits
    assert change.ids == [case.rows[i].name for i in case.touched]
    for place, i in enumerate(case.touched):
        before, after = (study.texts(study.fitted(x[i])) for x in (case.corrupted, case.rows))
        assert (before[0] == after[0]) == (kind == "response") and (before[1] == after[1]) == (kind != "response")
        encoded = study.recommender.encode([after], config.data.length, config.data.answer)
        np.testing.assert_array_equal(change.examples["labels"][place], encoded.labels[0])
        np.testing.assert_allclose(
            change.examples["hidden"][place], study.recommender.hidden(encoded.tokens)[0], rtol=1e-5, atol=1e-5
        )


def test_the_table_shows_means_and_intervals(run):
    config, _ = run
    done = [read_cell(config, cell) for cell in cells_of(config) if cell.seed == 0]
    second = json.loads(json.dumps([{**cell, "seed": 1} for cell in done]))
    for cell in second:
        cell["row"]["auc"] += 0.1
    (corrupted,) = [x for x in rows_of([*done, *second], REPORT.columns) if x.method == "corrupted"]
    assert corrupted.seeds == [0, 1] and corrupted.values["auc"]["n"] == 2
    assert corrupted.values["auc"]["mean"] == pytest.approx(row(config, "corrupted")["auc"] + 0.05)
    said = text(rows_of([*done, *second], REPORT.columns), REPORT.columns)
    assert "**remove, 20% of the examples**" in said and said.count("| erase | 2 |") == 1 and "±" in said
    diverged = [{**done[-1], "row": {"rate": 1.0, "diverged": True}}]
    assert "| diverged |" in text(rows_of([*done[:1], *diverged], REPORT.columns), REPORT.columns)
    assert REPORTED[2].error == pytest.approx(0.052, abs=1e-3)  # the difference of the methods is one of 92 users


def test_the_page_has_what_is_there_and_says_what_is_not(run, tmp_path):
    config, _ = run
    config = dataclasses.replace(config, seeds=(0, 7))
    write_page({"tiny": config}, tmp_path / "page", REPORT)
    page = (tmp_path / "page.md").read_text()
    assert f"{len(FEW)} of {2 * len(FEW)} cells are done" in page and "| erase | 1 |" in page
    assert "- remove, 20%, seeds 7: corrupted; retrain, cold; erase" in page
    assert "0.4565 | 0.052 (42 of 92)" in page and "![" in page
    assert (tmp_path / "page.png").read_bytes()[:4] == b"\x89PNG"
    numbers = json.loads((tmp_path / "page.json").read_text())
    erased = next(x for x in numbers["studies"]["tiny"]["rows"] if x["method"] == "erase")
    assert erased["values"]["auc"]["mean"] == row(config, "erase")["auc"]


def test_what_a_study_cannot_do_is_said(tmp_path):
    for name, value, message in (
        ("form", "llama", r"config\.form must be of tallrec, llara, not 'llama'"),
        ("edits", ("mask",), r"config\.edits must be of remove, .*, not 'mask'"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_study(make_config(tmp_path, **{name: value}))
    with pytest.raises(ConfigError, match=r"config\.methods must be of .*, not 'prayer'"):
        cells_of(make_config(tmp_path, methods=("prayer",)))
    with pytest.raises(ConfigError, match="tuning_seed 0 is one of"):
        make_config(tmp_path, tuning_seed=0)
    with pytest.raises(UserError, match="carries out no requests"):
        COMMANDS.edit(make_config(tmp_path), [])


def test_a_stack_of_one_is_the_adapter(run):
    _, study = run
    adapter = study.case("remove", 0.2, 0).trained
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x[0] == y).all()), alone(adapter), adapter))
