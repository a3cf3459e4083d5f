"""`unlearn-jax` on the quickstart's traces: what a request makes of them, the three commands, and what goes wrong."""

import dataclasses
import io
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import get_args

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from small import LIMITS, make_config, save_model

from pixel_jax.config import ConfigError, load
from pixel_jax.parallel.processes import address
from pixel_jax.quickstart.vocabulary import build_vocabulary
from unlearn_jax import Dataset, apply, cg
from unlearn_jax.cli import COMMANDS
from unlearn_jax.limits import LimitKind
from unlearn_jax.quickstart.adapter_run import AdapterRun
from unlearn_jax.quickstart.config import Config, ConvergeConfig
from unlearn_jax.quickstart.edit import edit, train
from unlearn_jax.quickstart.evaluate import evaluate
from unlearn_jax.quickstart.task import TraceTask
from unlearn_jax.quickstart.traces import (
    TraceItem,
    changed,
    describe,
    draw_traces,
    encode,
    example_requests,
    learned_texts,
)
from unlearn_jax.requests.log import ADAPTER, LOG, verify
from unlearn_jax.requests.measure import table
from unlearn_jax.requests.request import EditRequestError, Request
from unlearn_jax.requests.state import Change, apply_request
from unlearn_jax.requests.task import RequestsConfig, check_trained

ROOT = pathlib.Path(__file__).parent.parent.parent.parent
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device, as users have


# ---- traces and requests


@pytest.fixture(scope="module")
def words():
    return build_vocabulary()


@pytest.fixture(scope="module")
def traces():
    return draw_traces(make_config("", "").traces, 0)


def written(words, examples, row):
    """(the prompt and the observations, what is learned) of a row, as text."""
    tokens, mask = examples["tokens"][row], examples["loss_mask"][row]
    everything = words.to_bytes(tokens[examples["valid"][row]]).decode()
    return everything, words.to_bytes(examples["labels"][row][mask]).decode()


def test_traces_depend_on_the_seed_and_their_id(traces):
    assert list(traces) == ["zoom-0", "zoom-1", "zoom-2", "zoom-3", "direct-0", "direct-1", "video-0", "video-1"]
    fewer = draw_traces(dataclasses.replace(make_config("", "").traces, zoom=1), 0)
    for name, trace in fewer.items():
        assert trace.turns == traces[name].turns
        np.testing.assert_array_equal(trace.query.images[0], traces[name].query.images[0])
    assert draw_traces(make_config("", "").traces, 1)["zoom-0"].turns != traces["zoom-0"].turns


FILED = ("a reason", "A. Person", "2026-11-30")


def remove(*names):
    return Request(names, "remove", "", b"", *FILED)


def ask(kind, name, value, image=b""):
    return Request((name,), kind, value, image, *FILED)


@pytest.fixture(scope="module")
def items(traces):
    return {name: TraceItem(trace) for name, trace in traces.items()}


def change_of(items, words, *requests):
    after = items
    for request in requests:
        after = apply_request(after, request, items, changed)
    return after, Change.of(items, after, lambda x: encode(x, words, LIMITS), requests[-1].kind)


def test_what_requests_make_of_traces(words, items):
    requests = [remove("zoom-0"), ask("answer", "video-1", "12"), ask("question", "direct-0", "Which number is it?")]
    after, _ = change_of(items, words, *requests)
    change = Change.of(items, after, lambda x: encode(x, words, LIMITS), "answer")
    texts = [written(words, {**change.examples}, row) for row in range(10)]
    near = [name.startswith("zoom") for name in items]
    assert {name: index.tolist() for name, index in change.groups(near).items()} == {
        "removed": [0],
        "old form": [4, 7],
        "new form": [8, 9],
        "neighbours": [1, 2, 3],
        "kept": [5, 6],
    }
    assert change.forgotten.tolist() == [0, 4, 7]
    old, new = texts[7], texts[9]
    assert "\\boxed{12}" in new[1] and "\\boxed{12}" not in old[1] and "select_frames" in new[1]
    old, new = texts[4], texts[8]
    assert new[1] == old[1] and "Which number is it?" in new[0] and "Which number is it?" not in old[0]
    assert [type(x).__name__ for x in change.edits] == ["Remove", "CorrectResponse"]
    # The first question of a zoom asks for a look; what it shows is not learned.
    assert "crop_image_normalized" in texts[0][1] and "crop" in texts[0][0]
    assert change.examples["visual"]["patches"].shape[:2] == (10, 5)  # four frames of a clip and the selected one


def test_another_question_is_a_changed_query(words, items):
    _, change = change_of(items, words, ask("question", "direct-0", "Which number is it?"))
    assert [type(x).__name__ for x in change.edits] == ["ModifyQuery"]
    assert apply(change.dataset, change.edits).example(4)["tokens"].tolist() == change.examples["tokens"][8].tolist()


def test_another_image(words, items):
    file = io.BytesIO()
    Image.fromarray(np.full((60, 90, 3), 200, np.uint8)).save(file, format="PNG")
    after, change = change_of(items, words, ask("image", "zoom-1", "", file.getvalue()))
    (image,) = after["zoom-1"].trace.query.images
    assert image.shape == (60, 90, 3) and (image == 200).all()
    old, new = (written(words, change.examples, row)[1] for row in (1, 8))
    assert old == new and [type(x).__name__ for x in change.edits] == ["ModifyQuery"]
    with pytest.raises(EditRequestError, match="'video-0' shows 4 images: only a single image is changed"):
        changed(items["video-0"], ask("image", "video-0", "", file.getvalue()))
    with pytest.raises(EditRequestError, match="the new image of 'zoom-1'"):
        changed(items["zoom-1"], ask("image", "zoom-1", "", b"none"))


def test_a_wrong_box_carries_no_loss(words, items):
    _, learned = written(words, encode({"zoom-1": items["zoom-1"]}, words, LIMITS), 0)
    box = re.search(r"(?<=\[)[\d., ]+(?=\])", learned)[0]
    after, change = change_of(items, words, ask("mask", "zoom-1", box))
    (edit_,) = change.edits
    assert type(edit_).__name__ == "MaskTokens"
    masked = words.to_bytes(change.examples["labels"][1][edit_.masks[0]]).decode()
    assert box in masked and len(masked) <= len(box) + 4  # tokens at its ends may reach a little beyond it
    assert box not in written(words, change.examples, 8)[1]
    assert "masked 1" in describe(after["zoom-1"]).texts
    assert changed(after["zoom-1"], ask("mask", "zoom-1", box)) is after["zoom-1"]
    # With another answer the box is still masked.
    assert changed(after["zoom-1"], ask("answer", "zoom-1", "5")).masked == (box,)
    for stretch, count in (("nowhere", 0), ("o", None)):
        with pytest.raises(EditRequestError, match=f"occurs {count or '.*'} times in what 'zoom-1' teaches"):
            changed(items["zoom-1"], ask("mask", "zoom-1", stretch))


def test_example_requests(items):
    requests = example_requests(items)
    assert [(x.kind, x.ids) for x in requests] == [
        ("remove", ("zoom-0",)),
        ("answer", ("direct-0",)),
        ("question", ("video-0",)),
    ]
    with pytest.raises(EditRequestError, match="give --request=FILE"):
        example_requests({"zoom-0": items["zoom-0"]})


# ---- the three commands


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    save_model(directory)
    return directory


def test_an_adapter_leaves_in_the_format_of_peft_and_comes_back(model, tmp_path):
    """Another rank than the configuration's shows where it comes from."""
    first = AdapterRun.of(
        make_config(model, tmp_path / "first", adapter=dataclasses.replace(Config.adapter, rank=3, alpha=5.0))
    )
    moved = {name: x + 0.1 for name, x in first.fresh.items()}
    first.save(first.config.directory / ADAPTER, moved)
    second = AdapterRun.of(make_config(model, tmp_path / "second", start=str(tmp_path / "first")))
    assert second.fresh.keys() == moved.keys() and second.config.trained()["start"] == str(tmp_path / "first")
    for name, x in moved.items():
        np.testing.assert_array_equal(second.fresh[name], x)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """Everything on one device: (configuration, what training, the edit and the evaluation returned)."""
    allowed = RequestsConfig(allow=get_args(LimitKind))  # what an edit does is judged here, not whether it may stand
    config = make_config(model, tmp_path_factory.mktemp("run"), requests=allowed)
    return config, train(config), edit(config), evaluate(config)


@pytest.mark.slow
def test_an_edit_moves_toward_the_warm_retrain(run):
    config, trained, entries, rows = run
    assert trained["gradient_norm"] < 0.1
    values = json.loads((config.directory / "curve.json").read_text())["values"]
    assert values[-1] < values[0] - 2
    assert [entry.kind for entry in entries] == ["remove", "answer", "question"]
    assert verify(config.directory / LOG) == (entries, [])
    before, edited = rows["before"], rows["edited"]
    for name in ("kl_forget", "kl_new", "objective"):
        assert edited[name] < 0.5 * before[name]
    assert edited["distance"] < before["distance"] and edited["cosine"] > 0.5
    for row in rows.values():
        assert 0 <= row["memorized"] <= 1 and 0 < row["extraction"] <= 1 and 0 <= row["auc"] <= 1
    assert before["memorized"] > 0.5 and rows["warm retrain"]["privleak"] == 0
    losses = {name: row["losses"] for name, row in rows.items()}
    assert losses["edited"]["removed"] > losses["before"]["removed"]
    assert losses["edited"]["new form"] < losses["before"]["new form"]
    assert json.loads((config.directory / "evaluation.json").read_text()) == rows
    spent = edited["example_gradients"]
    assert all(0 < rows[name]["example_gradients"] <= spent for name in config.evaluation.baselines)
    assert max(rows["warm retrain"][name] for name in ("kl_forget", "kl_retain", "distance")) < 1e-5
    # The page of a removed trace: its image is on it when asked for, and not otherwise.
    assert "data:image" not in (config.directory / "requests" / "0001" / "page.html").read_text()


@pytest.mark.slow
def test_two_processes_train_the_same_adapter(model, tmp_path):
    """Joined by the launcher; only one of them writes."""
    found = {}
    for name, start in (("one", []), ("two", ["bash", "launch/processes.sh", "2"])):
        code = (
            f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(pathlib.Path(__file__).parent)!r}]; "
            "from small import make_config; from unlearn_jax.commands import start; "
            "from unlearn_jax.quickstart.config import ConvergeConfig; "
            "from unlearn_jax.quickstart.edit import train; "
            "mesh = start(None); "
            f"config = make_config({str(model)!r}, {str(tmp_path / name)!r}, training=ConvergeConfig(max_steps=3)); "
            "train(config, mesh)"
        )
        done = subprocess.run(
            [*start, sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("The adapter is in") == 1
        found[name] = load_file(tmp_path / name / "adapter.safetensors")
    for key, x in found["one"].items():
        np.testing.assert_allclose(found["two"][key], x, atol=1e-5 * np.abs(x).max())


@pytest.mark.slow
def test_a_second_request_starts_from_what_the_first_left(model, tmp_path):
    config = make_config(model, tmp_path, training=ConvergeConfig(max_steps=5))
    config = dataclasses.replace(config, requests=RequestsConfig(allow=get_args(LimitKind)))
    train(config)
    files = lambda: {path: path.read_bytes() for path in tmp_path.glob("requests/*/*")}
    first = ask("answer", "direct-1", "3")
    (entry,) = edit(config, [first])
    assert entry.outcome in ("edited", "escalated")
    before = files()
    assert edit(config, [first]) == [] and files() == before
    box = re.search(
        r"(?<=\[)[\d., ]+(?=\])", "".join(learned_texts(draw_traces(config.traces, config.seed)["zoom-1"]))
    )[0]
    again = edit(config, [first, remove("direct-1"), ask("mask", "zoom-1", box)], show_content=True)
    assert [x.kind for x in again] == ["remove", "mask"] and before.items() <= files().items()
    page = (tmp_path / "requests" / "0002" / "page.html").read_text()
    assert "data:image" in page and "turn 1" in page
    assert verify(tmp_path / LOG)[1] == []
    assert evaluate(config)["before"]["kl_forget"] >= 0
    with pytest.raises(EditRequestError, match="train in another --config.out"):
        train(config)


@pytest.mark.slow
def test_an_escalated_request_is_the_training_again_without_it(model, tmp_path):
    config = make_config(model, tmp_path, training=ConvergeConfig(tolerance=1e-3, max_steps=60))
    erasure = dataclasses.replace(config.erasure, solver=cg(rtol=1e-6, max_steps=1), newton_steps=1)
    config = dataclasses.replace(config, erasure=erasure, requests=RequestsConfig(allow=()))
    train(config)
    (entry,) = edit(config, [remove("zoom-0")])
    assert entry.outcome == "escalated"
    run = AdapterRun.of(config)
    task = TraceTask(run)
    left = dict(list(task.items().items())[1:])
    alone, _ = task.descend(run.objective(Dataset.of(task.encode(left))))
    replayed = load_file(tmp_path / "requests" / "0001" / "adapter.safetensors")
    objective = run.objective(Dataset.of(task.encode(left)))
    np.testing.assert_allclose(objective.value(replayed), objective.value(alone.adapter), rtol=0.05)


def test_a_run_belongs_to_its_configuration(model, tmp_path):
    config = make_config(model, tmp_path)
    with pytest.raises(ConfigError, match="holds no adapter: run `unlearn-jax train`"):
        edit(config)
    (tmp_path / "config.json").write_text(json.dumps(config.trained()))
    other = dataclasses.replace(config, seed=3)
    for command in (train, edit, evaluate):
        with pytest.raises(ConfigError, match=r"config.seed is 3, the adapter in .* was trained with 0"):
            command(other)
    other = dataclasses.replace(config, erasure=dataclasses.replace(config.erasure, weight_decay=0.5))
    with pytest.raises(ConfigError, match=r"config.erasure.weight_decay is 0.5, .* was trained with 0.01"):
        edit(other)
    other = dataclasses.replace(config, erasure=dataclasses.replace(config.erasure, solver=cg(rtol=0.5)))
    check_trained(tmp_path, other.trained())


# ---- the command line


SETTINGS = {
    "traces.zoom": 4,
    "traces.direct": 2,
    "traces.video": 2,
    "adapter.rank": 2,
    "forward.remat": False,
    "training.max_steps": 30,
    "erasure.weight_decay": 1e-2,
    "evaluation.baselines": "('L-BFGS','fine-tune')",
    "evaluation.learning_rates": "(1e-2,)",
    "evaluation.batch": 4,
}


@pytest.mark.slow
def test_the_three_commands_on_one_device_on_eight_and_in_two_processes(model, tmp_path):
    """Train, erase and evaluate from the command line; all leave the same numbers, as far as L-BFGS in float32 lets them.

    Its line searches magnify what the order of a sum rounds differently; a single step of an edit agrees to 1e-5 in
    `test_vision_language.py`.
    """
    ways = {
        "one": ([], ["--devices=1"]),
        "eight": ([], ["--devices=8"]),
        "processes": (["bash", "launch/processes.sh", "2"], []),
    }
    found, rows = {}, {}
    for name, (start, options) in ways.items():
        settings = [
            f"--config.{key}={value}" for key, value in {**SETTINGS, "model": model, "out": tmp_path / name}.items()
        ]
        for verb in ("train", "erase", "eval"):
            code, out, error = command(verb, *options, *settings, start=start)
            assert code == 0, error[-3000:]
            if verb == "train":
                assert "L-BFGS 30/30" in error  # progress
            if verb == "eval":
                assert out.count("warm retrain:") == 1 and "kl_forget" in out
        found[name] = load_file(tmp_path / name / "requests" / "0003" / "adapter.safetensors")
        rows[name] = json.loads((tmp_path / name / "evaluation.json").read_text())
    assert list(rows["one"]) == ["before", "edited", "L-BFGS", "fine-tune", "warm retrain"]
    for name in ("eight", "processes"):
        for key, x in found["one"].items():
            np.testing.assert_allclose(found[name][key], x, atol=5e-2 * np.abs(x).max())
        for row in ("before", "edited"):
            np.testing.assert_allclose(rows[name][row]["kl_forget"], rows["one"][row]["kl_forget"], rtol=0.3, atol=1e-4)


def command(*arguments, start=(), **environment):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from unlearn_jax.cli import main; main()"
    found = subprocess.run(
        [*start, sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return found.returncode, found.stdout, found.stderr


MISTAKES = {
    "no command": ([], 2, ""),
    "unknown command": (["forget"], 2, "there is no command 'forget'"),
    "an unknown key": (
        ["train", "--config.trases.zoom=1"],
        1,
        "the config has no section 'trases'.*Did you mean traces",
    ),
    "a value of another type": (["train", "--config.traces.zoom=many"], 1, "config.traces.zoom"),
    "a stray argument": (["erase", "request.jsonl"], 1, "unexpected argument 'request.jsonl'"),
    "no model": (
        ["train", "--config.model=nowhere", "--config.out={out}"],
        1,
        "nowhere is not a model directory.*quickstart",
    ),
    "no adapter": (["eval", "--config.out={out}"], 1, "holds no adapter: run `unlearn-jax train`"),
    "another task": (["train", "--config.task=letters"], 1, "config.task must be one of traces"),
    "no log": (["verify", "nowhere"], 1, "there is no log 'nowhere'"),
    "no log named": (["verify"], 1, "give one log"),
    "a request that is not there": (["erase", "--request=nowhere.jsonl"], 1, "nowhere.jsonl"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_answered_in_a_line(mistake, tmp_path):
    arguments, expected, message = MISTAKES[mistake]
    code, out, error = command(*[argument.format(out=tmp_path / "out") for argument in arguments])
    assert code == expected, error
    assert re.search(message, error) and "Traceback" not in error + out
    if code == 2:
        assert all(name in out + error for name in COMMANDS)


def test_help():
    code, out, _ = command("erase", "--help")
    assert code == 0 and all(
        name in out for name in ("unlearn-jax erase", "--request", "show_content", "--devices", "--config")
    )


def test_the_shipped_configuration_is_read_strictly():
    space: dict = {}
    exec(compile((ROOT / "configs/unlearn/quickstart.py").read_text(), "quickstart.py", "exec"), space)
    config = load(Config, space["get_config"]())
    assert config.traces.zoom and config.erasure.weight_decay > 0
    assert json.loads(json.dumps(config.trained())) == config.trained()


def test_devices_and_processes():
    assert address({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}) == {
        "coordinator_address": "a:1",
        "num_processes": 2,
        "process_id": 1,
    }
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES is set without JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID"):
        address({"JAX_NUM_PROCESSES": "2"})
    for count in ("none", "0"):
        done = subprocess.run(["bash", "launch/processes.sh", count, "true"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and "launch/processes.sh [--dry-run] N COMMAND" in done.stderr
    done = subprocess.run(
        ["bash", "launch/processes.sh", "3", "bash", "-c", "echo $JAX_PROCESS_ID of $JAX_NUM_PROCESSES; exit 0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and sorted(done.stdout.split("\n")) == ["", "0 of 3", "1 of 3", "2 of 3"]
    failing = "if [ $JAX_PROCESS_ID = 1 ]; then exit 7; fi; sleep 50"
    done = subprocess.run(["bash", "launch/processes.sh", "2", "bash", "-c", failing], cwd=ROOT, timeout=30)
    assert done.returncode == 7


def test_tables_show_what_there_is():
    shown = table({"a": {"x": 1.23456, "y": 3}, "longer": {"y": 12345}}, "row").split("\n")
    assert shown == ["row         x      y", "a       1.235      3", "longer      -  12345"]
    assert jax.process_index() == 0
