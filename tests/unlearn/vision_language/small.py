"""The quickstart's model, traces and commands at the smallest size there is."""

import dataclasses

import jax

from pixel_jax.models.io import save_pretrained
from pixel_jax.models.processor import Processor
from pixel_jax.quickstart.network import model_config, new_model
from pixel_jax.quickstart.vocabulary import build_vocabulary
from pixel_jax.rollouts.limits import write_limits
from tests.quickstart.small_limits import LIMITS, NETWORK
from unlearn_jax.config import ErasureConfig
from unlearn_jax.quickstart.config import (
    Config,
    ConvergeConfig,
    EditEvaluationConfig,
    EditForwardConfig,
    TracesConfig,
)


def save_model(directory):
    """A random model as the quickstart would have left it."""
    vocabulary = build_vocabulary()
    model = new_model(model_config(NETWORK, vocabulary), jax.random.key(0))
    processor = Processor(vocabulary.tokenizer, min_pixels=LIMITS.min_pixels, max_pixels=LIMITS.max_pixels)
    save_pretrained(model, processor, directory)
    write_limits(directory, LIMITS)


def make_config(model, out, **changes) -> Config:
    config = Config(
        model=str(model),
        out=str(out),
        traces=TracesConfig(zoom=4, direct=2, video=2),
        adapter=dataclasses.replace(Config.adapter, rank=2, alpha=4.0),
        forward=EditForwardConfig(remat=False),
        training=ConvergeConfig(tolerance=1e-4, max_steps=300),
        erasure=ErasureConfig(weight_decay=1e-2, micro_batch=16, training_epochs=300.0),
        evaluation=EditEvaluationConfig(baselines=("L-BFGS", "fine-tune"), learning_rates=(1e-2,), batch=4),
    )
    return dataclasses.replace(config, **changes)
