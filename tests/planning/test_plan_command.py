"""`pixel-jax plan` as a person starts it, on eight virtual devices: the table, and the JSON that it was made of."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.training.tiny_model import tiny_config

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
from ml_collections import ConfigDict

def get_config():
    limits = {"max_response": 128, "max_pixels": 3136, "crop_max_pixels": 3136, "max_side": 112, "max_calls": 1}
    learning = {"iterations": 1, "prompts": 8, "train_batch": 8, "rollout": {**limits, "group_size": 2}}
    shapes = {"image_buffer": (1, 128, 128), "prompt_width": 128}
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
    said = run.stdout.splitlines()
    lines = said[said.index("For the config, to run as planned on cpu:8:") + 1 :][:2]
    mesh = {axis: size for axis, size in best["update"]["sharding"].items() if size > 1 and axis != "micro_batches"}
    parts = best["update"]["sharding"]["micro_batches"]
    assert lines == [f"config.mesh = {mesh}", f"config.rl.forward.micro_batches = {parts}"]
    rows = [line for line in said if re.match(r"cpu:8 +(score|update) ", line)]
    assert len(rows) == 2
    for row, (step, plan_of_step) in zip(rows, best.items(), strict=True):
        assert f" {step} " in row and plan_of_step["bound"] in row and plan_of_step["fits"]
        for name, unit in (("flops_per_chip", 1e12), ("bytes_moved", 1e9), ("seconds", 1)):
            assert f" {plan_of_step[name] / unit:.4g} " in row


@pytest.mark.slow
def test_the_meshes_of_the_config_and_the_room_of_its_videos(tmp_path):
    config = CONFIG.replace(
        "**shapes}", '**shapes, "mesh": {"data": 2, "fsdp": -1}, "rollout_mesh": {"data": -1, "tensor": 2}}'
    )
    config = config.replace('"train_batch": 8,', '"train_batch": 8, "forward": {"micro_batches": 1},')
    (tmp_path / "config.py").write_text(config)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(tiny_config().to_hf()))
    stopped = plan(tmp_path, "--topology=cpu:8", "--configured", "--video", "--steps=score")
    assert stopped.returncode == 1 and "--video: config.video_buffer is not set" in stopped.stderr
    video = ("--config.video_buffer=(4, 64, 64)", "--config.video_prompt_width=256")
    run = plan(tmp_path, "--topology=cpu:8", "--configured", "--video", "--steps=score", "--json=plan.json", *video)
    assert run.returncode == 0, run.stderr
    (found,) = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert found["sharding"] == {"data": 2, "fsdp": 4, "sequence": 1, "tensor": 1, "micro_batches": 1}
    # (With one row a device nothing larger can be chosen.)
    still = plan(tmp_path, "--topology=cpu:8", "--configured", "--fit", "--steps=score", "--json=still.json")
    assert still.returncode == 0, still.stderr
    (other,) = json.loads((tmp_path / "still.json").read_text())["plans"]
    assert found["flops_per_chip"] > 1.1 * other["flops_per_chip"]  # 128 tokens more in a row, and four frames


def test_mistakes_are_said_before_anything_is_compiled(tmp_path):
    (tmp_path / "config.py").write_text(
        CONFIG.replace('"model": "model"', '"model": "none", "architecture": "qwen2.5-vl-7b"')
    )
    for arguments, message in {
        ("--topology=v9:2x2",): "topology 'v9:2x2' is neither of the form KIND:AxB",
        ("--topology=h100:16",): "h100:16 is not NODESxGPUS with 1 to 8 GPUs a node and at most",
        ("--topology=cpu:8", "--json=."): "--json=. is a directory",
        ("--topology=cpu:8", "--configured"): "the config has no mesh",
        ("--topology=cpu:8", "--json=no/plan.json"): "--json=no/plan.json: there is no directory no",
    }.items():
        run = plan(tmp_path, *arguments)
        assert run.returncode == 1 and run.stderr.count("\n") == 1 and message in run.stderr


def test_rollouts_that_a_family_cannot_make_are_not_planned(tmp_path):
    """Of a LLaVA that reads CLIP's class token, too: by name, before anything is compiled."""
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "model").mkdir()
    values = {"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": {}}
    values["vision_feature_select_strategy"] = "full"
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    run = plan(tmp_path, "--topology=cpu:8")
    assert run.returncode == 1 and run.stderr.count("\n") == 1, run.stderr
    assert "family 'llava' reads the class token beside the patches" in run.stderr
