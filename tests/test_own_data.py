"""`own_data.py` as it lies there tunes on traces of `synth` and learns from conversations: no shape and no folder is typed."""

import json

import numpy as np
import pytest
from PIL import Image

from pixel_jax.training.writers import read_metrics
from tests.rollouts import scripted_model
from tests.synthesis import seed_files
from tests.test_cli import command, model  # noqa: F401

NAMES = ("min_pixels", "max_pixels", "crop_min_pixels", "crop_max_pixels", "max_new_tokens", "max_response")
LIMITS = {name: getattr(scripted_model.CONFIG, name) for name in NAMES}
SMALL = {"sft.steps": 1, "sft.batch_size": 2, "sft.optimizer.learning_rate": 1e-3}
SMALL_RL = {"rl.iterations": 1, "rl.prompts": 2, "rl.train_batch": 4, "rl.time_operations": 0, "rl.replay.kind": "none"}
SMALL_RL |= {"rl.rollout.group_size": 2, **{f"rl.rollout.{name}": value for name, value in LIMITS.items()}}


def settings(**values):
    return [f"--config.{name}={value}" for name, value in values.items()]


@pytest.mark.slow
def test_sft_and_rl_work_out_how_large_batches_are(model, tmp_path):  # noqa: F811
    seeds = seed_files.write_seeds(tmp_path, images=3, videos=1, direct=1)
    code, out, error = command(
        "synth", "--config=configs/pixel/synth.py", *settings(seeds=seeds, out=tmp_path / "traces")
    )
    assert code == 0 and "--config.data=" in out, error
    own = ("--config=configs/pixel/own_data.py", *settings(mesh={}))
    places = {"model": model, "data": tmp_path / "traces" / "traces.jsonl", "out": tmp_path / "sft"}
    shown = settings(**{f"rollout.{name}": value for name, value in LIMITS.items() if "pixels" in name})
    code, out, error = command("sft", *own, *settings(**places, **SMALL), *shown)
    assert code == 0 and "5 traces in" in out and "padding is" in out and "of the patches" in out, error
    assert np.isfinite(read_metrics(tmp_path / "sft" / "sft" / "metrics.jsonl")[0]["loss"])

    # Questions as messages, about pictures of very different sizes, with a field for a reward.
    for name, size in {"small": (40, 60), "large": (700, 500)}.items():
        Image.fromarray(scripted_model.image(1, *size)).save(tmp_path / f"{name}.png")
    content = lambda name: [{"type": "image", "image": f"{name}.png"}, {"type": "text", "text": "Which digit?"}]
    lines = [
        {"messages": [{"role": "user", "content": content(x)}], "gold": "7", "box": [1]} for x in ("small", "large")
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    places = {
        "model": model,
        "data": tmp_path / "questions.jsonl",
        "out": tmp_path / "rl",
        "columns": {"answer": "gold"},
    }
    code, out, error = command("rl", *own, *settings(**places, **SMALL_RL))
    assert code == 0 and "2 in prompts of" in out and "further field 'box' was kept" in out, error
    (metrics,) = read_metrics(tmp_path / "rl" / "rl" / "metrics.jsonl")
    assert np.isfinite(metrics["loss"]) and metrics["updates"] == 1
