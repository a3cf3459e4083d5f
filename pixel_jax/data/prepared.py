"""Records of examples in the directories that TFDS prepares (`pixel_jax.data.tfds_builders`), written and read.

TensorFlow is never imported.
"""

import importlib.util
import os
import pathlib

import numpy as np

try:
    importlib.util.find_spec("tensorflow")
except ImportError:  # an import hook forbids it, and TFDS's path library, which asks for it, would fail
    os.environ["EPATH_USE_TF"] = "false"

import tensorflow_datasets as tfds

from pixel_jax.data.example import Example, ExampleError
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
