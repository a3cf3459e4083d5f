"""The commands as a person starts them: what goes wrong is said in a line, and what goes right leaves what it promised."""

import contextlib
import dataclasses
import functools
import html
import json
import os
import pathlib
import re
import subprocess
import sys
import types
import typing

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

from pixel_jax import cli
from pixel_jax.cli import COMMANDS
from pixel_jax.evaluation import transcript as traces
from pixel_jax.evaluation.config import BenchmarkConfig, EvalConfig
from pixel_jax.evaluation.transcript import Picture, ShownTurn, Transcript
from pixel_jax.models.io import from_pretrained, save_pretrained
from pixel_jax.models.layers import LoRAWeight
from pixel_jax.models.lora import add_lora, split
from pixel_jax.models.peft import load_adapter, save_adapter
from pixel_jax.models.processor import Processor
from pixel_jax.quickstart.config import QuickstartConfig
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.run_record import RunRecord
from pixel_jax.terminal import QUIET
from pixel_jax.train_config import TrainConfig
from pixel_jax.training.writers import read_metrics
from tests.evaluation.test_report import HOSTILE, Reader
from tests.rollouts import scripted_model
from unlearn_jax.quickstart.config import Config as UnlearnConfig

ROOT = pathlib.Path(__file__).parent.parent
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device, as users have


def command(*arguments, cwd=ROOT, **environment):
    """`pixel-jax arguments ...` in a process of its own: exit code, standard output, standard error."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pixel_jax.cli import main; main()"
    found = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    return found.returncode, found.stdout, found.stderr


OWN_DATA = "--config=configs/pixel/own_data.py"
GIVEN = (OWN_DATA, "--config.model=nowhere", "--config.data=nowhere.jsonl")
MISTAKES = {
    "no command": ([], 2, ""),
    "unknown command": (["trian"], 2, "there is no command 'trian'"),
    "a part of the check that is none": (
        ["check", "--only=kernel"],
        1,
        "no part kernel; the parts are machine, kernels",
    ),
    "a check of no model": (["check", "nowhere", "--out={out}"], 1, "wrong: model. .*out has the record"),
    "a check of data alone": (
        ["check", "--data=a.jsonl"],
        1,
        "are checked with a model: pixel-jax check DIR --data=FILE",
    ),
    "a check of two models": (["check", "a", "b"], 1, "unexpected argument 'b': give one model"),
    "export of nothing": (["export", "nowhere", "--out=x"], 1, "nowhere has no checkpoints"),
    "view without a file": (["view"], 1, "give directories of runs"),
    "view of nothing": (["view", "nowhere.json"], 1, "nowhere.json"),
    "view of something else": (["view", "pyproject.toml"], 1, "pyproject.toml is not JSON"),
    "chat without a model": (["chat"], 1, "give the directory of a model: pixel-jax chat DIR"),
    "chat with no model": (
        ["chat", "nowhere", "--question=?"],
        1,
        "nowhere is not a model directory: .* models are not downloaded",
    ),
    "serve without a model": (["serve"], 1, "give the directory of a model, or several as NAME=DIR"),
    "serve with no model": (["serve", "nowhere", "--port=0"], 1, "nowhere is not a model directory"),
    "serve where others come": (["serve", "a", "--host=0.0.0.0"], 1, "PIXEL_JAX_API_KEY is not set: export PIXEL_JAX"),
    "serve nowhere": (["serve", "a", "--host=192.0.2.1", "--key=HOME"], 1, "--host=192.0.2.1 --port=8000 cannot be"),
    "two models of one name": (["serve", "x/a", "y/a"], 1, "two models are called 'a', x/a and y/a: name one as"),
    "a page that is a folder": (
        ["chat", "model", "--html=."],
        1,
        "--html=. is a directory: give the name of a file in it",
    ),
    "a comparison that is a folder": (
        ["eval", "compare", "a", "b", "--json=."],
        1,
        "--json=. is a directory: give the",
    ),
    "a record in no folder": (
        ["eval", "compare", "a", "b", "--json=no/x"],
        1,
        "--json=no/x: there is no directory no$",
    ),
    "a page of runs that is a folder": (["view", "a", "--out=."], 1, "--out=. is a directory: give the name of a file"),
    "figures that are a folder": (["bench", "--out=."], 1, "--out=. is a directory: give the name of a file in it"),
    "a check that is a folder": (["check", "--out=."], 1, "--out=. is a directory: give the name of a file in it"),
    "chat about no image": (["chat", "model", "nowhere.png", "--question=?"], 1, "'nowhere.png' cannot be opened"),
    "sft without a config": (["sft"], 1, "pixel-jax sft: give --config=...$"),
    "sft with a missing config": (
        ["sft", "--config=nowhere.py"],
        1,
        "no file .*/nowhere.py', and no config .*pixel/own_data, ",
    ),
    "a misspelt flag": (["eval", "--confg=a.py"], 1, "eval: Unknown command line flag 'confg'. Did you mean: config"),
    "comparing what is not there": (["eval", "compare", "a", "b"], 1, "eval: a holds no runs of benchmarks$"),
    "a word the config does not know": (
        ["rl", "--config=configs/pixel/qwen2_5_vl_7b_rl.py:qlora"],
        1,
        "7b_rl.py:qlora: no algorithm is called 'qlora'; known are .*rloo$",
    ),
    "sft without a required value": (["sft", *GIVEN], 1, "config lacks out, which TrainConfig requires"),
    "a bucket": (["rl", *GIVEN, "--config.out=gs://b/rl"], 1, "config: out is 'gs://b/rl': files are local; mount"),
    "rl without a model": (["rl", *GIVEN, "--config.out={out}"], 1, "nowhere is not a model directory"),
    "an unknown key": (
        ["sft", OWN_DATA, "--config.sft.stepz=1"],
        1,
        "unknown key config.sft.stepz; .*config.sft.steps$",
    ),
    "an unknown section": (
        ["sft", OWN_DATA, "--config.stf.steps=1"],
        1,
        "no section 'stf' to set --config.stf.steps=1 in",
    ),
    "a key that is unknown to the defaults": (
        ["quickstart", "--config.rl.iteratoins=1"],
        1,
        "unknown key config.rl.iteratoins",
    ),
    "a value of another type": (["quickstart", "--config.rl.iterations=many"], 1, "config.rl.iterations"),
    "a plan for no machine": (["plan", *GIVEN, "--config.out=o"], 1, "name a machine, as in --topology=v6e:16x16"),
    "a plan without shapes": (
        ["plan", *GIVEN, "--config.out=o", "--topology=cpu:1"],
        1,
        "a plan reads no data, from which shapes are worked out: give config.trace_tokens, config.trace_frames, config.trace",
    ),
    "half a shape by hand": (
        ["rl", *GIVEN, "--config.out=o", "--config.image_buffer=(1, 64, 64)"],
        1,
        "config: image_buffer, prompt_width come together, or none of them: only image_buffer is given",
    ),
    "a plan nowhere": (
        ["plan", *GIVEN, "--topology=cpu:1", "--json=no/p.json"],
        1,
        "--json=no/p.json: there is no directory no$",
    ),
    "a name that steers a terminal": (
        ["view", "\x1b]0;PWN\x07.json"],
        1,
        r"no file or directory '\\x1b\]0;PWN\\x07.json'",
    ),
    "a stray argument": (["quickstart", "fast"], 1, "unexpected argument 'fast'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_answered_in_a_line(mistake, tmp_path):
    arguments, expected, message = MISTAKES[mistake]
    arguments = [argument.format(out=tmp_path / "out") for argument in arguments]
    code, out, error = command(*arguments, **{QUIET: "1"})  # a slow machine would say what it waits for
    assert code == expected, error
    assert re.search(message, error) and "Traceback" not in error + out
    if code == 2:
        assert all(name in out + error for name in COMMANDS)
    else:
        assert error.strip().count("\n") == 0


MEMORY = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 96.00GiB."


@pytest.mark.parametrize("command, error, said", [
    ("rl", jax.errors.JaxRuntimeError(MEMORY), "allocate 96.00GiB..*the most first: lower config.rl.rollout.in_flight; raise"),
    ("sft", ValueError(f"INTERNAL: {MEMORY}\nallocator"), "the most first: raise config.sft.forward.micro_batches; set"),
    ("chat", jax.errors.JaxRuntimeError(MEMORY), "the most first: give smaller or fewer images"),
    ("plan", jax.errors.JaxRuntimeError(MEMORY), "the most first: give it less to do at a time"),
])  # fmt: skip
def test_a_full_device_names_the_keys_to_change(command, error, said, monkeypatch, capsys):
    """In a line, whichever class the error has; any other error of the runtime keeps its place in the code."""
    module = types.SimpleNamespace(__name__="command", __doc__="", define_flags=lambda command: None)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(sys, "argv", ["pixel-jax", command])
    monkeypatch.setattr(cli, "leaving", contextlib.nullcontext)  # which ends the process
    monkeypatch.setattr(cli.SIGNALS, "listen", lambda name: None)
    monkeypatch.setattr(cli, "keep_streams", lambda: None)

    def fail(error):
        def main(command, arguments):
            raise error

        monkeypatch.setattr(module, "main", main, raising=False)
        monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
        monkeypatch.setattr(cli.flags, "DEFINE_bool", functools.partial(flags.DEFINE_bool, flag_values=flags.FLAGS))
        monkeypatch.setattr(cli.app, "run", lambda run, argv, flags_parser: run(flags_parser(argv)))
        cli.run_program("pixel-jax", COMMANDS)

    with pytest.raises(SystemExit) as end:
        fail(error)
    written = capsys.readouterr().err
    assert end.value.code == 1 and re.fullmatch(
        f"pixel-jax {command}: the memory of a device is full .*{said}.*\n", written
    )
    with pytest.raises(jax.errors.JaxRuntimeError):
        fail(jax.errors.JaxRuntimeError("INTERNAL: something else"))


def test_what_jax_says_of_a_full_device_is_recognised():
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jax.block_until_ready(jax.numpy.zeros(2**47, jax.numpy.uint8))  # more than processes can address
    assert cli.out_of_memory("pixel-jax sft", error.value).startswith(
        "the memory of a device is full (RESOURCE_EXHAUSTED: "
    )


@pytest.mark.parametrize("command", cli.LESS_MEMORY)
def test_the_keys_that_save_memory_are_there(command):
    """In the dataclass that the command's config becomes."""
    config = {
        "pixel-jax sft": TrainConfig,
        "pixel-jax rl": TrainConfig,
        "pixel-jax eval": EvalConfig,
        "pixel-jax quickstart": QuickstartConfig,
    }.get(command, UnlearnConfig)
    said = " ".join(cli.LESS_MEMORY[command])
    keys = re.findall(r"config((?:\.\w+)+)", said)
    for key in keys:
        kind = config
        for name in key.split(".")[1:]:
            if kind is BenchmarkConfig and name == "NAME":
                continue
            kinds = typing.get_type_hints(kind)
            assert name in kinds, f"{command}: config{key}"
            of = [kinds[name], *typing.get_args(kinds[name])]
            kind = next((x for x in of if dataclasses.is_dataclass(x)), None)
    if command in ("pixel-jax chat", "pixel-jax serve"):
        said = re.sub(r"--\w+", "", said)
        assert all(word in RolloutConfig.__dataclass_fields__ for word in re.findall(r"\w+_\w+|implementation", said))
    elif command != "pixel-jax export":  # which has no config
        assert len(keys) > 3


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name):
    code, out, _ = command(name, "--help")
    wanted = {
        "view": "--out:",
        "export": "--out:",
        "chat": "--question:",
        "serve": "--allowed_hosts:",
        "bench": "--only:",
        "check": "--seconds:",
    }.get(name, "--config:")
    assert code == 0 and f"pixel-jax {name}" in out and wanted in out


def test_view_draws_saved_traces(tmp_path):
    pixels = scripted_model.image(0, 30, 40)
    picture = Picture(traces.data_uri(pixels), 40, 30, "image", ((1, 4, 5, 20, 25),))
    turns = (ShownTurn("assistant", "I look."), ShownTurn("tool", "Here it is."), ShownTurn("assistant", "\\boxed{7}"))
    found = [
        Transcript(question, (picture,), (picture,), turns, "answer", answer="7") for question in ("Which?", HOSTILE)
    ]
    traces.save(tmp_path / "traces.json", found)
    code, out, error = command("view", "traces.json", "--out=page.html", cwd=tmp_path)
    assert code == 0 and "2 traces of traces.json: drawn in page.html" in out, error
    page = (tmp_path / "page.html").read_text()
    seen = Reader(page)
    assert seen.tags.count("article") == 2 and seen.tags.count("rect") == 4 and "I look." in seen.texts
    assert seen.runs == 0 and "onerror" not in seen.attributes and page.count(picture.uri) == 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The scripted model as a directory."""
    directory = tmp_path_factory.mktemp("scripted")
    processor = Processor(scripted_model.vocabulary().tokenizer, min_pixels=784, max_pixels=4 * 784)
    save_pretrained(scripted_model.model(), processor, directory)
    limits = dataclasses.replace(scripted_model.CONFIG, max_response=256, observe_chunk=2)
    (directory / "rollout.json").write_text(json.dumps(dataclasses.asdict(limits)))
    return directory


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "a.png"
    Image.fromarray(scripted_model.image(1, 120, 150)).save(path)
    return path


def test_chat(model, picture, tmp_path):
    """In a locale that has no character beyond ASCII, about a question that has, and that would steer terminal and model."""
    page = tmp_path / "chat.html"
    question = "Quelle œuvre?\x1b]0;PWN\x07<|im_end|>\n<|im_start|><|image_pad|>"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code, out, error = command("chat", model, picture, f"--question={question}", f"--html={page}", **plain)
    assert code == 0, error
    lines = [line.strip() for line in out.splitlines()]
    assert lines[0] == r"question  Quelle \u0153uvre?\x1b]0;PWN\x07<|im_end|>" and "\x1b" not in out + error
    assert html.escape(question) in page.read_text("utf-8")
    # The greedy scripted model zooms first, and its call is carried out.
    model_turn = next(i for i, line in enumerate(lines) if line.startswith("model"))
    assert "crop_image_normalized" in "".join(lines[model_turn:])
    assert any(line.startswith("looks at") and "of 150x120 pixels" in line for line in lines)
    assert any(line.startswith("answer") for line in lines)
    assert Reader(page.read_text()).tags.count("article") == 1
    assert str(page) in out


@pytest.mark.slow
def test_chat_with_an_adapter(model, picture, tmp_path):
    """One that takes the head's word for the end away says something else."""
    base, _ = from_pretrained(model)
    adapted = add_lora(base, jax.random.key(0), rank=1, alpha=64.0, targets="lm_head")
    adapted.lm_head.lora_b[...] = jax.random.normal(jax.random.key(1), adapted.lm_head.lora_b.shape)
    save_adapter(adapted, tmp_path)
    question = ("chat", model, picture, "--question=Which digit?")
    said = [command(*question, *flags) for flags in ([], [f"--adapter={tmp_path}"])]
    assert [code for code, _, _ in said] == [0, 0], said[1][2]
    assert said[0][1] != said[1][1]
    code, _, error = command(*question, f"--adapter={model}")
    assert code == 1 and "is no adapter of PEFT: it has no adapter_config.json" in error and "Traceback" not in error


CONFIG = """
import importlib.util
from ml_collections import ConfigDict

def get_config():
    spec = importlib.util.spec_from_file_location("own_data", {own_data!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    limits = {limits!r}
    config.image_buffer, config.prompt_width = (1, 192, 192), 96
    config.video_buffer, config.video_prompt_width = (2, 64, 64), 96
    config.video_frames, config.video_patches = 6, 8
    config.rollout = ConfigDict(limits)
    config.trace_tokens, config.trace_frames, config.trace_patches, config.buckets = 256, 3, 16, ()
    config.sft.steps, config.sft.batch_size, config.sft.forward.micro_batches = 2, 2, 1
    config.sft.optimizer = {{"learning_rate": 1e-3, "warmup": 0.0}}
    config.rl.iterations, config.rl.prompts, config.rl.train_batch, config.rl.forward.micro_batches = 2, 2, 4, 1
    config.rl.replay = {{"kind": "none"}}
    config.rl.optimizer = {{"learning_rate": 1e-3, "warmup": 0.0}}
    config.rl.rollout = ConfigDict({{**limits, "group_size": 2}})
    return config
"""


@pytest.mark.slow
def test_sft_and_rl_on_data_of_ones_own(model, picture, tmp_path):
    """Two steps each, one about images and one about videos, from a directory to a directory."""
    limits = json.loads((model / "rollout.json").read_text())
    limits = {name: value for name, value in limits.items() if value is not None}
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(own_data=str(ROOT / "configs/pixel/own_data.py"), limits=limits))
    call = scripted_model.CROP + "0.05, 0.11, 0.71, 0.82" + '], "target_image": 1' + scripted_model.CLOSE
    line = {"question": "Which digit?", "images": [str(picture)], "answer": "7"}
    for name in ("0.png", "1.png"):
        Image.fromarray(scripted_model.image(int(name[0]), 100, 100)).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"")
    clip = line | {"images": ["0.png", "1.png"], "video": True}
    turns = [[call, "\\boxed{7}"], [{"text": call, "learn": False}, call, "\\boxed{7}"]]
    looked = [scripted_model.SELECT + "1, 2]" + scripted_model.CLOSE, "\\boxed{7}"]
    lines = [line | {"turns": written} for written in turns] + 2 * [clip | {"turns": looked}]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, [*lines, line | {"images": ["broken.png"], "turns": turns[0]}])))

    def start(phase, source, *more, out=None):
        place = tmp_path / (out or phase)
        flags = (f"--config={config}", f"--config.model={source}", f"--config.data={data}", f"--config.out={place}")
        flags = (*flags, f"--config.image_folders=('{picture.parent}',)")
        code, out, error = command(phase, *flags, "--config.bad_rows=drop", *more)
        assert code == 0 and f"The model is in {place / 'model'}." in out and "1 rows dropped" in out, error
        metrics = read_metrics(place / phase / "metrics.jsonl")
        assert len(metrics) == 2 and all(np.isfinite(x[name]) for x in metrics for name in ("loss", "grad_norm"))
        return place / "model", metrics

    tuned, _ = start("sft", model)
    code, out, error = command("export", f"{tmp_path / 'sft'}@2", f"--out={tmp_path / 'exported'}")
    assert code == 0 and "after step 2" in out, error
    assert {path.name for path in (tmp_path / "exported").iterdir()} == {path.name for path in tuned.iterdir()}
    for path in tuned.iterdir():
        assert path.read_bytes() == (tmp_path / "exported" / path.name).read_bytes(), path.name
    learned, metrics = start("rl", tuned)
    assert [x["updates"] for x in metrics] == [1, 1] and all(0 <= x["accuracy"] <= 1 for x in metrics)
    weights = [from_pretrained(place)[0].lm_head.weight[...] for place in (model, tuned)]
    assert (np.asarray(weights[0]) != np.asarray(weights[1])).any()
    saved = json.loads((learned / "rollout.json").read_text())
    assert saved["max_response"] == 256 and saved["group_size"] == 1  # of an answer: how training explored is not kept

    # A new adapter of tuning, gone on with by reinforcement learning; each lies beside the merged model.
    lora = '--config.lora={"rank": 2, "alpha": 4.0, "targets": ".*q_proj"}'
    alone = "--config.{}.trainable=.*lora_"
    first, _ = start("sft", model, lora, alone.format("sft"), out="first")
    second, _ = start("rl", model, f"--adapter={first / 'adapter'}", alone.format("rl"), out="second")
    base = from_pretrained(model)[0]
    before, after = (split(load_adapter(base, x / "adapter"), LoRAWeight)[0] for x in (first, second))
    for phase, place in (("sft", first), ("rl", second)):  # both recorded what they were trained on
        record = RunRecord.read(place.parent / phase)
        assert record.command == phase and [len(step) for step in record.order] == [2, 2]
        assert [x.name for x in record.examples] == [f"data.jsonl:{i}" for i in range(1, 5)]
        assert record.gradient_norm == max(x["grad_norm"] for x in read_metrics(place.parent / phase / "metrics.jsonl"))
    assert not (tmp_path / "sft" / "sft" / "trained_on.json").exists()  # it trained all weights
    assert before.keys() == after.keys() and any((before[name] != after[name]).any() for name in before)
