"""A small vision-language model, trained on questions about other photographs, where a cue agrees with most answers."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
from jax.tree_util import Partial

from pixel_jax.config import ConfigError
from pixel_jax.dialog.tokenizer import Vocabulary, build_tokenizer
from pixel_jax.identity import changes, flatten
from pixel_jax.models.io import save_pretrained
from pixel_jax.models.lora import combine, split
from pixel_jax.models.processor import Processor
from pixel_jax.quickstart.network import model_config, new_model
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.limits import write_limits
from pixel_jax.state_files import read_note, write_json
from pixel_jax.training.progress import ProgressLine
from unlearn_jax.loss import CrossEntropy, Loss
from unlearn_jax.noisy_responses import photographs
from unlearn_jax.noisy_responses.answerer import QuestionWriter
from unlearn_jax.noisy_responses.config import BaseConfig
from unlearn_jax.requests.replay import beginning, train
from unlearn_jax.vision_language import Logits

# Long phrases that are one token each.
PIECES = ["system\nYou are a helpful assistant.", "user\n", "assistant\n", *photographs.TEXTS.values()]
LIMITS = RolloutConfig(min_pixels=photographs.SIDE**2, max_pixels=photographs.SIDE**2)
LENGTH = 20  # tokens of a question and its answer
NOTE = "base.json"  # beside the model, written when it is complete


def base_model(config: BaseConfig, directory: pathlib.Path) -> pathlib.Path:
    """Trains a model and saves it in a directory; one that is there with the same settings is used.

    Raises:
        ConfigError: the directory holds a model of other settings.
    """
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    if (found := read_note(directory / NOTE)) is not None:
        for name, (old, new) in changes(flatten(found), flatten(settings)).items():
            raise ConfigError(
                f"config.base.{name} is {new!r}, the model in {directory} has {old!r}: another --config.out"
            )
        return directory
    vocabulary = Vocabulary.of(build_tokenizer(PIECES))
    model = new_model(model_config(config.network, vocabulary), jax.random.key(config.training.seed))
    questions = photographs.draw_questions(photographs.BASE, config.each, config.agreement, config.training.seed)
    examples = QuestionWriter(vocabulary, LIMITS, LENGTH, 1).arrays(questions)
    weights, rest = split(model, lambda path, weight: True)
    loss = Loss(Partial(Logits(remat=False, implementation="dense"), rest), CrossEntropy())
    progress = ProgressLine("base model, steps", len(config.training.order(len(questions))))
    trained = train(
        config.training,
        loss,
        beginning(config.training, weights),
        examples,
        np.ones(len(questions)),
        log=lambda step, value: progress.update(step, {"loss": value}),
    )
    processor = Processor(vocabulary.tokenizer, min_pixels=LIMITS.min_pixels, max_pixels=LIMITS.max_pixels)
    save_pretrained(combine(trained, rest), processor, directory)
    write_limits(directory, LIMITS)
    write_json(directory / NOTE, settings)
    return directory
