"""`pixel-jax eval` as a person starts it: a run, a kill and another start, two runs compared, a checkpoint chosen."""

import argparse
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import ml_collections
import pytest
from PIL import Image

from pixel_jax.cli import UserError
from pixel_jax.config import load
from pixel_jax.evaluation import main
from pixel_jax.evaluation.config import RELEASED, EvalConfig
from pixel_jax.evaluation.results import Results, read_records
from pixel_jax.identity import settle
from pixel_jax.models.io import from_pretrained, save_pretrained
from pixel_jax.models.lora import add_lora
from pixel_jax.models.peft import save_adapter
from pixel_jax.models.processor import Processor
from tests.evaluation.test_evaluate import records_of
from tests.evaluation.test_report import HOSTILE, Reader
from tests.rollouts import scripted_model
from tests.test_cli import ENVIRONMENT, ROOT, command

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    own = {{"format": "jsonl", "data": {data!r}, "split": "val", "buckets": ((1, 192, 192, 192),)}}
    limits = ConfigDict({limits!r})
    return ConfigDict({{
        "model": {model!r}, "out": {out!r}, "benchmarks": {{"own": own}}, "modes": ("operations",), "rollout": limits,
        "batch": 2, "traces": 2, "seed": 0,
    }})
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model directory, five questions, and a config file for them."""
    folder = tmp_path_factory.mktemp("eval")
    processor = Processor(scripted_model.vocabulary().tokenizer, min_pixels=784, max_pixels=4 * 784)
    save_pretrained(scripted_model.model(), processor, folder / "model")
    lines = []
    for i in range(5):
        Image.fromarray(scripted_model.image(i, 120, 150)).save(folder / f"{i}.png")
        question = HOSTILE if i == 1 else "Which digit?"
        lines.append(json.dumps({"question": question, "images": [f"{i}.png"], "answer": "7"}))
    (folder / "own.jsonl").write_text("\n".join(lines))
    limits = dataclasses.asdict(dataclasses.replace(scripted_model.CONFIG, group_size=2, max_calls=2, max_response=192))
    limits = {name: value for name, value in limits.items() if value is not None}
    names = {"data": str(folder / "own.jsonl"), "model": str(folder / "model"), "out": str(folder / "run")}
    (folder / "config.py").write_text(CONFIG.format(limits=limits, **names))
    return folder


def test_an_evaluation(place, capsys):
    code, out, error = command("eval", f"--config={place / 'config.py'}")
    assert code == 0, error
    assert "own" in out and "5 × 2" in out and "metrics.json" in out
    metrics = json.loads((place / "run/metrics.json").read_text())
    row = metrics["benchmarks"]["own"]["modes"]["operations"]["all"]
    records = read_records(place / "run/own/operations")
    scores = [x for record in records for x in record["score"]]
    assert row["questions"] == 5 and row["answers"] == 2 and row["score"]["mean"] == pytest.approx(sum(scores) / 10)
    assert row["score"]["low"] <= row["score"]["mean"] <= row["score"]["high"]
    assert metrics["benchmarks"]["own"]["split"] == "val" and row["tokens"]["mean"] > 3
    seen = Reader((place / "run/report.html").read_text())
    assert seen.tags.count("article") == 2 and seen.runs == 0 and "img" not in seen.tags
    # The same command again has nothing to do, and finds the same.
    before = (place / "run/metrics.json").read_text()
    code, _, error = command("eval", f"--config={place / 'config.py'}")
    assert code == 0 and (place / "run/metrics.json").read_text() == before, error
    code, _, error = command("eval", f"--config={place / 'config.py'}", "--config.seed=1")
    assert code == 1 and "was begun with seed = 0, now it is 1" in error and "Traceback" not in error


@pytest.mark.slow
def test_an_adapter_is_part_of_what_an_evaluation_is(place, tmp_path):
    base, _ = from_pretrained(place / "model")
    adapter = add_lora(base, jax.random.key(0), rank=1, alpha=1.0, targets=r"model.*q_proj")
    save_adapter(adapter, tmp_path / "adapter")
    flags = [f"--config={place / 'config.py'}", f"--config.out={tmp_path / 'out'}", "--config.traces=0"]
    code, _, error = command("eval", *flags, f"--adapter={tmp_path / 'adapter'}")
    assert code == 0, error
    kept = read_records(place / "run/own/operations")  # B is zero: the answers are those of the model itself
    assert [x["score"] for x in read_records(tmp_path / "out/own/operations")] == [x["score"] for x in kept]
    code, _, error = command("eval", *flags)
    assert code == 1 and "adapter_weights" in error


@pytest.mark.slow
def test_calls_in_another_format_are_counted_and_named(place, tmp_path):
    """The scripted model writes its calls as ever, but is asked for those of the first checkpoints."""
    flags = ["--config.rollout.call_format=crop_image", "--config.rollout.max_tokens=4096", f"--config.out={tmp_path}"]
    flags += ["--config.benchmarks.own.buckets=((1, 192, 192, 3072),)", "--config.traces=0"]
    code, out, error = command("eval", f"--config={place / 'config.py'}", *flags)
    assert code == 0, error
    assert "unrecognised %" in out and "are calls in 'pixel_reasoner': set rollout.call_format to it" in error
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    row, (warning,) = metrics["benchmarks"]["own"]["modes"]["operations"]["all"], metrics["warnings"]
    records = read_records(tmp_path / "own/operations")
    odd = sum(x > 0 for record in records for x in record["unrecognised"])
    assert odd > 3 and row["unrecognised"]["mean"] == pytest.approx(odd / 10)
    assert warning.startswith(
        f"own operations: {odd} of 10 answers hold calls that are none in the format 'crop_image'"
    )
    code, _, error = command("eval", f"--config={place / 'config.py'}", "--config.rollout.call_format=mine:ZOOM")
    assert code == 1 and "call format 'mine:ZOOM': there is no module 'mine'" in error and "Traceback" not in error


def start(place, out, **environment):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pixel_jax.cli import main; main()"
    flags = [f"--config={place / 'config.py'}", f"--config.out={out}"]
    return subprocess.Popen(
        [sys.executable, "-c", code, "eval", *flags],
        cwd=ROOT,
        env={**ENVIRONMENT, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(place, tmp_path):
    whole = start(place, tmp_path / "whole")
    assert whole.wait(600) == 0, whole.stderr.read()
    killed = start(place, tmp_path / "killed")
    while killed.poll() is None and not read_records(tmp_path / "killed/own/operations"):
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    again = start(place, tmp_path / "killed")
    assert again.wait(600) == 0, again.stderr.read()
    assert read_records(tmp_path / "killed/own/operations") == read_records(tmp_path / "whole/own/operations")
    first, second = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "killed"))
    assert first == second


@pytest.mark.slow
def test_two_processes_find_what_one_finds(place, tmp_path):
    one = start(place, tmp_path / "one")
    assert one.wait(600) == 0, one.stderr.read()
    port = 20_000 + os.getpid() % 20_000
    shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    shared["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] = "gloo"
    two = [start(place, tmp_path / "two", **shared, JAX_PROCESS_ID=str(i)) for i in range(2)]
    for process in two:
        assert process.wait(600) == 0, process.stderr.read()
    directory = tmp_path / "two/own/operations"
    assert len(list(directory.glob("results-*.jsonl"))) == 2
    assert read_records(directory) == read_records(tmp_path / "one/own/operations")
    first, second = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert first == second


def finished(folder: pathlib.Path, scores, split="val", benchmark="own", mode="operations") -> str:
    """A run directory as an evaluation leaves it, with the given scores."""
    directory = folder / benchmark / mode
    Results(directory).append(records_of(scores))
    settle(directory, {"split": split, "model": str(folder / "model")})
    return str(folder)


def test_two_runs_compared(tmp_path, capsys):
    first = finished(tmp_path / "a", [[0.0]] * 12 + [[1.0]] * 8)
    second = finished(tmp_path / "b", [[1.0]] * 20)
    found = main.compare_runs(first, second)
    assert found["tests"]["own operations"]["p"] == pytest.approx(2 / 2**12)
    assert "+60.0 points" in capsys.readouterr().out
    code, out, error = command("eval", "compare", first, second, f"--json={tmp_path / 'found.json'}")
    assert code == 0 and "12 questions better, 0 worse, of 20" in out, error
    assert json.loads((tmp_path / "found.json").read_text()) == found
    other = finished(tmp_path / "c", [[1.0]], benchmark="vstar")
    with pytest.raises(UserError, match="no benchmark in common"):
        main.compare_runs(first, other)
    with pytest.raises(UserError, match="holds no runs"):
        main.compare_runs(first, str(tmp_path))


def test_a_checkpoint_is_chosen_on_held_out_questions_only(tmp_path, capsys):
    runs = [finished(tmp_path / str(i), [[1.0]] * right + [[0.0]] * (10 - right)) for i, right in enumerate((3, 8, 5))]
    found = main.select(runs)
    assert found["best"] == runs[1] and found["model"].endswith("1/model")
    assert found["scores"][runs[0]]["mean"] == pytest.approx(0.3) and set(found["tests"]) == {runs[0], runs[2]}
    assert "best" in capsys.readouterr().out
    for split in ("test", "train"):
        bad = finished(tmp_path / split, [[1.0]] * 10, split=split)
        with pytest.raises(
            UserError, match=f"answered the split '{split}': checkpoints are chosen on a held-out split"
        ):
            main.select([*runs, bad])
    with pytest.raises(UserError, match="in the mode 'operations' .*x has vstar, .*0 has own"):
        main.select([runs[0], finished(tmp_path / "x", [[1.0]] * 10, benchmark="vstar")])


def test_the_best_of_a_run_is_found_among_its_models(tmp_path, monkeypatch, capsys):
    """Each is asked in a directory of its own, with the run's config otherwise."""
    from pixel_jax import export

    right, asked = {10: 2, 20: 7, 30: 5}, []
    monkeypatch.setattr(export, "candidates", lambda run: dict.fromkeys(right))
    monkeypatch.setattr(export, "model_directory", lambda name: pathlib.Path(name.replace("@", "/models/")))

    def answer(config):
        asked.append((config.model, config.out, config.seed))
        step = int(config.model.rpartition("/")[2])
        finished(pathlib.Path(config.out), [[1.0]] * right[step] + [[0.0]] * (10 - right[step]))

    monkeypatch.setattr(main, "answer", answer)
    config = {
        "model": "-",
        "out": str(tmp_path / "out"),
        "seed": 3,
        "benchmarks": {"own": {"format": "jsonl", "data": "d"}},
    }
    monkeypatch.setattr(main, "FLAGS", argparse.Namespace(config=ml_collections.ConfigDict(config), adapter=None))
    found = main.select_within(pathlib.Path("runs/rl"))
    assert asked == [(f"runs/rl/models/{step}", str(tmp_path / f"out/step-{step}"), 3) for step in right]
    assert found["step"] == 20 and "The best is step 20" in capsys.readouterr().out
    monkeypatch.setattr(export, "candidates", lambda run: {1: None})
    with pytest.raises(UserError, match="runs/rl has 1 models: there is nothing to choose from"):
        main.select_within(pathlib.Path("runs/rl"))


def test_benchmarks_count_alike_and_only_the_mode_with_operations_does(tmp_path, capsys):
    """1,000 questions do not outvote 10, nor do grey crops vote."""
    scores = lambda right, of: [[1.0]] * right + [[0.0]] * (of - right)
    for name, (large, small, grey) in {"a": (600, 2, 9), "b": (500, 8, 0)}.items():
        finished(tmp_path / name, scores(large, 1000), benchmark="large")
        finished(tmp_path / name, scores(small, 10), benchmark="small")
        finished(tmp_path / name, scores(grey, 10), benchmark="small", mode="blank")
    first, second = str(tmp_path / "a"), str(tmp_path / "b")
    found = main.select([first, second])
    assert found["best"] == second and found["mode"] == "operations"
    assert [found["scores"][x]["mean"] for x in (first, second)] == pytest.approx([0.4, 0.65])
    assert found["scores"][first]["benchmarks"]["large"]["mean"] == pytest.approx(0.6)
    assert found["tests"][first]["small"]["p"] == pytest.approx(2 / 2**6) and "operations" in capsys.readouterr().out
    others = [finished(tmp_path / str(i), scores(i, 10), mode="none") for i in (3, 5)]
    assert main.select(others)["best"] == others[1] and "mode 'none' decide" in capsys.readouterr().out
    with pytest.raises(UserError, match="modes in common: none; 'operations' would decide"):
        main.select([first, others[0]])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give a config"),
        (["compare", "a"], "compare needs two run directories"),
        (["select", "a"], "select needs at least two"),
        (["compare", "nowhere", "nowhere"], "nowhere holds no runs"),
        (["fast"], "unexpected argument 'fast'"),
        (["--config=configs/pixel/eval.py", "--config.model=m", "--config.out=o"], "no benchmark has data"),
    ],
)
def test_mistakes_of_eval(arguments, message):
    code, out, error = command("eval", *arguments)
    assert code == 1 and message in error and "Traceback" not in out + error


def test_the_config_has_the_released_settings():
    import importlib.util

    spec = importlib.util.spec_from_file_location("eval_config", ROOT / "configs/pixel/eval.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.model, config.out, config.benchmarks.vstar.data = "m", "o", "vstar_bench"
    loaded = load(EvalConfig, config)
    assert loaded.rollout == RELEASED and loaded.modes == ("operations", "none", "blank") and loaded.batch == 64
    assert loaded.rollout.temperature == 0 and loaded.rollout.group_size == 1 and loaded.rollout.top_p == 1
    assert (loaded.rollout.min_pixels, loaded.rollout.max_pixels) == (401_408, 4_014_080)
    assert {name: x.scorer.rules for name, x in loaded.benchmarks.items()} == {
        "infovqa": ("anls",),
        **dict.fromkeys(("tallyqa", "visualprobe", "own"), ("box",)),
        **dict.fromkeys(("vstar", "mvbench", "hrbench", "videomme", "search"), ("box", "choice")),
    }
    # The longest prompts that pictures and videos can make fit the largest buckets, with some 900 tokens for the text.
    worked_out = {"own", "search", "hrbench", "visualprobe"}  # from what is there
    assert all(loaded.benchmarks[name].buckets is None for name in worked_out)
    for name in loaded.benchmarks.keys() - worked_out:
        for images, height, width, tokens in loaded.benchmarks[name].buckets:
            visual = min(height * width, 5120 * 784) // 784 if images == 1 else 8 * 512
            assert visual + 900 <= tokens
