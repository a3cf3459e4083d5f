"""Every case works on tiny shapes: its alternatives agree, it compiles nothing twice, and its record can be read."""

import json
import pathlib

import jax
import pytest

from pixel_jax.bench.cases import CASES
from pixel_jax.bench.report import run_cases

FAST = ("crop-resize", "crop-within-one-one-core", "gather-frames", "patchify", "decode-1", "cpu-forms-sampling")
ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    "name", [pytest.param(case.name, marks=() if case.name in FAST else pytest.mark.slow) for case in CASES]
)
def test_case(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # some start processes of their own
    out = tmp_path / "bench.json"
    record = run_cases("pixel_jax.bench.cases", [name], True, out)
    assert json.loads(out.read_text()) == json.loads(json.dumps(record)) and list(record["cases"]) == [name]
    ours = next(iter(record["cases"][name]["alternatives"].values()))
    assert ours["seconds"] > 0 and ours["recompilations"] == 0 and record["machine"]["matmul"] > 0
    jax.clear_caches()


def test_a_case_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no case decode-2; the cases are crop-resize"):
        run_cases("pixel_jax.bench.cases", ["decode-2"], True, tmp_path / "bench.json")


def test_figures_of_other_cases_stay(tmp_path):
    out = tmp_path / "bench.json"
    out.write_text(json.dumps({"cases": {"older": {"shapes": "?"}}}))
    record = run_cases("pixel_jax.bench.cases", ["gather-frames"], True, out)
    assert sorted(record["cases"]) == ["gather-frames", "older"]
