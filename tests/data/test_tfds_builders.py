"""The released data through TFDS, where importing TensorFlow fails: prepared, read at random, and trained on."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from pixel_jax.data.example import ExampleError
from pixel_jax.data.packed import Packing
from pixel_jax.data.questions import assign_shapes, question_batches
from pixel_jax.data.read import read_examples
from pixel_jax.rollouts.shapes import BatchShape, prompt_shape
from tests.data import released_files as files
from tests.rollouts import scripted_model

ROOT = pathlib.Path(__file__).parents[2]

# Two ways in which an import can fail: a hook forbids it, or what is installed is broken.
WAYS = {
    "forbidden": """
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tensorflow":
            raise ImportError("TensorFlow is not to be imported")
sys.meta_path.insert(0, Forbid())
""",
    "broken": "sys.path.insert(0, {broken!r})\n",
}

PREPARE = """
import sys
{way}
try:
    import tensorflow
except ImportError as error:
    print("blocked:", error)

import pixel_jax.data.tfds_builders
import tensorflow_datasets as tfds

config = tfds.download.DownloadConfig(manual_dir={manual!r})
for name in ("pixel_reasoner_traces", "pixel_reasoner_questions"):
    source = tfds.data_source(
        name, split="train", data_dir={out!r}, download_and_prepare_kwargs={{"download_config": config}}
    )
    print(name, len(source), [source[i]["id"].decode() for i in (1, 0)], len(source[0]["images"][0]))
print("loaded:", "tensorflow" in sys.modules)
"""


@pytest.fixture(scope="module")
def manual(tmp_path_factory):
    folder = tmp_path_factory.mktemp("manual")
    files.write_questions(folder)
    files.write_traces(folder)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_without_tensorflow(manual, tmp_path, way):
    broken = tmp_path / "broken"
    (broken / "tensorflow").mkdir(parents=True)
    (broken / "tensorflow" / "__init__.py").write_text('raise ImportError("TensorFlow is not to be imported")')
    out = tmp_path / "out"
    code = PREPARE.format(way=WAYS[way].format(broken=str(broken)), manual=str(manual), out=str(out))
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr
    lines = [line for line in found.stdout.splitlines() if line.startswith(("blocked", "pixel_reasoner", "loaded"))]
    image = len(files.encoded(0, 120, 150))
    assert lines == [
        "blocked: TensorFlow is not to be imported",
        f"pixel_reasoner_traces 4 ['SA1B-1', 'SA1B-0'] {image}",
        f"pixel_reasoner_questions 3 ['InfoVQA-2', 'InfoVQA-1'] {image}",
        "loaded: False",
    ]
    assert list((out / "pixel_reasoner_traces" / "strict").rglob("*.array_record*"))

    for name, file in (("traces", "release.json"), ("questions", "release.parquet")):
        turns = name == "traces"
        prepared, _ = read_examples(out / f"pixel_reasoner_{name}" / "strict" / "1.1.0", turns=turns)
        for ours, released in zip(prepared, read_examples(manual / file, turns=turns)[0], strict=True):
            assert ours._replace(images=()) == released._replace(images=())
            for a, b in zip(ours.query().images, released.query().images, strict=True):
                np.testing.assert_array_equal(a, b)
            assert [x.shape for x in ours.outline().images] == [x.shape for x in released.query().images]


def prepare(folder, out, name, config):
    import tensorflow_datasets as tfds

    import pixel_jax.data.tfds_builders  # noqa: F401

    builder = tfds.builder(f"{name}/{config}", data_dir=out, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=folder))
    return pathlib.Path(builder.data_dir)


def test_bad_rows_stop_or_are_named_in_the_metadata(tmp_path):
    files.write_traces(tmp_path)
    files.archive(tmp_path / "images.zip", {"images/0-0.png": files.encoded(0, 120, 150)[:2000]})
    with pytest.raises(ValueError, match="0-0.png cannot be read"):
        prepare(tmp_path, tmp_path / "out", "pixel_reasoner_traces", "strict")
    directory = prepare(tmp_path, tmp_path / "out", "pixel_reasoner_traces", "readable")
    assert [x.id for x in read_examples(directory, turns=True)[0]] == ["STARQA-7"]
    dropped = json.loads((directory / "metadata.json").read_text())["dropped"]
    assert len(dropped) == 3 and all("0-0.png cannot be read" in why for why in dropped)


def test_other_directories_are_refused(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(ExampleError, match="holds no prepared TFDS data"):
        read_examples(tmp_path, turns=False)


def test_what_an_older_version_prepared_is_refused(manual, tmp_path, monkeypatch):
    from pixel_jax.data import tfds_builders

    older = {name: feature for name, feature in tfds_builders.FEATURES.items() if name != "text_first"}
    record_of = tfds_builders.record_of
    with monkeypatch.context() as patch:
        patch.setattr(tfds_builders, "FEATURES", older)
        patch.setattr(tfds_builders, "record_of", lambda x: {k: v for k, v in record_of(x).items() if k in older})
        directory = prepare(manual, tmp_path / "out", "pixel_reasoner_traces", "strict")
    with pytest.raises(ExampleError, match="record 0 has no 'text_first': prepare the data again"):
        read_examples(directory, turns=True)


def test_without_tfds_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)  # importing it now fails
    monkeypatch.delitem(sys.modules, "pixel_jax.data.prepared", raising=False)
    with pytest.raises(
        ExampleError, match=r"was prepared by TFDS: `pip install tensorflow-datasets importlib-resources` to read it"
    ):
        read_examples(tmp_path, turns=False)


def test_batches_of_what_was_prepared_are_those_of_the_files(manual, tmp_path):
    """Stored bytes through the packer and the prompt builder, against the released files themselves."""
    words, tables = scripted_model.vocabulary(), scripted_model.token_tables()
    room, reading = BatchShape(tokens=1024, images=12, slices=12, patches=64), {"threads": 2, "ahead": 4}

    def traces(path):
        examples, report = read_examples(path, turns=True)
        options = {"size": 2, "seed": 0, "report": report}
        return Packing(examples, words, tables, scripted_model.CONFIG, (room,), **options).batches(0, 1, **reading)

    shapes = [prompt_shape(4, 192, 192, 96, scripted_model.CONFIG, video=video) for video in (False, True)]

    def questions(path):
        examples, report = read_examples(path, turns=False)
        asked = assign_shapes(
            examples,
            shapes,
            words,
            scripted_model.CONFIG,
            report,
        )
        return question_batches(asked, words, tables, scripted_model.CONFIG, size=4, seed=0, **reading)

    for name, file, batches in (("traces", "release.json", traces), ("questions", "release.parquet", questions)):
        directory = prepare(manual, tmp_path, f"pixel_reasoner_{name}", "strict")
        ours, theirs = batches(directory), batches(manual / file)
        found, wanted = next(ours), next(theirs)
        if name == "questions":  # prompts, examples (whose images lie elsewhere), sizes
            found, wanted = ((*x[::2], [(y.question, y.answer) for y in x[1]]) for x in (found, wanted))
            assert found[1:] == wanted[1:]
            found, wanted = found[0], wanted[0]
            pictures = [[image.arrays for image in prompts.images] for prompts in (found, wanted)]
            jax.tree.map(np.testing.assert_array_equal, *pictures)
            found, wanted = (prompts._replace(images=()) for prompts in (found, wanted))
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
        ours.close()
        theirs.close()
