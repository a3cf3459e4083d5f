"""Edits of the adapter of a finished run: its record, its loss, requests of every kind, the exact replay, and what is refused."""

import importlib.util
import json
import pathlib
import shutil
from typing import get_args

import numpy as np
import optax
import pytest
from PIL import Image
from safetensors.numpy import load_file
from small_run import BOX, PICTURES, QUESTION, WRITTEN, rows, save_model, trained, write_data

import pixel_jax
from pixel_jax.data.images import read_image
from pixel_jax.data.shapes import largest
from pixel_jax.data.synthesis import crop_call, final_answer
from pixel_jax.data.traces import assemble
from pixel_jax.files import read_json
from pixel_jax.models.io import from_pretrained
from pixel_jax.models.layers import LoRAWeight
from pixel_jax.models.lora import combine, split
from pixel_jax.models.peft import load_adapter
from pixel_jax.run_record import FILE, RecordError, RunRecord, distinct
from pixel_jax.training.batch import from_trajectories
from pixel_jax.training.loop import EARLY
from pixel_jax.training.state import init_state
from pixel_jax.training.steps import make_sft_step
from pixel_jax.training.writers import read_metrics
from unlearn_jax import apply, cg
from unlearn_jax.config import ErasureConfig
from unlearn_jax.dataset import Dataset
from unlearn_jax.limits import LimitKind
from unlearn_jax.objective import dataset_objective
from unlearn_jax.own_run.config import RunEditConfig
from unlearn_jax.own_run.edit import edit
from unlearn_jax.own_run.evaluate import EVALUATION, evaluate
from unlearn_jax.own_run.task import RunTask, _mask
from unlearn_jax.requests.carry_out import State
from unlearn_jax.requests.log import ADAPTER, LOG, verify
from unlearn_jax.requests.request import EditRequestError, Request, parse_request
from unlearn_jax.requests.state import Change, apply_request
from unlearn_jax.requests.task import RequestsConfig

FILED = {"reason": "consent withdrawn", "who": "A. Person", "when": "2026-11-30"}


def request(name, kind, folder=".", **fields) -> Request:
    return parse_request({"id": name, "kind": kind, **fields, **FILED}, "requests.jsonl:1", pathlib.Path(folder))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), rows())


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory):
    """A run that has ended."""
    return trained(model, data, tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture(scope="module")
def task(finished):
    """The run as a task; nothing is requested of it."""
    return RunTask.of(RunEditConfig(str(finished)))


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run, which a test may change."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "edits", ignore_errors=True)
    return tmp_path / "run"


def adapter_of(run, model):
    return split(load_adapter(from_pretrained(model)[0], run / "model" / "adapter"), LoRAWeight)[0]


def equal(one, two):
    assert one.keys() == two.keys()
    return all(np.array_equal(np.asarray(one[name]), np.asarray(two[name])) for name in one)


# ---- the record


def test_what_a_run_records(finished, data):
    record = RunRecord.read(finished / "sft")
    assert record.command == "sft" and record.settings["lora.rank"] == 2 and record.settings["seed"] == 3
    assert [x.name for x in record.examples] == [f"t{i}" for i in range(6)]
    pictures = [x.pictures[0] for x in record.examples]
    assert [pictures.index(x) for x in pictures] == list(PICTURES) and len({x.said for x in record.examples}) == 6
    # Six steps of two rows; every pass over the data has each example once.
    assert [len(step) for step in record.order] == [2] * 6 and record.epoch == 1.5
    seen = [i for step in record.order for row in step for i in row.traces]
    assert np.bincount(seen).tolist() == [4] * 6 and record.seen == list(range(6))
    metrics = read_metrics(finished / "sft" / "metrics.jsonl")
    assert record.gradient_norm == max(x["grad_norm"] for x in metrics[-2:])
    text = (finished / "sft" / FILE).read_text()
    assert QUESTION not in text and "boxed" not in text and "tag" not in text.replace('"settings', "")
    assert sorted(x.name for x in (finished / "sft" / EARLY).iterdir()) == ["0", "1", "2"]


def test_steps_see_the_rows_of_the_record(finished, task):
    """The tokens that a step counted are those of the examples that the record says it has seen."""
    record = task.record
    learned = [int(np.sum(row)) for row in task.encode(task.items())["loss_mask"]]
    for step, metrics in zip(record.order, read_metrics(finished / "sft" / "metrics.jsonl"), strict=True):
        assert metrics["tokens"] == sum(learned[i] for row in step for i in row.traces)


def test_names_are_distinct():
    assert distinct(["a", "b", "a", "a#2", "a"]) == ["a", "b", "a#3", "a#2", "a#4"]


# ---- the loss


def test_the_loss_is_that_of_training(task):
    """Of each example, and its gradient, beside the training step's own loss on rows of one trace."""
    items = task.items()
    made, frames = task._rendered(items)
    batch = from_trajectories(assemble(made, frames, task.trained.rollout, largest([row.shape for row in made])))
    whole = combine(dict(task.like), task.base)
    optimizer = optax.sgd(1.0)
    state = init_state(whole, optimizer, trainable=".*lora_")
    before = {name: np.asarray(x) for name, x in task.like.items()}
    after, report = make_sft_step(task.trained.tuning.forward, optimizer, normalizer="row")(state, batch)
    data = Dataset.of(task.encode(items))
    sums, gradient = dataset_objective(task.loss, task.like, data, weight_decay=0.0).sums_and_gradient(task.like)
    np.testing.assert_allclose(sums, report.rows, rtol=3e-7)  # a unit in the last place
    stepped = {name: np.asarray(x[...]) for name, x in after.trainable.items()}
    for name, x in gradient.items():
        np.testing.assert_allclose(before[name] - stepped[name], x, atol=2e-6)


# ---- the exact replay


@pytest.mark.parametrize("early", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_replay_of_everything_is_the_run(early, run, model):
    """From the last checkpoint of the first epoch, and from the beginning, to the last bit."""
    if not early:
        shutil.rmtree(run / "sft" / EARLY)
    task = RunTask.of(RunEditConfig(str(run)))
    again = task.retrain(task.items(), np.ones(6))
    assert again.since == ("the checkpoint after step 2" if early else "the beginning")
    assert again.gradients == (16 if early else 24)
    assert equal(again.adapter, adapter_of(run, model))


@pytest.mark.slow
def test_a_replay_without_an_example_is_a_run_in_which_it_carries_no_loss(task, model, data, tmp_path):
    """The other run reads data in which the turns of that example are marked as not to be learned."""
    number = task.record.order[1][0].traces[0]  # first seen by the second step
    assert task.record.first_step({number}) == 1
    lines = rows()
    lines[number]["turns"] = [{"text": text, "learn": False} for text in lines[number]["turns"]]
    fresh = trained(model, write_data(tmp_path / "data", lines), tmp_path / "run", replayable=False)
    weights = np.array([float(i != number) for i in range(6)])
    again = task.retrain(task.items(), weights)
    assert again.since == "the checkpoint after step 1"
    assert equal(again.adapter, adapter_of(fresh, model)) and not equal(again.adapter, task.like)


def test_a_masked_text_carries_no_loss_in_the_edit_and_in_the_replay(task):
    items = task.items()
    item = task.change(items["t0"], request("t0", "mask", mask=WRITTEN))
    (row,), _ = task._rendered({"t0": item})
    texts = ["".join(items["t0"].learned).replace(WRITTEN, "")] * 2
    _mask(row, item.masked, task.vocabulary)
    found = task.encode({"t0": item})
    replayed = np.array(row.ids)[np.frombuffer(row.loss_mask, bool)]
    edited = found["labels"][0][found["loss_mask"][0]]
    np.testing.assert_array_equal(replayed, edited)
    learned = task.vocabulary.to_bytes([int(x) for x in edited if x != task.vocabulary.im_end]).decode()
    assert learned == texts[0] and (edited == task.vocabulary.im_end).sum() == 2


@pytest.mark.slow
def test_a_new_form_that_does_not_fit_its_row_changes_the_order(task):
    """The replay begins at the beginning, and says why."""
    items = task.items()
    lengths = task.encode(items)["valid"].sum(axis=1)
    row = next(row for step in task.record.order for row in step if len(row.traces) > 1)
    name = task.record.examples[row.traces[0]].name
    # The vocabulary has a token for each byte, and one for the old question.
    long = items[name]._replace(question="?" * (256 - int(lengths[list(row.traces)].sum()) + 2))
    again = task.retrain({**items, name: long}, np.ones(6))
    assert again.since == "the beginning, in other rows: a new form is too long" and not equal(again.adapter, task.like)


# ---- requests


ALL_LIMITS = RequestsConfig(allow=get_args(LimitKind))  # four epochs of training cost less than most edits
ONE_STEP = ErasureConfig(newton_steps=1, solver=cg(max_steps=2), micro_batch=8)


@pytest.fixture(scope="module")
def new_image(tmp_path_factory):
    path = tmp_path_factory.mktemp("new") / "new.png"
    Image.fromarray(np.random.default_rng(9).integers(0, 256, (96, 84, 3), np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def one_of_each(new_image):
    return [
        request("t0", "part", part=WRITTEN, becomes="0.50, 0.50, 0.90, 0.90"),
        request("t1", "mask", mask=WRITTEN),
        request("t1", "answer", answer="8"),
        request("t2", "question", text="Which digit is it?"),
        request("t4", "image", new_image.parent, image="new.png"),
        request(["t3", "t5"], "remove"),
        request("t0", "trace", turns=[final_answer("0")]),
    ]


@pytest.fixture(scope="module")
def asked(finished, one_of_each, tmp_path_factory):
    """Two requests that were carried out, with pages that show all."""
    folder = tmp_path_factory.mktemp("asked")
    shutil.copytree(finished, folder / "run")
    shutil.rmtree(folder / "run" / "edits", ignore_errors=True)
    config = RunEditConfig(str(folder / "run"), requests=ALL_LIMITS, erasure=ONE_STEP)
    return config, edit(config, [one_of_each[0], one_of_each[4]], show_content=True)


def test_every_kind_is_an_edit_of_the_examples(task, one_of_each):
    """As arrays: each request changes what it names and nothing else; the edit's own checks pass."""
    first = items = task.items()
    kinds = [
        "CorrectResponse",
        "MaskTokens",
        "CorrectResponse",
        "ModifyQuery",
        "ModifyQuery",
        "Remove",
        "CorrectResponse",
    ]
    for asked, kind in zip(one_of_each, kinds, strict=True):
        after = apply_request(items, asked, first, task.change)
        change = Change.of(items, after, task.encode, asked.kind)
        assert [type(x).__name__ for x in change.edits] == [kind]
        edited = apply(change.dataset, change.edits, task.loss)
        assert set(map(str, edited.ids)) == after.keys()
        untouched = [i for i, name in enumerate(items) if name not in asked.ids]
        assert [name for name in items if not (name in after and after[name] is items[name])] == list(asked.ids)
        assert change.kept.tolist() == untouched
        items = after
    assert list(items) == ["t0", "t1", "t2", "t4"]
    assert [turn.parts[0][0] for turn in items["t0"].turns] == [final_answer("0")]
    assert items["t1"].turns[-1].parts == ((final_answer("8"), True),) and items["t1"].masked == (WRITTEN,)
    assert [x.shape for x in task.describe(items["t4"]).pictures] == [(96, 84, 3)]


@pytest.mark.slow
def test_every_kind_of_request(run, one_of_each):
    config = RunEditConfig(str(run), requests=ALL_LIMITS)
    entries = edit(config, one_of_each)
    assert [entry.kind for entry in entries] == [x.kind for x in one_of_each]
    assert {entry.outcome for entry in entries} <= {"edited", "escalated"}
    assert verify(run / "edits" / LOG)[1] == [] and edit(config, one_of_each) == []


def test_requests_edit_the_adapter(asked, one_of_each):
    config, entries = asked
    assert [entry.outcome for entry in entries] == ["edited"] * 2
    task = RunTask.of(config)
    state = State.of(task)  # read back from what was stored
    assert state.items["t0"].learned[0].count("0.50, 0.50, 0.90, 0.90") == 1
    assert state.items["t4"].pictures == (one_of_each[4].image,)
    assert verify(task.directory / LOG)[1] == [] and edit(config, [one_of_each[0]]) == []
    report = json.loads((task.directory / "requests" / "0001" / "report.json").read_text())
    assert report["edit"]["actual"] < 0 and report["losses"].keys() == {"old form", "new form", "neighbours"}


def test_a_changed_box_shows_another_crop(task):
    items = task.items()
    new = task.change(items["t0"], request("t0", "part", part=WRITTEN, becomes="0.50, 0.50, 0.90, 0.90"))
    image, before = task.describe(items["t0"]).pictures
    np.testing.assert_array_equal(before, image[17:59, 10:58])
    np.testing.assert_array_equal(task.describe(new).pictures[1], image[42:76, 48:86])
    assert "0.50, 0.50, 0.90, 0.90" in task.describe(new).texts["turn 1"]


def test_an_edit_is_an_adapter_of_peft(asked, model):
    """Each request's folder is one; what it holds is the adapter of the log."""
    config, entries = asked
    for entry in entries:
        place = pathlib.Path(config.out) / "requests" / f"{entry.number:04d}"
        found = split(load_adapter(from_pretrained(model)[0], place), LoRAWeight)[0]
        assert equal(found, load_file(place / ADAPTER))
        assert {"adapter_config.json", "adapter_model.safetensors", "page.html"} <= entry.files.keys()


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("peft", "accelerate"))), reason="pip install peft accelerate"
)
def test_peft_reads_an_edit(asked, model):
    import peft
    import torch
    import transformers

    place, ids = pathlib.Path(asked[0].out) / "requests" / "0001", np.arange(20, 52)[None]
    base = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, place).eval()(input_ids=torch.tensor(ids)).logits.detach().numpy()
    ours, plain = (pixel_jax.forward(from_pretrained(model, adapter=x)[0], input_ids=ids) for x in (place, None))
    np.testing.assert_allclose(theirs, ours, atol=1e-5)
    assert np.abs(np.asarray(plain) - ours).max() > 0.1


@pytest.mark.slow
def test_an_escalated_request_is_the_replay(run, model):
    """No limit is allowed, so that the edit is not applied."""
    config = RunEditConfig(str(run), requests=RequestsConfig(allow=()), erasure=ONE_STEP)
    (entry,) = edit(config, [request("t2", "remove")])
    assert entry.outcome == "escalated" and "; retrained from the" in entry.why
    task = RunTask.of(config)
    weights = np.array([float(name != "t2") for name in task.items()])
    found = task.load(State.of(task).adapter_path(task.directory))
    assert equal(found, task.retrain(task.items(), weights).adapter)
    measures = evaluate(config)
    (again,) = (x for name, x in measures.items() if name.startswith("the run again, from the checkpoint after step"))
    assert measures["after all requests"] == again and again["distance"] == 0 < measures["before"]["distance"]
    assert read_json(run / "edits" / EVALUATION) == measures


def test_pages_show_what_was_forgotten_only_when_asked(asked, run):
    config, _ = asked
    page = (pathlib.Path(config.out) / "requests" / "0001" / "page.html").read_text()
    assert WRITTEN in page and page.count("data:image/png") == 4  # picture and crop, before and after
    config = RunEditConfig(str(run), requests=ALL_LIMITS, erasure=ONE_STEP)
    edit(config, [request("t0", "part", part=WRITTEN, becomes="0.50, 0.50, 0.90, 0.90")])
    place = run / "edits"
    for path in (place / LOG, place / "requests" / "0001" / "page.html", place / "requests" / "0001" / "report.json"):
        assert (
            WRITTEN not in path.read_text()
            and "data:image" not in path.read_text()
            and QUESTION not in path.read_text()
        )


# ---- what is refused


def unchanged(run, message, requests=None, error=EditRequestError, **options):
    """Asking raises, and log and adapter are as they were."""
    place = run / "edits"
    files = lambda: {str(x): x.read_bytes() for x in place.rglob("*") if x.is_file() and "compiled" not in x.parts}
    before = files()
    with pytest.raises(error, match=message):
        edit(RunEditConfig(str(run), **options), requests or [request("t0", "remove")])
    assert {name: x for name, x in files().items() if name in before} == before and not (place / "requests").exists()


def test_data_that_is_not_that_of_the_run(run, data, tmp_path):
    lines = rows()
    lines[1]["answer"] = "4"
    (other := tmp_path / "other").mkdir()
    del lines[5]
    path = write_data(other, [*lines, rows()[0] | {"id": "more"}])
    Image.fromarray(read_image(data.parent / "2.png")[:, ::-1]).save(other / "2.png")
    said = (
        r"was not trained on this data: 3 of its 6 examples differ: t1 says something else \(hash \w+, it was \w+\); "
        r"t2 shows another picture 1 \(hash \w+, it was \w+\); t5 is not there"
    )
    unchanged(run, said, data=str(path))


def test_data_that_has_moved_and_grown(run, data, tmp_path):
    path = write_data(tmp_path / "other", [rows()[0] | {"id": "more", "question": "Why?"}, *rows()[::-1]])
    task = RunTask.of(RunEditConfig(str(run), data=str(path)))
    assert list(task.items()) == [f"t{i}" for i in range(6)] and task.items()["t3"].answer == ("3",)


def test_a_model_or_adapter_that_is_not_that_of_the_run(run, model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text() + " ")
    unchanged(run, "the weights in .* are not those that .* began with: their hash is", model=str(tmp_path / "model"))
    weights = run / "model" / "adapter" / "adapter_model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-4] + b"\0\0\0\0")
    unchanged(run, "is not the adapter that .* trained: its hash is")


def test_a_gradient_that_is_not_that_of_the_run(run):
    """The last check, for what no hash can tell: the record says that training left next to no gradient."""
    path = run / "sft" / FILE
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"gradient_norm": 1e-6}))
    unchanged(run, "with this base model: the gradient of the training's objective is .* training left 1e-06")


def test_runs_that_cannot_be_edited(run, tmp_path):
    path = run / "sft" / FILE
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"command": "rl"}))
    unchanged(run, "was trained by reinforcement learning: .* start `pixel-jax rl` again in another config.out")
    path.write_text(json.dumps(record | {"order": [[0, [[9]]]]}))
    unchanged(run, "is not a record of a run .the order is of examples that are not among the 6", error=RecordError)
    path.write_text(json.dumps(record)[:-30])
    unchanged(run, FILE, error=RecordError)
    path.write_text(json.dumps(record))
    history = run / "sft" / "history.jsonl"
    lines = history.read_text()
    changed = json.loads(lines.splitlines()[0]) | {"what": "went on", "changed": {"data.turns": ["a", "b"]}}
    history.write_text(lines + json.dumps(changed) + "\n")
    unchanged(run, "went on with another data.turns .*: its adapter was trained on two experiments")
    path.unlink()
    unchanged(run, "has no record of what its adapter was trained on")
    unchanged(tmp_path / "nowhere", "there is no run")


def test_requests_that_do_not_fit(run, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    calls = [crop_call("tag", BOX)] * 4
    for said, wrong in {
        "request 2 of 2: no training example has the id 't7'": request("t7", "remove"),
        "the given part occurs 0 times in what 't0' teaches": request("t0", "part", part="0.77", becomes="1"),
        "the given part occurs 9 times": request("t0", "mask", mask="0"),
        "the new image of 't0'": request("t0", "image", tmp_path, image="broken.png"),
        "the new form of 't0' cannot be written": request("t0", "trace", turns=["no call", "7"]),
        "rows of the run have room for": request("t0", "question", text="?" * 400),
        "a turn is a text or": request("t0", "trace", turns=[7]),
        "the new form of 't1' cannot be written: trace 0 has 3 calls, there is room": request(
            "t1", "trace", turns=calls
        ),
    }.items():
        unchanged(run, said, [request("t3", "remove"), wrong])
    unchanged(run, "which this one contradicts", [request("t3", "remove"), request("t3", "answer", answer="1")])


@pytest.mark.slow
def test_a_run_that_was_trained_again_after_a_request(run, model, data):
    edit(RunEditConfig(str(run), requests=ALL_LIMITS, erasure=ONE_STEP), [request("t0", "remove")])
    log = (run / "edits" / LOG).read_bytes()
    shutil.rmtree(run / "sft")
    trained(model, data, run, steps=7)
    with pytest.raises(EditRequestError, match="was trained again after its first request"):
        edit(RunEditConfig(str(run)), [request("t1", "remove")])
    assert (run / "edits" / LOG).read_bytes() == log
