"""The paper's recipe in shape, a few thousand weights in size."""

import dataclasses
import functools

from pixel_jax.planning.programs import Recipe
from pixel_jax.quickstart.vocabulary import build_vocabulary
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.prompts import tables
from pixel_jax.train_config import TrainConfig
from pixel_jax.training.rl import RLConfig
from pixel_jax.training.sft import SFTConfig
from pixel_jax.training.steps import ForwardConfig
from tests.training.tiny_model import tiny_config

PIXELS = 28**2
FORWARD = ForwardConfig(remat=True, implementation="chunked", logit_chunk=256)


@functools.cache
def recipe() -> Recipe:
    rollout = RolloutConfig(
        group_size=2,
        in_flight=4,
        top_k=4,
        max_new_tokens=24,
        max_calls=1,
        max_tokens=1024,
        max_response=768,
        max_pixels=8 * PIXELS,
        crop_max_pixels=4 * PIXELS,
        select_max_pixels=4 * PIXELS,
        video_max_pixels=4 * PIXELS,
        max_side=112,
        implementation="chunked",
    )
    config = TrainConfig(
        model="nowhere",
        data="nowhere",
        out="nowhere",
        sft=SFTConfig(steps=10, batch_size=8, forward=FORWARD),
        rl=RLConfig(iterations=2, prompts=8, train_batch=8, rollout=rollout, forward=FORWARD),
        trace_tokens=512,
        trace_frames=2,
        trace_patches=32,
        prompt_width=256,
        image_buffer=(1, 128, 128),
    )
    network = tiny_config()
    network = dataclasses.replace(network, vision=dataclasses.replace(network.vision, depth=4))
    return Recipe(config, network, tables(build_vocabulary()), dtype="float32")
