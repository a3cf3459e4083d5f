"""How much memory does training data take? `python -m pixel_jax.data.memory --rows 10000`

Goes through that many traces with crops, or questions, about images of two megapixels as `pixel-jax sft` and `pixel-jax rl`
would, batch by batch, and prints the most memory that the process had. The JPEGs are few and have many names (hard links),
so that they fit on a disk; each is opened and decoded as often as it is named.
"""

import json
import os
import pathlib
import resource
import tempfile
import time

import numpy as np
from absl import app, flags
from PIL import Image, ImageFilter

from pixel_jax.data.batches import Batches
from pixel_jax.data.packed import Packing, bucket_shapes
from pixel_jax.data.questions import find_rooms, question_batches
from pixel_jax.data.read import read_examples
from pixel_jax.data.rooms import Room
from pixel_jax.data.synthesis import crop_call, final_answer
from pixel_jax.data.traces import Shape
from pixel_jax.dialog.template import GUIDELINES, system_prompt
from pixel_jax.dialog.tokenizer import Vocabulary, build_tokenizer
from pixel_jax.rollout.config import RolloutConfig
from pixel_jax.rollout.prompts import tables

FLAGS = flags.FLAGS
flags.DEFINE_integer("rows", 10_000, "Traces, or questions.")
flags.DEFINE_enum("phase", "sft", ["sft", "rl"], "Whose batches.")
flags.DEFINE_integer("batch", 128, "Rows of a batch.")
flags.DEFINE_integer("skip", 0, "Batches to leave out, as a run that is resumed there would.")
flags.DEFINE_integer("batches", None, "Batches to make; all of one epoch by default.")
flags.DEFINE_integer("ahead", 32, "Rows that are read ahead.")
flags.DEFINE_integer("threads", 16, "Threads that read.")
flags.DEFINE_integer("height", 1228, "Of an image, in pixels.")
flags.DEFINE_integer("width", 1708, "Of an image, in pixels.")

DISTINCT = 8


def peak() -> float:
    """The most memory this process has had, in GB (10^9 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def write_data(folder: pathlib.Path, rows: int, height: int, width: int) -> pathlib.Path:
    """`rows` traces in a JSON-lines file, each about an image file of its own name."""
    random = np.random.default_rng(0)
    for i in range(min(DISTINCT, rows)):
        noise = random.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        image = Image.fromarray(noise).resize((width, height), Image.BICUBIC).filter(ImageFilter.SHARPEN)
        image.save(folder / f"{i}.jpg", quality=90)
    with (folder / "data.jsonl").open("w") as lines:
        for i in range(rows):
            if i >= DISTINCT:
                os.link(folder / f"{i % DISTINCT}.jpg", folder / f"{i}.jpg")
            boxes = random.uniform(0, 0.5, (1 + i % 3, 2)).round(2)
            turns = [crop_call("the sign", (x, y, x + 0.2, y + 0.25)) for x, y in boxes.tolist()]
            row = {"question": f"What does sign {i} say?", "images": [f"{i}.jpg"], "answer": "7"}
            lines.write(json.dumps(row | {"turns": [*turns, final_answer("7")]}) + "\n")
    return folder / "data.jsonl"


def batches_of(path: pathlib.Path, phase: str, batch: int, **reading: int) -> tuple[Batches, int]:
    """The batches that training would see, and how many are an epoch."""
    examples, report = read_examples(path, turns=phase == "sft")
    vocabulary = Vocabulary.of(build_tokenizer([system_prompt(), GUIDELINES["vcot"]]))
    token_tables, config = tables(vocabulary), RolloutConfig()
    if phase == "sft":
        room = Shape(length=5120, frames=6, slices=6, patches=8000)
        packing = Packing(
            examples,
            vocabulary,
            token_tables,
            config,
            bucket_shapes((3072, 4096), room),
            size=batch,
            seed=0,
            report=report,
        )
        print(packing, flush=True)
        return packing.batches(0, 1, **reading), -(-sum(map(len, packing.order.packed(0))) // batch)
    asked = find_rooms(examples, Room(1, 2048, 2048, 2560), None, vocabulary, config, report)
    data = question_batches(asked, vocabulary, token_tables, config, size=batch, seed=0, **reading)
    return data, -(-len(examples) // batch)


def main(arguments: list[str]) -> None:
    del arguments
    with tempfile.TemporaryDirectory() as folder:
        path = write_data(pathlib.Path(folder), FLAGS.rows, FLAGS.height, FLAGS.width)
        began = time.monotonic()
        data, epoch = batches_of(path, FLAGS.phase, FLAGS.batch, ahead=FLAGS.ahead, threads=FLAGS.threads)
        print(f"{FLAGS.rows} rows read in {time.monotonic() - began:.0f} s, {peak():.2f} GB", flush=True)
        data.set_state(data.get_state() | {"position": FLAGS.skip})
        until = FLAGS.skip + min(FLAGS.batches or epoch, epoch - FLAGS.skip)
        for i in range(FLAGS.skip, until):
            next(data)
            print(f"batch {i + 1} of {epoch}: {time.monotonic() - began:.0f} s, peak {peak():.2f} GB", flush=True)
        data.close()


if __name__ == "__main__":
    app.run(main)
