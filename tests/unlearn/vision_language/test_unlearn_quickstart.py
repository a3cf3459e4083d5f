"""`unlearn-jax` on the quickstart's traces: what a request makes of them, the three commands, and what goes wrong."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from small import LIMITS, make_config, save_model

from pixel_jax.config import ConfigError, load
from pixel_jax.parallel.processes import address
from pixel_jax.quickstart.vocabulary import build_vocabulary
from unlearn_jax import Remove, cg, erase
from unlearn_jax.cli import COMMANDS
from unlearn_jax.quickstart.config import AdapterConfig, Config, ConvergeConfig
from unlearn_jax.quickstart.edit import edit, outcome, train
from unlearn_jax.quickstart.evaluate import evaluate
from unlearn_jax.quickstart.job import ADAPTER, Job
from unlearn_jax.quickstart.measure import table
from unlearn_jax.quickstart.requests import Edited, EditRequest, carried_out, draw_traces, left_by, still_to_do

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


def test_a_request_in_words_and_numbers(words, traces):
    request = EditRequest(("zoom-0",), {"video-1": "12"}, {"direct-0": "Which number is it?"})
    edited = Edited.of(traces, request, words, LIMITS)
    everything = edited.everything()
    texts = [written(words, everything, row) for row in range(10)]
    groups = edited.groups()
    assert {name: index.tolist() for name, index in groups.items()} == {
        "removed": [0],
        "corrected, old answer": [7],
        "corrected, new answer": [8],
        "asked, old question": [4],
        "asked, new question": [9],
        "retained": [1, 2, 3, 5, 6],
    }
    assert edited.forgotten().tolist() == [0, 7, 4]
    old, new = texts[7], texts[8]
    assert "\\boxed{12}" in new[1] and "\\boxed{12}" not in old[1] and "select_frames" in new[1]
    old, new = texts[4], texts[9]
    assert new[1] == old[1] and "Which number is it?" in new[0] and "Which number is it?" not in old[0]
    kinds = [type(x).__name__ for x in edited.edits]
    assert kinds == ["Remove", "CorrectResponse", "ModifyQuery"]
    # The first question of a zoom asks for a look; what it shows is not learned.
    assert "crop_image_normalized" in texts[0][1] and "crop" in texts[0][0]
    assert everything["visual"]["patches"].shape[:2] == (10, 5)  # four frames of a clip and the selected one


def test_requests_that_make_no_sense(words, traces, tmp_path):
    with pytest.raises(
        ValueError, match="no trace has the id 'zoom-9'; there are zoom-0 to zoom-3, direct-0 to direct-1"
    ):
        Edited.of(traces, EditRequest(remove=("zoom-9",)), words, LIMITS)
    path = tmp_path / "request.json"
    for text, message in {
        "{": "request.json is not JSON",
        '{"forget": []}': "unknown key .*request.json.forget",
        '{"correct": {"zoom-0": 7}}': "request.json.correct.zoom-0 must be str, not 7",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            EditRequest.read(path)
    path.write_text('{"remove": ["zoom-1"], "ask": {"zoom-2": "What?"}}')
    assert EditRequest.read(path) == EditRequest(("zoom-1",), {}, {"zoom-2": "What?"})


def test_requests_one_after_another(traces):
    first = EditRequest(("zoom-0",), {"direct-1": "3"}, {"video-0": "What?"})
    left = left_by(traces, first)
    assert list(left) == [name for name in traces if name != "zoom-0"] and list(traces)[0] == "zoom-0"
    assert left["direct-1"].answer == "3" and left["video-0"].query.question == "What?"
    assert left["zoom-1"] is traces["zoom-1"]
    again = still_to_do(first, traces, left)
    assert again.request == EditRequest()
    assert again.done == ["zoom-0 has been removed", "direct-1 is answered '3'", "video-0 is asked 'What?'"]
    mixed = still_to_do(EditRequest(("zoom-0", "direct-1"), {"video-0": "4"}, {"zoom-2": "Where?"}), traces, left)
    assert mixed.request == EditRequest(("direct-1",), {"video-0": "4"}, {"zoom-2": "Where?"})
    assert mixed.done == ["zoom-0 has been removed"]
    both = left_by(left, EditRequest(correct={"video-0": "4"}))["video-0"]
    assert both.answer == "4" and both.query.question == "What?"  # a second change of the same trace keeps the first
    with pytest.raises(ValueError, match="'zoom-0' was removed by an earlier request"):
        still_to_do(EditRequest(correct={"zoom-0": "1"}), traces, left)
    with pytest.raises(ValueError, match="no trace has the id 'zoom-9'; there are zoom-0 to zoom-3"):
        still_to_do(EditRequest(remove=("zoom-9",)), traces, left)


def test_a_request_counts_when_its_report_is_there(tmp_path):
    requests = [EditRequest(("zoom-0",)), EditRequest((), {"direct-0": "1"})]
    for number, request in enumerate(requests, 1):
        place = tmp_path / f"request-{number}"
        place.mkdir()
        (place / "request.json").write_text(json.dumps(dataclasses.asdict(request)))
        assert carried_out(tmp_path) == requests[: number - 1]
        (place / "report.json").write_text("{}")
        assert carried_out(tmp_path) == requests[:number]


# ---- the three commands


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    save_model(directory)
    return directory


def test_an_adapter_leaves_in_the_format_of_peft_and_comes_back(model, tmp_path):
    """Another rank than the configuration's shows where it comes from."""
    first = Job.of(make_config(model, tmp_path / "first", adapter=AdapterConfig(rank=3, alpha=5.0)))
    moved = {name: x + 0.1 for name, x in first.fresh.items()}
    first.save(ADAPTER, moved)
    second = Job.of(make_config(model, tmp_path / "second", start=str(tmp_path / "first/adapter")))
    assert second.fresh.keys() == moved.keys() and second.config.trained()["start"] == str(tmp_path / "first/adapter")
    for name, x in moved.items():
        np.testing.assert_array_equal(second.fresh[name], x)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """Everything on one device: (configuration, what training, the edit and the evaluation returned)."""
    config = make_config(model, tmp_path_factory.mktemp("run"))
    return config, train(config), edit(config), evaluate(config)


@pytest.mark.slow
def test_an_edit_moves_toward_the_warm_retrain(run):
    config, trained, report, rows = run
    assert trained["gradient_norm"] < 0.1
    values = json.loads((config.directory / "curve.json").read_text())["values"]
    assert values[-1] < values[0] - 2
    assert report["edited"] == 3 and report["edits"] == {"Remove": 1, "CorrectResponse": 1, "ModifyQuery": 1}
    before, edited = rows["before"], rows["edited"]
    for name in ("kl_forget", "kl_new", "objective"):
        assert edited[name] < 0.5 * before[name]
    assert edited["distance"] < before["distance"] and edited["cosine"] > 0.5
    for row in rows.values():
        assert 0 <= row["memorized"] <= 1 and 0 < row["extraction"] <= 1 and 0 <= row["auc"] <= 1
    assert before["memorized"] > 0.5 and rows["warm retrain"]["privleak"] == 0
    losses = report["losses"]
    assert losses["edited"]["removed"] > losses["before"]["removed"]
    assert losses["edited"]["corrected, new answer"] < losses["before"]["corrected, new answer"]
    assert losses["edited"]["asked, new question"] < losses["before"]["asked, new question"]
    assert json.loads((config.directory / "request-1" / "evaluation.json").read_text()) == rows
    spent = report["example_gradients"]
    assert all(0 < rows[name]["example_gradients"] <= spent for name in config.evaluation.baselines)
    assert max(rows["warm retrain"][name] for name in ("kl_forget", "kl_retain", "distance")) < 1e-5


@pytest.mark.slow
def test_two_processes_train_the_same_adapter(model, tmp_path):
    """Joined by the launcher; only one of them writes."""
    found = {}
    for name, start in (("one", []), ("two", ["bash", "launch/processes.sh", "2"])):
        code = (
            f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(pathlib.Path(__file__).parent)!r}]; "
            "from small import make_config; from unlearn_jax.quickstart import job; "
            "from unlearn_jax.quickstart.config import ConvergeConfig; "
            "from unlearn_jax.quickstart.edit import train; "
            "mesh = processes.start(); "
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
def test_a_second_request_starts_from_what_the_first_left(model, tmp_path, capsys):
    config = make_config(model, tmp_path, training=ConvergeConfig(max_steps=5))
    train(config)
    files = lambda: (
        {path: path.read_bytes() for path in tmp_path.glob("*") if path.is_file()}
        | {path: path.read_bytes() for path in tmp_path.glob("request-*/*")}
    )
    first_report = edit(config, EditRequest(correct={"direct-1": "3"}))
    assert first_report["edits"] == {"CorrectResponse": 1}
    assert outcome(first_report) in capsys.readouterr().out
    kept = json.loads((tmp_path / "request-1" / "report.json").read_text())
    assert {name: kept[name] for name in ("verdict", "reason", "limits", "epochs")} == {
        name: first_report[name] for name in ("verdict", "reason", "limits", "epochs")
    }
    before = files()
    assert edit(config, EditRequest(correct={"direct-1": "3"})) is None and "nothing to do" in capsys.readouterr().out
    assert files() == before
    other = next(digit for digit in "12" if digit != draw_traces(config.traces, config.seed)["direct-0"].answer)
    second = edit(config, EditRequest(remove=("direct-1",), correct={"direct-0": other}))
    assert second["examples"] == 8 and second["edited"] == 2
    assert before.items() <= files().items()  # nothing was written over
    third = edit(config, EditRequest(remove=("zoom-0",)))
    assert third["examples"] == 7
    first, last = (load_file(tmp_path / f"request-{n}" / "edited.safetensors") for n in (1, 3))
    assert any((first[key] != last[key]).any() for key in first)
    assert evaluate(config)["before"]["kl_forget"] >= 0
    assert (tmp_path / "request-3" / "evaluation.json").exists()


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
    dataclasses.replace(config, erasure=dataclasses.replace(config.erasure, solver=cg(rtol=0.5))).check_trained()


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
        found[name] = load_file(tmp_path / name / "request-1" / "edited.safetensors")
        rows[name] = json.loads((tmp_path / name / "request-1" / "evaluation.json").read_text())
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
    "a stray argument": (["erase", "request.json"], 1, "unexpected argument 'request.json'"),
    "no model": (
        ["train", "--config.model=nowhere", "--config.out={out}"],
        1,
        "nowhere is not a model directory.*quickstart",
    ),
    "no adapter": (["eval", "--config.out={out}"], 1, "holds no adapter: run `unlearn-jax train`"),
    "a request that is not there": (["erase", "--request=nowhere.json"], 1, "nowhere.json"),
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
    assert code == 0 and all(name in out for name in ("unlearn-jax erase", "--request", "--devices", "--config"))


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


def test_what_became_of_a_request_is_said_in_words():
    x = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    data, loss = {"x": x}, lambda params, example: (example["x"] @ params - 1) ** 2
    config = {"weight_decay": 1e-2, "training_epochs": 2.0, "epochs": 40.0}
    with pytest.warns(UserWarning, match="a retrain would have been cheaper"):
        found = erase(loss, np.ones(3, np.float32), data, [Remove([3, 4])], config)
    report = json.loads(found.report.to_json())
    said = outcome(report)
    assert said.startswith(f"edited: {found.report.reason}\nlimits that were met:\n")
    assert all(f"\n  - {limit}\n" in said for limit in report["limits"]) and report["limits"]
    assert f"cost: {report['epochs']:.3g} epochs of gradients" in said and "the training took 2\n" in said
    report = json.loads(erase(loss, np.ones(3, np.float32), data, []).report.to_json())
    said = outcome(report)
    assert said.startswith("nothing_to_do: the edits leave the gradient") and "\nno limit was met\n" in said
    assert "training_epochs does not say" in said and "0 of 20 traces edited" in said


def test_tables_show_what_there_is():
    shown = table({"a": {"x": 1.23456, "y": 3}, "longer": {"y": 12345}}, "row").split("\n")
    assert shown == ["row         x      y", "a       1.235      3", "longer      -  12345"]
    assert jax.process_index() == 0
