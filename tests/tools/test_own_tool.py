"""`docs/your-own-tool.md`: its code runs, and its tool is trained and evaluated with from a directory outside the repository."""

import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pixel_jax.evaluation.results import read_records
from pixel_jax.models.io import save_pretrained
from pixel_jax.models.processor import Processor
from pixel_jax.rollouts.checks import check_device_tool
from pixel_jax.tools import CROP_IMAGE
from pixel_jax.tools.named import find_tools
from pixel_jax.training.writers import read_metrics
from tests.rollouts import scripted_model
from tests.test_cli import ENVIRONMENT, ROOT, command

PAGE = pathlib.Path(ROOT) / "docs" / "your-own-tool.md"
TOOLS = '("crop_image_normalized", "my_tools:INVERT")'
LIMITS = {
    "group_size": 2, "top_p": 1.0, "top_k": 0, "max_new_tokens": 6, "max_calls": 2, "max_response": 192, "min_pixels": 784,
    "max_pixels": 4 * 784, "crop_min_pixels": 784, "crop_max_pixels": 4 * 784, "pad": 0.0, "observe_chunk": 4,
}  # fmt: skip
CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({values!r})
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The page's files, in a directory of their own."""
    blocks = re.findall(r"^```python (\S+)\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    assert [name for name, _ in blocks] == ["my_tools.py", "try.py", "my_parts.py", "my_host_tools.py"]
    for name, text in blocks:
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("my_tools", "my_parts", "my_host_tools"):
        sys.modules.pop(name, None)
    sys.path[:] = [path for path in sys.path if path != str(tmp_path)]


def test_the_code_of_the_page_runs(written):
    environment = ENVIRONMENT | {"PYTHONPATH": f"{ROOT}"}
    subprocess.run([sys.executable, "try.py"], cwd=written, env=environment, check=True, timeout=300)
    for tool in find_tools(("my_tools:INVERT", "my_parts:MIDDLE")):
        check_device_tool(tool)
    (brightest,) = find_tools(("my_host_tools:BRIGHTEST",))
    image = np.zeros((10, 20, 3), np.uint8)
    image[5, 15] = 255
    (edges,) = find_tools(("my_host_tools:EDGES",))
    text, picture = edges.execute([image], 1)
    assert edges.picture and text == "Here are the edges:" and picture.size == (20, 10)
    assert brightest.host and brightest.execute([image], 1, "percent") == "The brightest pixel is at 75, 50."


@pytest.mark.slow
def test_trained_and_evaluated_from_the_command_line(written):
    """Two iterations of `rl`, then `eval` of what they made."""
    tools = (CROP_IMAGE, find_tools(("my_tools:INVERT",))[0])
    invert = tool_call("invert", '"channel": "red", "target_image": 1')
    metrics, records = run_both(written, tools, TOOLS, {invert: 0.6, "\\boxed{7}": 0.2, "\\boxed{3}": 0.2})
    assert sum(line["operations"] for line in metrics) > 0
    assert len(records) == 4 and sum(sum(record["operations"]) for record in records) > 0
    # The tool is part of what the run is: without it, it is another.
    code, _, error = command("eval", "--config=my_eval.py", cwd=written)
    assert code == 1 and "tools" in error, error
    (written / "my_tools.py").write_text((written / "my_tools.py").read_text() + "# changed\n")
    code, _, error = command("eval", "--config=my_eval.py", f"--config.tools={TOOLS}", cwd=written)
    assert code == 1 and "code.my_tools:INVERT" in error, error


@pytest.mark.slow
def test_pictures_of_the_host_from_the_command_line(written):
    """A tool of the host that returns pictures, and the crop of one: trained with, gone on with and evaluated."""
    names = '("crop_image_normalized", "my_host_tools:EDGES", "my_host_tools:BRIGHTEST")'
    tools = (CROP_IMAGE, *find_tools(("my_host_tools:EDGES", "my_host_tools:BRIGHTEST")))
    edges, wrong = tool_call("find_edges", '"image": 1'), tool_call("find_edges", '"image": 9')
    crop = tool_call("crop_image_normalized", '"bbox_2d": [0, 0, 0.9, 0.9], "target_image": 2')
    after = {edges: 0.3, crop: 0.2, wrong: 0.1, "\\boxed{7}": 0.2, "\\boxed{3}": 0.2}
    options = ("--config.host_tools.workers=2", "--config.host_tools.seconds=60.0")
    metrics, records = run_both(written, tools, names, after, options)
    assert sum(line["host_tool_pictures"] for line in metrics) > 0 and sum(line["operations"] for line in metrics) > 0
    assert sum(line["host_tool_errors"] for line in metrics) > 0 and sum(line["updates"] for line in metrics) == 2
    assert len(records) == 4
    code, _, error = command(
        "rl",
        "--config=my_rl.py",
        f"--config.tools={names}",
        "--config.rl.iterations=3",
        *options,
        "--resume_changed",
        cwd=written,
    )
    assert code == 0, error
    assert len(read_metrics(written / "run" / "rl" / "metrics.jsonl")) == 3


def tool_call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{{arguments}}}}}\n</tool_call>'


def run_both(written, tools, names, after, options=()):
    """`rl` and `eval` with a scripted model that says what is in `after`: the metrics and the records."""
    chain = {scripted_model.START: after, **{text: {scripted_model.END: 1.0} for text in after}}
    words = scripted_model.vocabulary_of(chain, tools)
    processor = Processor(words.tokenizer, min_pixels=784, max_pixels=4 * 784)
    save_pretrained(scripted_model.network(words, chain), processor, written / "model")
    lines = []
    for i in range(4):
        Image.fromarray(scripted_model.image(i, 60, 70)).save(written / f"{i}.png")
        lines.append(json.dumps({"question": "Which digit?", "images": [f"{i}.png"], "answer": "7"}))
    (written / "own.jsonl").write_text("\n".join(lines))
    step = {"forward": {"remat": False}, "optimizer": {"learning_rate": 1e-6}}
    rl = {
        "iterations": 2,
        "prompts": 2,
        "train_batch": 4,
        "rollout": LIMITS,
        "replay": {"kind": "none"},
        **step,
    }
    training = {
        "model": "model",
        "data": "own.jsonl",
        "out": "run",
        "image_buffer": (1, 64, 128),
        "prompt_width": 192,
        "rl": rl,
        "host_tools": {},
    }
    own = {"format": "jsonl", "data": "own.jsonl", "split": "val", "buckets": ((1, 64, 128, 192),)}
    judging = {
        "model": "run/model",
        "out": "eval",
        "benchmarks": {"own": own},
        "rollout": LIMITS | {"temperature": 1.0},
        "batch": 4,
        "traces": 1,
        "host_tools": {},
    }
    for name, values in (("my_rl.py", training), ("my_eval.py", judging)):
        (written / name).write_text(CONFIG.format(values=values))

    code, _, error = command("rl", "--config=my_rl.py", f"--config.tools={names}", *options, cwd=written)
    assert code == 0, error
    metrics = read_metrics(written / "run" / "rl" / "metrics.jsonl")
    assert len(metrics) == 2
    code, _, error = command("eval", "--config=my_eval.py", f"--config.tools={names}", *options, cwd=written)
    assert code == 0, error
    return metrics, read_records(written / "eval" / "own" / "operations")
