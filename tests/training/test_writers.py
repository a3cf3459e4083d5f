"""Where metrics go: files of TensorBoard and of Weights & Biases read back record by record."""

import io
import json
import struct
import sys
import time
import types

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from pixel_jax.evaluation.transcript import Picture, ShownTurn, Transcript, data_uri
from pixel_jax.training.writers import open_writers, read_metrics


def events(directory):
    """Every event in the files of `directory`, oldest file first (TFRecord: length, checksum, data, checksum)."""
    for path in sorted(directory.glob("events.*"), key=lambda path: path.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            yield event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16


def test_tensorboard_shows_each_step_once_after_a_restart(tmp_path):
    for start, steps in ((0, range(4)), (2, range(2, 5))):
        writers = open_writers(tmp_path, start, ("tensorboard",), "rl")
        for step in steps:
            writers.write(step, {"loss": step + start / 10, "updates": 2})
        writers.close()
    shown = {}
    for event in events(tmp_path / "tensorboard"):
        if event.session_log.status == event_pb2.SessionLog.START:  # later steps are purged, as TensorBoard does
            shown = {key: value for key, value in shown.items() if key[0] < event.step}
        for value in event.summary.value:
            shown[event.step, value.tag] = value.simple_value
    expected = {(step, "loss"): pytest.approx(step + (step >= 2) * 0.2) for step in range(5)}
    assert shown == expected | {(step, "updates"): 2 for step in range(5)}
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2.2, 3.2, 4.2]


HOSTILE = "# big\n![x](http://127.0.0.1/a.png)\u2028<script>alert(1)</script>\n\n> quoted"


def a_trace():
    """A picture of 40 x 20 kept at half its size, black, with a box of which the lower right corner is inside."""
    picture = Picture(data_uri(np.zeros((10, 20, 3), np.uint8)), 40, 20, "image", ((1, 20, 10, 36, 18),))
    crop = Picture(data_uri(np.full((28, 28, 3), 200, np.uint8)), 28, 28, "what it saw")
    turns = (ShownTurn("assistant", HOSTILE), ShownTurn("tool", "here", (crop,)), ShownTurn("assistant", "7"))
    return Transcript("Which?", (picture,), (), turns, "answer", answer="7", reference="8", correct=False, reward=0.25)


def test_tensorboard_shows_conversations_as_text_and_pictures(tmp_path):
    writers = open_writers(tmp_path, 0, ("tensorboard",), "rl")
    writers.show(3, "held_out", [a_trace()])
    writers.close()
    values = {value.tag: value for event in events(tmp_path / "tensorboard") for value in event.summary.value}
    text = values.pop("held_out/1/text_summary").tensor.string_val[0].decode()
    assert all(line.startswith("    ") for line in text.split("\n")[:-1]) and "<script>" in text  # code, to Markdown
    assert "reward: 0.25" in text and "model: # big" in text and "what it saw" in text
    images = [np.asarray(Image.open(io.BytesIO(x.image.encoded_image_string))) for x in values.values()]
    assert [x.shape for x in images] == [(10, 20, 3), (28, 28, 3)] and (images[1] == 200).all()
    colored = np.argwhere(images[0].any(axis=-1))
    assert (colored.min(axis=0) == (5, 10)).all() and (colored.max(axis=0) == (9, 18)).all()
    assert not images[0][7, 14].any() and not (tmp_path / "metrics.jsonl").read_text()


class FakeRun:
    def __init__(self, arguments):
        self.arguments, self.logged, self.defined, self.finished = arguments, [], [], False

    def define_metric(self, name, step_metric):
        self.defined.append((name, step_metric))

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished = True


def test_weights_and_biases_is_one_run_for_a_directory(tmp_path, monkeypatch):
    runs = []
    fake = types.ModuleType("wandb")
    fake.Html = lambda page, inject: page
    fake.init = lambda **arguments: runs.append(FakeRun(arguments)) or runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_PROJECT", "pixels")
    for start in (0, 1):
        writers = open_writers(tmp_path, start, ("wandb",), "rl")
        writers.write(start, {"loss": 0.5, "rapr": 0.25})
        writers.show(start, "held_out", [a_trace()])
        writers.close()
    pages = [run.logged.pop() for run in runs]
    assert [page["step"] for page in pages] == [0, 1] and "&lt;script&gt;" in pages[0]["held_out"]
    assert runs[0].arguments == runs[1].arguments
    assert runs[0].arguments | {"id": ""} == {
        "project": "pixels",
        "name": "rl",
        "id": "",
        "resume": "allow",
        "dir": str(tmp_path),
        "reinit": "create_new",
    }
    assert len(runs[0].arguments["id"]) == 12
    assert [run.logged for run in runs] == [[{"step": i, "loss": 0.5, "rapr": 0.25}] for i in (0, 1)]
    assert all(run.finished and run.defined == [("*", "step")] for run in runs)


def test_what_weights_and_biases_writes_offline(tmp_path, monkeypatch):
    """Its real package: a run that is stopped after step 1 and goes on at step 1 is one run, whose later lines count."""
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_PROJECT", "pixels")
    for start, steps in ((0, (0, 1)), (1, (1, 2))):
        writers = open_writers(tmp_path, start, ("wandb",), "rl")
        for step in steps:
            writers.write(step, {"loss": step + start / 10, "rapr": 0.25})
        if start:
            writers.show(2, "held_out", [a_trace()])
        writers.close()
        time.sleep(1.1)  # its directories are named by the second
    records = []
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        data, at = path.read_bytes(), 7
        while at < len(data):  # LevelDB's log in one block: checksum, size, kind (1: whole), data
            _, size, kind = struct.unpack_from("<IHB", data, at)
            assert kind == 1
            records.append(Record.FromString(data[at + 7 : at + 7 + size]))
            at += size + 7
    runs = [x.run for x in records if x.HasField("run")]
    assert {(run.run_id, run.project, run.display_name) for run in runs} == {
        ((tmp_path / "wandb_id.txt").read_text(), "pixels", "rl")
    }
    lines = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in x.history.item}
        for x in records
        if x.HasField("history")
    ]
    (page,) = tmp_path.glob("wandb/offline-run-*/files/media/html/held_out_*.html")
    assert lines.pop()["step"] == 2 and "&lt;script&gt;" in page.read_text()
    assert [(x["step"], x["loss"], x["rapr"]) for x in lines] == [
        (0, 0, 0.25),
        (1, 1, 0.25),
        (1, 1.1, 0.25),
        (2, 2.1, 0.25),
    ]
    metrics = [x.metric for x in records if x.HasField("metric")]
    assert metrics and all((x.glob_name, x.step_metric) == ("*", "step") for x in metrics)


@pytest.mark.parametrize("name, module", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_what_is_not_installed_is_named(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"'{name}', which needs {module}: pip install {module}"):
        open_writers(tmp_path, 0, (name,), "rl")


def test_lines_alone_need_nothing(tmp_path, monkeypatch):
    for module in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    writers = open_writers(tmp_path, 0, (), "sft")
    writers.write(0, {"loss": 1.0})
    writers.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 1.0}]
