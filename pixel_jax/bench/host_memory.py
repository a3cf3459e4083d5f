"""Measures how much memory a host needs.

    python -m pixel_jax.bench.host_memory --rows 10000

It processes that many traces with crops, or trajectories, about images of two megapixels as `pixel-jax sft` and `pixel-jax rl`
would, batch by batch, and prints the peak of the process's memory. A few JPEG files have many names (hard links), so that they
fit on a disk; each is opened and decoded under every name.

Nothing is put on devices, whose memory would be the host's on a CPU. Trajectories are random: every row calls once or twice, and
half of the groups have nonzero variance. They are replayed and padded as those of a rollout, for one of `--devices` after the
other.
"""

import json
import os
import pathlib
import resource
import tempfile
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags
from PIL import Image, ImageFilter

from pixel_jax.data.batches import Batches
from pixel_jax.data.packed import Packing
from pixel_jax.data.questions import assign_shapes, question_batches
from pixel_jax.data.read import read_examples
from pixel_jax.data.synthesis import crop_call, final_answer
from pixel_jax.dialog.template import GUIDELINES, system_prompt
from pixel_jax.dialog.tokenizer import Vocabulary, build_tokenizer
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.images import pad
from pixel_jax.rollouts.materialize import VisualRecord, patch_source
from pixel_jax.rollouts.prompts import tables
from pixel_jax.rollouts.rollout import static_shape
from pixel_jax.rollouts.shapes import BatchShape, RolloutShape, prompt_shape
from pixel_jax.rollouts.trajectory import CallStatus, HostPrompts, Trajectories, Views, no_calls
from pixel_jax.tools import RELEASED
from pixel_jax.training.batch import Rows, from_trajectories
from pixel_jax.training.replay import Replay, ReplayConfig

FLAGS = flags.FLAGS
flags.DEFINE_integer("rows", 10_000, "Traces, or trajectories.")
flags.DEFINE_enum("phase", "sft", ["sft", "rl"], "Whose batches.")
flags.DEFINE_integer("batch", 128, "Rows of a batch; in reinforcement learning questions.")
flags.DEFINE_integer("devices", 64, "Devices that an update's rows are split over.")
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
    """Writes `rows` traces to a file of JSON lines, each about an image file of its own name."""
    random = np.random.default_rng(0)
    for i in range(min(DISTINCT, rows)):
        noise = random.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).filter(ImageFilter.SHARPEN)
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


class Learning:
    """The arrays that `training.rl` keeps in memory from iteration to iteration, with the paper's defaults."""

    def __init__(self, config: RolloutConfig, train_batch: int, devices: int):
        self.config, self.train_batch, self.devices = config, train_batch, devices
        self.replay, self.random = Replay(ReplayConfig(), 0), np.random.default_rng(0)

    def iteration(self, prompts: HostPrompts) -> None:
        """Carries out one iteration: rollout, replay, updates."""
        config, count = self.config, len(prompts.length)
        shape = static_shape(prompts, config, None)
        for part in np.array_split(np.arange(count), self.devices):  # the shards that go to the devices
            assert len(pad(prompts.images[part], shape.prompts)) == len(part)
        trajectories = self.random_rows(prompts, shape)
        advantage = self.random.normal(size=count * config.group_size).astype(np.float32)
        batch = from_trajectories(trajectories, advantage, np.array(trajectories.logprobs))
        rows = Rows(batch, np.repeat(prompts.images, config.group_size))
        del prompts
        nonzero_variance = np.repeat(self.random.random(count) < 0.5, config.group_size)
        selected = self.replay.select(rows, nonzero_variance, shape.prompts._replace(tokens=batch.tokens.shape[1]))
        assert selected is not None  # half of the groups have nonzero variance
        for first in range(0, len(selected) // self.train_batch * self.train_batch, self.train_batch):
            images = self.replay.batch(selected[first : first + self.train_batch]).images
            for part in np.array_split(np.arange(self.train_batch), self.devices):
                assert pad(images[part], shape.prompts).any(axis=(1, 2, 3, 4)).all()

    def random_rows(self, prompts: HostPrompts, shape: RolloutShape) -> Trajectories[VisualRecord]:
        """Makes rows as long as they may be, with one or two crops each."""
        config, rows = self.config, len(prompts.length) * self.config.group_size
        length = prompts.tokens.shape[1] + config.max_response
        numbers = frames = config.max_calls + 1
        called = np.arange(numbers) < self.random.integers(1, 3, (rows, 1))
        crops = np.where(called, 0, -1).astype(np.int32)
        box = np.where(called[..., None], np.array([100, 100, 900, 700]), 0).astype(np.int32)
        size = np.where(called[..., None], np.array([616, 812]), 0).astype(np.int32)
        calls = no_calls(rows, numbers, 1, RELEASED)._replace(
            status=np.where(called, CallStatus.DONE, CallStatus.NONE).astype(np.int32),
            tool=crops,
            outcome=crops,
            source=Views(crops[..., None], box[..., None, :], size[..., None, :]),
        )
        source = jax.tree.map(np.asarray, patch_source(prompts, calls, config, shape))
        full = lambda dtype: np.ones((rows, length), dtype)  # zeros would not be in memory
        return Trajectories(
            tokens=full(np.int32),
            valid=full(bool),
            loss_mask=full(bool),
            logprobs=full(np.float32),
            visual=VisualRecord(
                source,
                slices=np.ones((rows, frames, 2), np.int32),
                grids=np.ones((rows, frames, 3), np.int32),
                seconds=np.ones((rows, frames), np.float32),
            ),
            prompt=np.repeat(np.arange(len(prompts.length)), config.group_size),
            calls=calls,
            num_calls=called.sum(axis=1),
            stop=np.zeros(rows, np.int32),
        )


def batches_of(path: pathlib.Path, phase: str, batch: int, **reading: Any) -> tuple[Batches, int]:
    """Makes the batches that training would read, and counts those of an epoch."""
    examples, report = read_examples(path, turns=phase == "sft")
    vocabulary = Vocabulary.of(build_tokenizer([system_prompt(), GUIDELINES["vcot"]]))
    token_tables, config = tables(vocabulary), RolloutConfig()
    if phase == "sft":
        shapes = [BatchShape(tokens, 6, 6, 8000) for tokens in (3072, 4096, 5120)]
        packing = Packing(
            examples,
            vocabulary,
            token_tables,
            config,
            shapes,
            size=batch,
            seed=0,
            report=report,
        )
        print(packing, flush=True)
        return packing.batches(0, 1, **reading), -(-sum(map(len, packing.order.packed(0))) // batch)
    questions = assign_shapes(
        examples, [prompt_shape(1, 2048, 2048, 2560, config, video=False)], vocabulary, config, report
    )
    data = question_batches(questions, vocabulary, token_tables, config, size=batch, seed=0, **reading)
    return data, -(-len(examples) // batch)


def main(arguments: list[str]) -> None:
    """Runs the measurement."""
    del arguments
    with tempfile.TemporaryDirectory() as folder:
        config = RolloutConfig()
        tuning = FLAGS.phase == "sft"
        rows = FLAGS.rows if tuning else -(-FLAGS.rows // config.group_size)
        learning = None if tuning else Learning(config, min(256, FLAGS.batch * config.group_size), FLAGS.devices)
        path = write_data(pathlib.Path(folder), rows, FLAGS.height, FLAGS.width)
        began = time.monotonic()
        data, epoch = batches_of(path, FLAGS.phase, FLAGS.batch, ahead=FLAGS.ahead, threads=FLAGS.threads)
        print(f"{rows} rows read in {time.monotonic() - began:.0f} s, {peak():.2f} GB", flush=True)
        data.set_state(data.get_state() | {"position": FLAGS.skip})
        until = FLAGS.skip + min(FLAGS.batches or epoch, epoch - FLAGS.skip)
        for i in range(FLAGS.skip, until):
            batch = next(data)
            if learning:
                learning.iteration(batch[0])
            del batch  # else its images would be in memory together with those of the next
            print(f"batch {i + 1} of {epoch}: {time.monotonic() - began:.0f} s, peak {peak():.2f} GB", flush=True)
        data.close()


if __name__ == "__main__":
    app.run(main)
