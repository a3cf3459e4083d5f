"""One rule for the names that data gives to files: it is where they lead that counts, in every reader."""

import json
import os

import numpy as np
import pyarrow
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from pixel_jax.data.example import ExampleError
from pixel_jax.data.images import ImageError
from pixel_jax.data.read import read_examples
from pixel_jax.data.sources import Folder, Member, SourceError, load_frames, locate, open_archive, read_bytes
from pixel_jax.evaluation.benchmarks import BenchmarkError, read
from pixel_jax.synthesis.seeds import SeedError, read_seeds
from tests.data import released_files as files


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Two folders with a picture each, and in the first one links, a named pipe and a folder."""
    root = tmp_path_factory.mktemp("places")
    for name in ("data", "other"):
        (root / name / "sub").mkdir(parents=True)
        Image.fromarray(np.full((30, 40, 3), 90, np.uint8)).save(root / name / "a.png")
    data = root / "data"
    (data / "inside").symlink_to("a.png")
    (data / "outside").symlink_to(root / "other" / "a.png")
    (data / "folder").symlink_to(root / "other")
    (data / "loop").symlink_to("loop")
    os.mkfifo(data / "pipe")
    return root


INSIDE = ["a.png", "./a.png", "sub/../a.png", "inside", "{data}/a.png", "../data/a.png"]
OUTSIDE = ["../other/a.png", "outside", "folder/a.png", "{other}/a.png", "sub/../../other/a.png"]
NOTHING = ["", "b.png", "sub", "pipe", "loop", "a.png/b", "x" * 300, "/dev/zero", "a\0b", "\ud800", "http://h/a.png"]


def spelled(names, root):
    return [name.format(data=root / "data", other=root / "other") for name in names]


def test_a_name_leads_into_the_folder_or_is_refused(places):
    data = places / "data"
    for name in spelled(INSIDE, places):
        assert locate(name, data).samefile(data / "a.png")
    for name in spelled(OUTSIDE, places):
        with pytest.raises(SourceError, match="leads to .*other.*image_folders"):
            locate(name, data)
        assert locate(name, data, [places / "other"]).samefile(places / "other" / "a.png")
        assert locate(name, data, ["/"]).exists()
    for name in [*NOTHING, None, 7, ["a.png"]]:
        with pytest.raises(SourceError):
            locate(name, data, ["/"])
    assert locate("sub", data, directory=True) == data / "sub"
    with pytest.raises(SourceError, match="leads to"):
        locate("folder", data, directory=True)


@given(st.lists(st.sampled_from(["a.png", "..", ".", "sub", "inside", "outside", "folder", "data", "other", "", "/"])))
@example(parts=["a.png", "..", "a.png"])
def test_what_is_accepted_lies_in_the_folder(places, parts):
    try:
        found = locate("/".join(parts), places / "data")
    except SourceError:
        return
    assert os.path.realpath(found).startswith(f"{os.path.realpath(places / 'data')}/") and found.is_file()


def test_a_snapshot_of_the_hub_is_a_folder_of_links(tmp_path):
    """The cache of huggingface_hub: what is downloaded lies in blobs, and a revision links to it."""
    blobs, snapshot = tmp_path / "datasets--x--y" / "blobs", tmp_path / "datasets--x--y" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    (snapshot / "images").mkdir(parents=True)
    (blobs / "123").write_bytes(b"")
    (snapshot / "images" / "a.png").symlink_to("../../../blobs/123")
    (tmp_path / "secret.png").write_bytes(b"")
    (snapshot / "images" / "b.png").symlink_to(tmp_path / "secret.png")
    assert locate("images/a.png", snapshot) == snapshot / "images" / "a.png"
    with pytest.raises(SourceError, match="leads to .*secret.png"):
        locate("images/b.png", snapshot)


def own(folder, name):
    (folder / "own.jsonl").write_text(json.dumps({"question": "?", "images": [name], "answer": "7"}))
    return folder / "own.jsonl"


def seeds(folder, name, others):
    (folder / "seeds").write_text(json.dumps({"question": "?", "images": [name], "answer": "7"}))
    return read_seeds(folder / "seeds", others)


def traces(folder, name, others):
    row = {"qid": "x", "message_list": files.conversation("Who?", files.part(image=name), ["\\boxed{7}"], [])}
    (folder / "release.json").write_text(json.dumps([row]))
    return read_examples(folder / "release.json", turns=True, image_folders=others)


def questions(folder, name):
    row = {"question": ["?"], "answer": [["\\boxed{7}"]], "image": [[name]], "is_video": [False], "qid": ["x"]}
    parquet.write_table(pyarrow.table(row), folder / "release.parquet")
    return folder / "release.parquet"


def vstar(folder, name, others):
    row = {"image": name, "text": "?", "category": "c", "question_id": 0, "label": "A"}
    (folder / "test_questions.jsonl").write_text(json.dumps(row))
    return read("vstar", folder, image_folders=others)


def tallyqa(folder, name, others):
    row = {"answer": 4, "data_source": "s", "image": name, "issimple": False, "question": "?", "question_id": 3}
    (folder / "test.json").write_text(json.dumps([row]))
    return read("tallyqa", folder, image_folders=others)


def infovqa(folder, name, others):
    row = {"questionId": 9, "question": "?", "image_local_name": name, "answers": ["7"], "answer_type": []}
    (folder / "info.json").write_text(json.dumps({"dataset_split": "val", "data": [row]}))
    return read("infovqa", folder / "info.json", image_folders=others)


def mvbench(folder, name, others):
    row = {"question": "?", "candidates": ["a", "b"], "answer": "b", "video": name}
    (folder / "json").mkdir(exist_ok=True)
    (folder / "json" / "action_count.json").write_text(json.dumps([row]))
    (folder / "perception").mkdir(exist_ok=True)
    (folder / "perception" / "videos").exists() or (folder / "perception" / "videos").symlink_to("..")
    return read("mvbench", folder, folder, image_folders=others)


READERS = {
    "jsonl": lambda folder, name, others: read_examples(own(folder, name), turns=False, image_folders=others),
    "jsonl of eval": lambda folder, name, others: read("jsonl", own(folder, name), image_folders=others),
    "seeds": seeds,
    "release.json": traces,
    "release.parquet": lambda folder, name, others: read_examples(
        questions(folder, name), turns=False, image_folders=others
    ),
    "prepared": lambda folder, name, others: read("prepared", questions(folder, name), image_folders=others),
    "vstar": vstar,
    "tallyqa": tallyqa,
    "infovqa": infovqa,
    "mvbench": mvbench,
}
NAMED = (ExampleError, SourceError, SeedError, BenchmarkError)


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_follows_the_rule(places, reader):
    data, take = places / "data", READERS[reader]
    for name in spelled(INSIDE, places):
        take(data, name, ())
    for name in spelled(OUTSIDE, places):
        with pytest.raises(NAMED, match="leads to"):
            take(data, name, ())
        take(data, name, (str(places / "other"),))
    for name in NOTHING:
        if reader in ("mvbench", "release.parquet", "prepared") and name in ("sub", "\ud800"):
            continue  # frames of a video are a folder; Parquet holds no such text
        with pytest.raises(NAMED):
            take(data, name, ("/",))


def test_a_pipe_hangs_nowhere(tmp_path):
    for name in ("b.jsonl", "x.zip", "release.json", "release.parquet", "test_questions.jsonl", "test.json", "i.json"):
        os.mkfifo(tmp_path / name)
    for act in (
        lambda: read_examples(tmp_path, turns=False),
        lambda: read_examples(tmp_path / "release.json", turns=True),
        lambda: read_examples(tmp_path / "release.parquet", turns=False),
        lambda: open_archive(tmp_path / "x.zip"),
        lambda: Folder(tmp_path),
        lambda: read("vstar", tmp_path),
        lambda: read("tallyqa", tmp_path),
        lambda: read("infovqa", tmp_path / "i.json"),
        lambda: read("jsonl", tmp_path),
        lambda: read_seeds(tmp_path / "b.jsonl"),
    ):
        with pytest.raises(NAMED, match="not a (regular )?file"):
            act()
    (tmp_path / "x.zip").unlink()
    with pytest.raises(BenchmarkError, match="not a regular file"):
        read("prepared", tmp_path / "release.parquet")
    for act in (lambda: read_bytes(tmp_path / "b.jsonl"), lambda: load_frames([tmp_path / "b.jsonl"] * 2, True)):
        with pytest.raises(ImageError):
            act()


@given(st.binary(max_size=300), st.integers(0, 400), st.booleans())
def test_a_damaged_archive_is_named(tmp_path_factory, noise, place, keep):
    path = tmp_path_factory.getbasetemp() / "fuzzed.zip"
    whole = files.archive(path, {"a.png": b"abc" * 30, "b": b"x"}).read_bytes()
    path.write_bytes((whole[:place] + noise + whole[place + len(noise) * keep :]) if place else noise)
    try:
        read_bytes(Member(path, "a.png"))
    except (SourceError, ImageError) as error:
        assert "fuzzed.zip" in str(error)
