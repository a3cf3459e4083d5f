"""A run of `pixel-jax sft` with adapters at the smallest size there is: six traces about four pictures."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
from PIL import Image

from pixel_jax.data.synthesis import SENTENCES, crop_call, final_answer, opening_zoom
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.models.io import save_pretrained
from pixel_jax.models.processor import Processor
from pixel_jax.phases import train
from pixel_jax.quickstart.network import model_config, new_model
from pixel_jax.rollouts.limits import write_limits
from pixel_jax.tools import RELEASED
from pixel_jax.train_config import LoRAConfig, TrainConfig
from pixel_jax.training.optimizer import OptimizerConfig
from pixel_jax.training.sft import SFTConfig
from pixel_jax.training.steps import ForwardConfig
from pixel_jax.training.watch import WatchConfig
from tests.quickstart import small_limits
from tests.rollouts import scripted_model

LIMITS = dataclasses.replace(small_limits.LIMITS, max_tokens=256)
QUESTION = "Which digit is on the tag?"
BOX = (0.1, 0.2, 0.6, 0.7)
WRITTEN = "0.10, 0.20, 0.60, 0.70"
PICTURES = (0, 1, 2, 3, 0, 1)  # of each trace: the last two are about those of the first two


def vocabulary() -> Vocabulary:
    """Words for what all rows have, so that they are short."""
    return scripted_model.vocabulary_of([QUESTION, *opening_zoom("tag").split("\n"), SENTENCES.answer], RELEASED)


def save_model(directory: pathlib.Path) -> pathlib.Path:
    words = vocabulary()
    model = new_model(model_config(small_limits.NETWORK, words), jax.random.key(0))
    save_pretrained(model, Processor(words.tokenizer, **small_limits.BUDGET), directory)
    write_limits(directory, LIMITS)
    return directory


def rows() -> list[dict]:
    """Four zooms and two direct answers."""
    found = []
    for i, picture in enumerate(PICTURES):
        turns = [crop_call("tag", BOX), final_answer(str(i))] if i < 4 else [final_answer(str(i))]
        found.append(
            {"id": f"t{i}", "question": QUESTION, "images": [f"{picture}.png"], "answer": str(i), "turns": turns}
        )
    return found


def write_data(directory: pathlib.Path, lines: list[dict]) -> pathlib.Path:
    directory.mkdir(exist_ok=True)
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (84, 96, 3), np.uint8)
        Image.fromarray(pixels).save(directory / f"{i}.png")
    (directory / "traces.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory / "traces.jsonl"


def run_config(model, data, out, *, replayable=True, steps=6) -> TrainConfig:
    """Three traces a batch, one or two of them a row: an epoch is two steps."""
    section = SFTConfig(
        steps=steps,
        batch_size=2,
        trainable=".*lora_",
        optimizer=OptimizerConfig(learning_rate=3e-2, warmup=0.0, schedule="constant"),
        forward=ForwardConfig(micro_batches=1, remat=False, implementation="dense"),
        save_every=1,
        replayable=replayable,
    )
    return TrainConfig(
        model=str(model),
        data=str(data),
        out=str(out),
        sft=section,
        lora=LoRAConfig(rank=2, alpha=4.0, targets=r"model\.layers\..*\.(q_proj|v_proj)"),
        rollout=LIMITS,
        trace_tokens=256,
        trace_frames=5,
        trace_patches=32,
        watch=WatchConfig(share=0.0),
        read_threads=1,
        seed=3,
    )


def trained(model, data, out, **changes) -> pathlib.Path:
    train("sft", run_config(model, data, out, **changes))
    return pathlib.Path(out)
