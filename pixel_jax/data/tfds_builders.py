"""TFDS builders of the released data: prepared once as ArrayRecord files of encoded images, which Grain reads at random.

TensorFlow is never imported. To prepare, put `release.json` or `release.parquet` and its archives into a directory:

    import pixel_jax.data.tfds_builders
    import tensorflow_datasets as tfds

    config = tfds.download.DownloadConfig(manual_dir="DIRECTORY")
    source = tfds.data_source("pixel_reasoner_traces", split="train", data_dir="OUT",
                              download_and_prepare_kwargs={"download_config": config})

Afterwards `--config.data=OUT/pixel_reasoner_traces/strict/1.1.0` trains on it. Every image is decoded while preparing; the
configuration `strict` stops at the first bad row, `readable` leaves bad rows out and keeps their names in the metadata.
"""

import importlib.util
import os
import pathlib

import numpy as np

try:
    importlib.util.find_spec("tensorflow")
except ImportError:  # an import hook forbids it, and the path library would stumble over asking for it
    os.environ["EPATH_USE_TF"] = "false"

import tensorflow_datasets as tfds

from pixel_jax.data.example import Example, ExampleError
from pixel_jax.data.read import read_examples
from pixel_jax.data.sources import Stored, read_bytes
from pixel_jax.data.traces import Turn

FEATURES = {
    "id": tfds.features.Text(),
    "question": tfds.features.Text(),
    "images": tfds.features.Sequence(tfds.features.Scalar(dtype=np.object_)),  # encoded files, as they were
    "video": tfds.features.Scalar(dtype=np.bool_),
    "seconds": tfds.features.Scalar(dtype=np.float64),  # 0: not given
    "text_first": tfds.features.Scalar(dtype=np.bool_),
    "answer": tfds.features.Sequence(tfds.features.Text()),
    "turns": tfds.features.Sequence(tfds.features.Text()),
    "learned": tfds.features.Sequence(tfds.features.Scalar(dtype=np.bool_)),  # for every turn
}


class _Released(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder of the rows of one released file, which lies in `manual_dir`."""

    VERSION = tfds.core.Version("1.1.0")
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="strict", description="A bad row is an error."),
        tfds.core.BuilderConfig(name="readable", description="Bad rows are left out and named in the metadata."),
    ]
    FILE: str
    TURNS: bool

    def __init__(self, *, file_format=None, **options):
        super().__init__(file_format=file_format or "array_record", **options)  # TFDS's own default needs TensorFlow

    @property
    def MANUAL_DOWNLOAD_INSTRUCTIONS(self) -> str:  # noqa: N802 (TFDS's name)
        return f"Put {self.FILE}, images.zip and videos.zip into manual_dir."

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(FEATURES),
            homepage="https://tiger-ai-lab.github.io/Pixel-Reasoner/",
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,  # rows stay in the order of the release
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(pathlib.Path(dl_manager.manual_dir) / self.FILE)}

    def _generate_examples(self, path: pathlib.Path):
        config, metadata = self.builder_config, self.info.metadata
        assert config is not None and metadata is not None
        examples, report = read_examples(path, turns=self.TURNS, drop=config.name == "readable")
        metadata.update(dropped=report.dropped, mended=dict(report.mended))
        for i, example in enumerate(examples):
            example.query()
            yield i, record_of(example)


class PixelReasonerTraces(_Released):
    """Pixel Reasoner's instruction-tuning traces (TIGER-Lab/PixelReasoner-SFT-Data)."""

    FILE, TURNS = "release.json", True


class PixelReasonerQuestions(_Released):
    """Pixel Reasoner's questions for reinforcement learning (TIGER-Lab/PixelReasoner-RL-Data)."""

    FILE, TURNS = "release.parquet", False


def record_of(example: Example) -> dict:
    """The record of an example, as the builders write it."""
    texts = [turn.parts[0][0] for turn in example.turns]
    return {
        "id": example.id,
        "question": example.question,
        "images": [read_bytes(source) for source in example.images],
        "video": example.video,
        "seconds": example.seconds or 0.0,
        "text_first": example.text_first,
        "answer": list(example.answer),
        "turns": texts,
        "learned": [turn.parts[0][1] for turn in example.turns],
    }


def read_prepared(directory: pathlib.Path) -> list[Example]:
    """Reads the examples of a directory that a builder has prepared; their images stay in its files."""
    try:
        # The stubs do not see through the decorator of the method.
        records = tfds.builder_from_directory(directory).as_data_source(split="train")  # pyright: ignore[reportCallIssue]
    except Exception as error:  # TFDS says it in many ways
        raise ExampleError(f"{directory} holds no prepared TFDS data: {error}") from None
    return [_example(records, i, directory) for i in range(len(records))]


def _example(records, index: int, folder: pathlib.Path) -> Example:
    record = records[index]
    if missing := FEATURES.keys() - record.keys():
        raise ExampleError(f"record {index} has no {min(missing)!r}: prepare the data again")

    def text(value: bytes) -> str:
        return value.decode("utf-8")

    return Example(
        id=text(record["id"]),
        question=text(record["question"]),
        images=tuple(Stored(records, index, number, folder) for number in range(len(record["images"]))),
        answer=tuple(map(text, record["answer"])),
        turns=tuple(
            Turn(((text(words), bool(learned)),))
            for words, learned in zip(record["turns"], record["learned"], strict=True)
        ),
        video=bool(record["video"]),
        seconds=float(record["seconds"]) or None,
        text_first=bool(record["text_first"]),
    )
