"""`pixel-jax plan` as a person starts it, on eight virtual devices: the table, and the JSON that it was made of."""

import json
import os
import pathlib
import subprocess
import sys

from tests.training.tiny_model import tiny_config

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
from ml_collections import ConfigDict

def get_config():
    limits = {"max_response": 128, "max_pixels": 3136, "crop_max_pixels": 3136, "max_side": 112, "max_calls": 1}
    learning = {"iterations": 1, "prompts": 8, "train_batch": 8, "rollout": {**limits, "group_size": 2}}
    shapes = {"canvas": (1, 128, 128), "prompt_width": 128}
    return ConfigDict({"model": "model", "data": "none", "out": "none", "rl": learning, **shapes})
"""


def plan(directory, *arguments):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pixel_jax.cli import main; main()"
    arguments = [sys.executable, "-c", code, "plan", "--config=config.py", *arguments]
    return subprocess.run(arguments, cwd=directory, env=dict(os.environ), capture_output=True, text=True, timeout=600)


def test_a_plan_of_updates_and_scores(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(tiny_config().to_hf()))
    run = plan(tmp_path, "--topology=cpu:8", "--steps=score,update", "--json=plan.json")
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    best = {step: found["plans"][x["plan"]] for step, x in found["best"]["cpu:8"].items()}
    assert best.keys() == {"update", "score"} and best["update"]["sharding"] == best["score"]["sharding"]
    rows = [line for line in run.stdout.splitlines() if line.startswith("│ cpu:8")]
    assert len(rows) == 2
    for row, (step, plan_of_step) in zip(rows, best.items(), strict=True):
        assert f" {step} " in row and plan_of_step["bound"] in row and plan_of_step["fits"]
        for name, unit in (("flops_per_chip", 1e12), ("bytes_moved", 1e9), ("seconds", 1)):
            assert f" {plan_of_step[name] / unit:.4g} " in row


def test_mistakes_are_said_before_anything_is_compiled(tmp_path):
    (tmp_path / "config.py").write_text(
        CONFIG.replace('"model": "model"', '"model": "none", "architecture": "qwen2.5-vl-7b"')
    )
    for arguments, message in {
        ("--topology=v9:2x2",): "topology 'v9:2x2' is not of the form KIND:AxB",
        ("--topology=cpu:8", "--json=."): "--json=. is a directory",
        ("--topology=cpu:8", "--json=no/plan.json"): "--json=no/plan.json: there is no directory no",
    }.items():
        run = plan(tmp_path, *arguments)
        assert run.returncode == 1 and run.stderr.count("\n") == 1 and message in run.stderr
