"""What the bench says of its aims and of how far it is."""

import io
import types

import numpy as np
import pytest

from pixel_jax.bench import report
from pixel_jax.bench.machine import MachineSpeed
from pixel_jax.bench.report import _remarks, case_record, case_table
from pixel_jax.bench.timing import Aim, Timing, Workload, measure
from pixel_jax.terminal import Waiting

MACHINE = MachineSpeed(**{name: 1 for name in MachineSpeed.__dataclass_fields__})


@pytest.mark.parametrize(
    "theirs, mine, said",
    [
        (300, 100, "reached 3.00x"),
        (300, -28, "too little to measure"),
        (-300, -100, "too little to measure"),
        (300, None, "too little to measure"),
    ],
)
def test_memory_that_is_no_more_than_noise_makes_no_ratio(theirs, mine, said):
    timing = lambda peak: Timing(1.0, 1.0, 1.0, 2, 1.5, 1.5, 1.5, 1.0, 0.0, 0, 0, peak_bytes=peak)
    nothing = {"ours": lambda: np.zeros, "torch": lambda: np.zeros}
    work = Workload("", nothing, lambda found: None, aims=(Aim("torch", 1.0), Aim("torch", 3.0, memory=True)))
    entry = case_record(work, {"ours": timing(mine), "torch": timing(theirs)}, MACHINE)
    assert _remarks(entry) == ["aim 1x faster than torch, reached 1.50x", f"aim 3x less memory than torch, {said}"]
    assert "aim" in str(case_table("case", entry).caption)
    assert "aim" not in str(case_table("case", entry, quick=True).caption)


def test_how_far_it_is_is_said_before_each_case(tmp_path, monkeypatch, capsys):
    """A module of two cases."""
    work = Workload("shapes", {"ours": lambda: lambda: np.zeros(3)}, lambda found: None)
    cases = types.SimpleNamespace(CASES=[types.SimpleNamespace(name=x, build=lambda quick: work) for x in ("a", "b")])
    timing = Timing(1.0, 1.0, 1.0, 2, 1.0, 1.0, 1.0, 1.0, 0.0, 0, 0)
    monkeypatch.setattr(report, "importlib", types.SimpleNamespace(import_module=lambda name: cases))
    monkeypatch.setattr(report, "measure_machine", lambda quick: MACHINE)
    monkeypatch.setattr(report, "describe", lambda machine: "a machine")
    monkeypatch.setattr(report, "measure", lambda work, **rounds: {"ours": timing})
    report.run_cases("two", [], True, tmp_path / "bench.json")
    said = capsys.readouterr().out
    assert (
        said.index("case 1 of 2, after 0 s: a")
        < said.index("a: shapes")
        < said.index("case 2 of 2, after 0 s: b")
        < said.index("b: shapes")
    )


def test_a_long_case_says_what_it_does():
    """And a short one nothing, for every round would be a line."""
    runs = {"ours": lambda: lambda: np.zeros(3), "theirs": lambda: lambda: np.zeros(3)}
    work = Workload("shapes", runs, lambda found: None)

    def said(**when):
        with Waiting("a case", stream=(log := io.StringIO()), **when) as wait:
            measure(work, least=2, most=2, note=wait.at)
        return log.getvalue().splitlines()

    assert said(after=60.0) == []
    lines = said(after=0.0, every=0.0)
    assert lines[0] == "a case ..."
    assert lines[1:3] == ["a case: first call, 1 of 2: ours ...", "a case: first call, 2 of 2: theirs ..."]
    rounds = [(1, "ours"), (1, "theirs"), (2, "theirs"), (2, "ours")]
    assert [(x.split()[3], x.removesuffix(" ...").split(": ")[-1]) for x in lines[3:]] == [
        (str(n), y) for n, y in rounds
    ]
