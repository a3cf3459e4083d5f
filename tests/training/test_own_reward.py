"""The page about rewards of one's own does what it says; a reward from a folder outside trains a model."""

import json
import pathlib
import re
import shlex
import sys

import pytest
from ml_collections import ConfigDict
from PIL import Image

from pixel_jax.config import load
from pixel_jax.state_files import read_json_lines
from pixel_jax.train_config import TrainConfig
from pixel_jax.training.rewards import RewardConfig
from pixel_jax.training.writers import read_metrics
from tests.rollouts import scripted_model
from tests.test_cli import CONFIG, ROOT, command, model  # noqa: F401, a fixture

PAGE = pathlib.Path(ROOT, "docs", "your-own-reward.md").read_text()
BLOCKS = re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def blocks(kind, name=""):
    return [text for found, file, text in BLOCKS if (found, file) == (kind, name)]


@pytest.fixture
def folder(tmp_path):
    """Outside the repository: the page's file, and its example."""
    (tmp_path / "my_rewards.py").write_text(blocks("python", "my_rewards.py")[0])
    Image.fromarray(scripted_model.image(1, 120, 150)).save(tmp_path / "street.png")
    line = json.loads(blocks("json")[0])
    (tmp_path / "questions.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line | {"answer": "3"}))
    return tmp_path


def test_the_page_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    config = ConfigDict({"rl": {"reward": {}, "iterations": 1}, "model": "m", "data": "d", "out": "o"})
    names = {"config": config}
    for text in blocks("python"):
        exec(compile(text, "docs/your-own-reward.md", "exec"), names)
    assert load(TrainConfig, config).rl.reward == RewardConfig()  # the page's default is the default
    for name in ("my_rewards",):
        del sys.modules[name]


@pytest.mark.slow
def test_a_reward_of_ones_own_trains_a_model(folder, model):  # noqa: F811
    """The page's command, with a tiny model: two iterations, begun by one command and gone on with by another."""
    limits = {name: x for name, x in json.loads((model / "rollout.json").read_text()).items() if x is not None}
    (folder / "small.py").write_text(CONFIG.format(own_data=str(ROOT / "configs/pixel/own_data.py"), limits=limits))
    program, phase, *flags = shlex.split(blocks("bash")[0].replace("\\\n", " "))
    assert (program, phase) == ("pixel-jax", "rl")

    def start(iterations, *more):
        given = dict(flag.split("=", 1) for flag in flags)
        given |= {"--config": "small.py", "--config.model": model, "--config.rl.iterations": iterations}
        return command("rl", *(f"{name}={value}" for name, value in given.items()), *more, cwd=folder)

    code, out, error = start(2)
    assert code == 0 and "The model is in runs/mine/model." in out, error
    metrics = read_metrics(folder / "runs/mine/rl/metrics.jsonl")
    assert len(metrics) == 2
    for line in metrics:
        terms = [line[f"reward_{name}"] for name in ("answer", "curiosity", "my_rewards:iou")]
        assert "reward_budget" not in line and line["reward"] == pytest.approx(sum(terms), rel=1e-5)
    assert any(0 < line["reward_my_rewards:iou"] <= 0.2 for line in metrics)
    # Other code is another experiment.
    (folder / "my_rewards.py").write_text(blocks("python", "my_rewards.py")[0] + "\n\n# edited\n")
    code, out, error = start(3)
    assert code == 1 and "was begun with code.my_rewards:iou" in error
    (folder / "my_rewards.py").write_text("def iou(row, example):\n    return float('nan')\n")
    code, out, error = start(3, "--resume_changed")
    assert code == 1 and "iteration 2: the reward term 'my_rewards:iou' of" in error and "nan" in error
    assert len(read_json_lines(folder / "runs/mine/rl/history.jsonl")) >= 1
