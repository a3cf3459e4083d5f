"""Evaluations of several runs as a record, and the table that is made of it."""

import json

import numpy as np
import pytest
from small_people import make_config

from launch import tables
from pixel_jax.cli import UserError
from pixel_jax.state_files import write_json
from unlearn_jax.people.evaluate import EVALUATION
from unlearn_jax.people.seeds import collect
from unlearn_jax.requests.log import BEGINNING, LOG, LogEntry, append
from unlearn_jax.requests.task import SETTINGS


def finished(directory, seed, value, ids=("person-4-0", "person-4-1")):
    directory.mkdir()
    trained = make_config(directory).trained() | {"seed": seed}
    trained["training"]["seed"] = seed
    write_json(directory / SETTINGS, trained)
    hashes = dict.fromkeys(("config", "data_before", "data_after", "adapter_before", "adapter_after"), "0" * 64)
    entry = LogEntry(
        number=1, at="now", ids=list(ids), kind="remove", who="A", when="2026-11-30", outcome="edited", why="it fell",
        files={}, previous=BEGINNING, **hashes,
    )  # fmt: skip
    append(directory / LOG, entry)
    write_json(directory / EVALUATION, {"edited": dict.fromkeys(tables.PEOPLE, value)})
    return directory


def test_runs_of_several_seeds_become_a_table(tmp_path, monkeypatch):
    values = (0.2, 0.3, 0.7)
    runs = [finished(tmp_path / str(seed), seed, value) for seed, value in enumerate(values)]
    (tmp_path / "docs").mkdir()
    record = collect(runs, tmp_path / "docs" / "people.json")
    assert json.loads((tmp_path / "docs" / "people.json").read_text()) == record
    assert [(run["seed"], run["forgotten"], run["outcomes"]) for run in record["runs"]] == [
        (seed, 2, ["edited"]) for seed in range(3)
    ]
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    text = tables.people("people")
    half = 4.302653 * np.std(values, ddof=1) / np.sqrt(3)  # Student's quantile of two degrees of freedom
    assert f"| edited | 0.400 ± {half:.3f} |" in text
    assert "2 of 10 rows forgotten (20 %), 3 seeds (3 edited)" in text


def test_runs_that_do_not_belong_together(tmp_path):
    one, two = finished(tmp_path / "one", 0, 0.1), finished(tmp_path / "two", 1, 0.2)
    trained = json.loads((two / SETTINGS).read_text())
    trained["network"]["width"] = 8
    write_json(two / SETTINGS, trained)
    with pytest.raises(UserError, match="two has another configuration than .*one"):
        collect([one, two], tmp_path / "record.json")
    (one / EVALUATION).unlink()
    with pytest.raises(UserError, match="holds no evaluation.json: run `unlearn-jax eval"):
        collect([one], tmp_path / "record.json")
