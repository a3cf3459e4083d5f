"""`pixel-jax check DIR`: what it says of a model, of data and of their faults, and that a model that does not see stops it."""

import dataclasses
import json
import pathlib
import shutil

import jax
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from pixel_jax.bench import check_memory
from pixel_jax.bench import check_model as checking
from pixel_jax.bench.check_model import check_model
from pixel_jax.bench.checklist import Checklist
from pixel_jax.config import load
from pixel_jax.models.checkpoint import named_weights
from pixel_jax.models.io import save_pretrained
from pixel_jax.models.processor import Processor
from pixel_jax.recipe import ADAPTERS
from pixel_jax.train_config import TrainConfig
from tests.rollouts import scripted_model
from tests.test_cli import command

PIXELS = {name: getattr(scripted_model.CONFIG, name) for name in ("max_pixels", "crop_max_pixels")}
LEARNING = {"iterations": 1, "prompts": 2, "train_batch": 4, "rollout": {**PIXELS, "group_size": 2}}
GOOD = {"question": "Which digit?", "images": ["a.png"], "answer": "7"}
TRACE = {"question": "Which digit?", "images": ["a.png"], "turns": ["\\boxed{7}"]}
SAID = [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Which digit?"}]}]
TALK = {"messages": [*SAID, {"role": "assistant", "content": "\\boxed{7}"}]}


def config_of(model, data="", **more):
    values = {"sft": {"steps": 1, "batch_size": 2}, "rl": LEARNING, "rollout": PIXELS, "watch": {}, **more}
    return load(TrainConfig, {"model": str(model), "data": str(data), "out": "unused", **values})


def save(model, directory):
    processor = Processor(scripted_model.vocabulary().tokenizer, min_pixels=784, max_pixels=4 * 784)
    save_pretrained(model, processor, directory)
    limits = dataclasses.replace(scripted_model.CONFIG, max_response=256, observe_chunk=2)
    (directory / "rollout.json").write_text(json.dumps(dataclasses.asdict(limits)))
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(scripted_model.model(), tmp_path_factory.mktemp("scripted"))


@pytest.fixture
def untried(monkeypatch):
    """The weights are not read: what is said before is looked at."""
    monkeypatch.setattr(checking, "trial_lines", lambda *given: None)


def lines_of(out):
    found: dict[str, list[tuple[str, str, str]]] = {}
    for line in json.loads(out.read_text())["lines"]:
        found.setdefault(line["name"], []).append((line["status"], line["found"], line["remedy"]))
    return found


def checked(config, tmp_path, data=True):
    out = tmp_path / "check.json"
    return check_model(config, data=data, out=out), lines_of(out)


def data_file(tmp_path, *rows):
    Image.fromarray(scripted_model.image(1, 120, 150)).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:5000])
    path = tmp_path / "data.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_a_good_model_and_good_data(model, tmp_path, untried):
    wrong, lines = checked(config_of(model, data_file(tmp_path, GOOD, GOOD | TRACE)), tmp_path)
    assert not wrong
    assert list(lines) == "devices versions kernels mesh model tokenizer data memory".split()
    ((status, said, _),) = lines["model"]
    weights = sum(x.size for x in jax.tree.leaves(scripted_model.model()))
    assert status == "ok" and said.startswith("qwen2_5_vl, ") and "float32" in said and "2 layers, images" in said
    assert f"{weights / 1e6:.3g}M weights" in said and f"{4 * weights / 2**20:.3g} MiB" in said
    assert lines["data"] == [
        (
            "ok",
            "2 rows: 2 have an answer to learn by (rl), 1 have turns to tune on (sft); 2 about an image; 2 fit shapes worked "
            "out from them",
            "",
        )
    ]


@pytest.mark.parametrize("row, kind", [(TRACE, "sft"), (TALK, "sft"), (GOOD, "rl")])
def test_the_kinds_of_rows(row, kind, model, tmp_path, untried):
    wrong, lines = checked(config_of(model, data_file(tmp_path, row, row)), tmp_path)
    assert not wrong and lines["data"][0][1].startswith("2 rows: 2 have ") and f"({kind})" in lines["data"][0][1]
    assert lines["memory"][1][1].startswith(f"{kind}: ")


def test_parquet(model, tmp_path, untried):
    """Pictures in the rows, and columns of other names."""
    data_file(tmp_path)
    picture = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    rows = {
        "prompt": ["Which digit?"] * 3,
        "image": [picture, picture, {"bytes": b"none", "path": None}],
        "answer": ["7"] * 3,
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "rows.parquet")
    columns = {"question": "prompt", "images": "image"}
    wrong, lines = checked(config_of(model, tmp_path / "rows.parquet", columns=columns), tmp_path)
    assert wrong == ["data"] and "3 rows: 2 have an answer" in lines["data"][0][1]
    assert len(lines["fault"]) == 1 and "rows.parquet" in lines["fault"][0][1]


def test_faults_are_named_by_their_rows(model, tmp_path, untried):
    bad = [
        "nonsense",
        GOOD | {"images": ["no.png"]},
        GOOD | {"images": ["cut.png"]},
        {"question": "?", "images": ["a.png"]},
        GOOD | {"question": "Which digit? " * 3000},
    ]
    path = data_file(tmp_path, GOOD, *bad)
    wrong, lines = checked(config_of(model, path), tmp_path)
    assert wrong == ["data"]
    ((status, said, remedy),) = lines["data"]
    assert status == "wrong" and said.startswith("6 rows: 2 have an answer") and "; 1 fit " in said
    assert "config.bad_rows='drop'" in remedy
    faults = " | ".join(said for _, said, _ in lines["fault"])
    for number, why in {2: "is not JSON", 3: "there is no image", 5: "'answer' must be"}.items():
        assert f"data.jsonl:{number}" in faults and why in faults
    assert "data.jsonl:4" in faults and "data.jsonl:6" in faults and "does not fit" in faults
    dropped, lines = checked(config_of(model, path, bad_rows="drop"), tmp_path)
    assert not dropped and lines["data"][0][0] == "ok"
    record = json.loads((tmp_path / "check.json").read_text())
    assert record["data"]["usable"] == 1 and len(record["data"]["faults"]) == 5


def test_data_that_cannot_be_used_at_all(model, tmp_path, untried):
    for path, why in {
        tmp_path / "nowhere.jsonl": "is not a file or directory",
        data_file(tmp_path, "x"): "no row can be used",
        tmp_path / "a.png": "must be a .jsonl, .json or .parquet file",
    }.items():
        wrong, lines = checked(config_of(model, path), tmp_path)
        assert wrong == ["data"] and any(why in said + remedy for _, said, remedy in lines["data"]), lines


def test_what_does_not_fit_the_memory(model, tmp_path, untried, monkeypatch):
    """Of the phases: what they take by formula, from the sizes of the tree; adapters take less."""
    data = data_file(tmp_path, GOOD, GOOD)
    _, lines = checked(config_of(model, data), tmp_path)
    needs = json.loads((tmp_path / "check.json").read_text())["memory"]
    weights = 4 * sum(x.size for x in jax.tree.leaves(scripted_model.model()))
    assert needs["weights"] == weights
    _, lines = checked(config_of(model), tmp_path, data=False)
    tuning = json.loads((tmp_path / "check.json").read_text())["memory"]["phases"]["sft"]
    frozen = 4 * sum(x.size for _, key, x in named_weights(scripted_model.model()) if key.startswith("visual."))
    trained = weights - frozen
    assert tuning["gradients"] == 3 * trained
    assert abs(tuning["weights and optimizer"] - (weights + 2 * trained)) < 100  # Adam: two moments, and the steps
    _, lines = checked(config_of(model, lora=dict(ADAPTERS)), tmp_path, data=False)
    adapted = json.loads((tmp_path / "check.json").read_text())
    assert adapted["model"]["weights"]["adapter"] > 0
    monkeypatch.setattr(check_memory, "device_memory", lambda: 2 * weights)
    wrong, lines = checked(config_of(model, data), tmp_path)
    assert "memory" in wrong and "train adapters (config.lora; " in lines["memory"][-1][2]
    monkeypatch.setattr(check_memory, "device_memory", lambda: weights // 2)
    wrong, lines = checked(config_of(model, data), tmp_path)
    assert len(lines["memory"]) == 1 and "take a smaller model" in lines["memory"][0][2]


def test_models_that_are_none(model, tmp_path, capsys):
    cut = shutil.copytree(model, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-9])
    mute = shutil.copytree(model, tmp_path / "mute")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (mute / name).unlink()
    other = shutil.copytree(model, tmp_path / "other")
    (other / "config.json").write_text('{"model_type": "gpt2"}')
    for path, name, why in (
        (tmp_path / "nowhere", "model", "is not a model directory"),
        (cut, "model", "truncated or damaged"),
        (other, "model", "gpt2"),
        (mute, "tokenizer", "none"),
    ):
        wrong, lines = checked(config_of(path), tmp_path, data=False)
        assert wrong == [name] and any(why in said and remedy for _, said, remedy in lines[name]), (path, lines)
    wrong, lines = checked(config_of(model, mesh={"data": 3, "fsdp": 7}), tmp_path, data=False)
    assert "mesh" in wrong and "needs 21 devices" in lines["mesh"][0][1]
    wrong, lines = checked(config_of(model, adapter=str(tmp_path)), tmp_path, data=False)
    assert wrong and "is no adapter of PEFT" in lines["model"][-1][1]
    assert "Traceback" not in capsys.readouterr().out


def test_a_model_that_does_not_see_stops_the_check(tmp_path):
    """Its merger is zero: it loads like any other, and nothing is written and learned with it."""
    blind = jax.tree.map(lambda x: x, scripted_model.model())
    blind.visual = jax.tree.map(lambda x: x, blind.visual)
    for _, key, weight in named_weights(blind):
        if key.startswith("visual.merger"):
            weight[...] = weight[...] * 0
    directory = tmp_path / "blind"
    directory.mkdir()
    wrong, lines = checked(config_of(save(blind, directory), data_file(tmp_path, GOOD)), tmp_path)
    assert wrong == ["sees"] and list(lines)[-1] == "sees"
    assert "merger, projector) are zero" in lines["sees"][0][2]
    assert lines["weights"][0][1].startswith("all there, all finite")


@pytest.mark.slow
def test_the_command(model, tmp_path):
    """To the end: it sees, writes and learns, on one device; with adapters, too."""
    path = data_file(tmp_path, TRACE, TRACE)
    small = [f"--config.{name}={value}" for name, value in {"mesh": {}, "sft.steps": 1, "sft.batch_size": 2}.items()]
    code, out, error = command("check", model, f"--data={path}", "--config=pixel/own_data:lora", *small, cwd=tmp_path)
    assert code == 0, out + error
    lines = lines_of(pathlib.Path(tmp_path, "runs/check.json"))
    assert "All is well" in out and not [x for found in lines.values() for x in found if x[0] == "wrong"]
    assert lines["sees"][0][1].startswith("yes: ") and "rows wrote" in lines["rollout"][0][1]
    assert lines["update"][0][1].startswith("sft on ")
    (model / "rollout.json").rename(model / "rollout.json.away")
    try:
        code, out, error = command("check", model, *small, "--config.rl.rollout.max_calls=0", cwd=tmp_path)
        assert code == 0 and "no rollout.json beside it" in out and "rl on " in out, out + error
    finally:
        (model / "rollout.json.away").rename(model / "rollout.json")


def test_a_line_is_printed_with_its_remedy(tmp_path, capsys):
    checks = Checklist(tmp_path / "check.json")
    with checks.item("data", "mend it"):
        raise ValueError("a\x1b]0;PWN\x07 line\nof two")
    checks.add("mesh", "none", status="note")
    out = capsys.readouterr().out
    assert out == f"wrong  data      a\\x1b]0;PWN\\x07 line of two\n{'':17}-> mend it\n note  mesh      none\n"
    assert checks.wrong == ["data"]
