"""The quickstart's model, traces and commands at the smallest size there is."""

import dataclasses

import jax

from pixel_jax.models.io import save_pretrained
from pixel_jax.models.processor import Processor
from pixel_jax.quickstart.network import NetworkConfig, model_config, new_model
from pixel_jax.quickstart.vocabulary import build_vocabulary
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.limits import write_limits
from unlearn_jax.config import ErasureConfig
from unlearn_jax.quickstart.config import (
    Config,
    ConvergeConfig,
    EditEvaluationConfig,
    EditForwardConfig,
    TracesConfig,
)

BUDGET = {"min_pixels": 2 * 784 + 1, "max_pixels": 5 * 784 - 1}  # four visual tokens of a square image
LIMITS = RolloutConfig(
    max_calls=2,
    max_images=8,
    max_tokens=160,
    **BUDGET,
    **{f"crop_{name}": value for name, value in BUDGET.items()},
    **{f"select_{name}": value for name, value in BUDGET.items()},
    video_min_pixels=784,
    video_max_pixels=2 * 784 - 1,
    max_side=112,
    pad=0.0,
)
NETWORK = NetworkConfig(
    width=32, layers=1, mlp=32, vision_width=32, vision_layers=1, vision_mlp=32, heads=2, kv_heads=2, vision_heads=2
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
