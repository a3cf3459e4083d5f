"""The check of a machine: its parts at tiny shapes, and what becomes of parts that fail or hang."""

import json
import sys

import pytest

from pixel_jax.bench import check_parts
from pixel_jax.bench.check import SHARES, check, part_command, run_part

GOOD = 'print("noise"); print(\'{"device": "a", "quick": true, "figures": {"x": 1}, "wrong": []}\')'
WRONG = GOOD.replace("[]", '["x is 1"]')
PARTS = {
    "good": (GOOD, "passed", []),
    "wrong": (WRONG, "failed", ["x is 1"]),
    "raises": ("raise ValueError('no kernel')", "failed", ["no kernel"]),
    "dies": ("import os; os.kill(os.getpid(), 11)", "failed", ["ended with -11"]),
    "mute": ("pass", "failed", ["ended with 0"]),
    "hangs": ("import time; time.sleep(60)", "out of time", ["not done after"]),
    "last": (GOOD, "passed", []),
}


def test_every_part_is_reported_whatever_it_does(tmp_path):
    commands = {name: [sys.executable, "-c", code] for name, (code, _, _) in PARTS.items()}
    out = tmp_path / "check.json"
    record = check(commands, dict.fromkeys(PARTS, 1) | {"hangs": 0.2}, 20, out)
    assert json.loads(out.read_text()) == record and list(record["parts"]) == list(PARTS)
    assert record["device"] == "a" and record["quick"] is True and record["seconds"] < 20
    for name, (_, status, wrong) in PARTS.items():
        part = record["parts"][name]
        assert part["status"] == status and len(part["wrong"]) == len(wrong), (name, part)
        assert all(expected in said for expected, said in zip(wrong, part["wrong"], strict=True))
        assert ("figures" in part) == (GOOD[-40:-9] in PARTS[name][0] or name == "wrong")


def test_what_comes_after_the_time_is_not_started(tmp_path):
    record = check({"good": [sys.executable, "-c", GOOD]}, {"good": 1}, 0, tmp_path / "check.json")
    assert record["parts"]["good"]["status"] == "out of time"


def test_shares_are_of_the_parts_there_are():
    assert list(SHARES) == list(check_parts.PARTS)


def test_crops():
    figures, wrong = check_parts.crops(True)
    assert not wrong and figures["differ"] == 0 and figures["values"] > 10_000


def test_crops_that_differ_are_counted(monkeypatch):
    crop = check_parts.crop_resize
    off_by_one = lambda *given, **options: crop(*given, **options).at[0, 0, 0].add(1)
    monkeypatch.setattr(check_parts, "crop_resize", off_by_one)
    figures, wrong = check_parts.crops(True)
    assert figures["differ"] == figures["crops"] and "values differ from Pillow" in wrong[0]


def test_kernels_that_differ_or_fail(monkeypatch):
    errors = {"causal": 1.0, "packed": float("nan"), "vision": 0.0}

    def error(kind, dtype, quick):
        if dtype == "bfloat16" and kind == "vision":
            raise RuntimeError("no registers left")
        return errors[kind]

    monkeypatch.setattr(check_parts, "_kernel_error", error)
    figures, wrong = check_parts.attention_kernels(True)
    assert len(figures) == 5 and len(wrong) == 5
    assert [
        word
        for word in ("off by 1.0e+00", "off by nan", "vision, bfloat16: RuntimeError: no registers left")
        if not any(word in said for said in wrong)
    ] == []


def test_a_kernel_is_compared_with_dense_attention(monkeypatch):
    assert check_parts._kernel_error("packed", "float32", True) < 1e-5
    triton = check_parts.kernels.triton
    monkeypatch.setattr(check_parts.kernels, "triton", lambda *given, **options: 1.1 * triton(*given, **options))
    assert 0.05 < check_parts._kernel_error("packed", "float32", True) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARES)
def test_part(name):
    """As the command runs it, in a process of its own."""
    found = run_part(part_command(name, True), 900)
    assert found["status"] == "passed" and found["quick"] is True, found
    assert found["figures"]


@pytest.mark.slow
def test_an_update_is_measured_beside_its_plan():
    figures, wrong = check_parts.update("3b", True)
    assert not wrong and figures["flops"] > 0 and figures["planned_bytes"] > 0 and figures["seconds"] > 0
    assert figures["losses"][0] != figures["losses"][-1]  # it learns
    assert figures["mfu"] is None  # of a CPU no peak is published
