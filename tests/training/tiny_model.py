"""A model of a few thousand weights and batches of hand-made rows for it."""

import jax
import numpy as np

from pixel_jax.models import LanguageModel, Model, Qwen2_5_VLConfig, TextConfig, VisionConfig
from pixel_jax.models.inputs import Visual
from pixel_jax.training.batch import Batch

VOCAB = 64
IMAGE = 60


def tiny_config() -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text=TextConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            mrope_section=(1, 1, 2),
        ),
        vision=VisionConfig(
            depth=1, hidden_size=32, intermediate_size=64, num_heads=4, out_hidden_size=32, fullatt_block_indexes=(0,)
        ),
        image_token_id=IMAGE,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )


def make_model(seed: int = 0) -> Model:
    """Weights four times larger than usual: at the usual size a random network's outputs hardly depend on anything."""
    model = jax.jit(lambda key: LanguageModel(tiny_config(), key))(jax.random.key(seed))
    return jax.tree.map(lambda x: np.float32(4) * x if x.ndim > 1 and x.shape[-1] > 1 else x, model)


def make_batch(rows: int = 8, seed: int = 0) -> Batch:
    """Rows of 24 tokens, each with an image of 4 x 4 patches (4 visual tokens), a gap of padding and two turns."""
    random = np.random.default_rng(seed)
    length = 24
    tokens = random.integers(1, 50, (rows, length)).astype(np.int32)
    tokens[:, 2:6] = IMAGE
    valid = np.ones((rows, length), bool)
    chosen = np.zeros((rows, length), bool)
    for row in range(rows):
        valid[row, 8 + row % 3 : 10] = False  # the prompt is padded
        end = 20 + row % 4
        valid[row, end:] = False
        chosen[row, 10:14] = True
        chosen[row, 17:end] = True  # 14..16 is the observation
    patches = random.integers(0, 256, (rows, 1, 16, 588)).astype(np.uint8)
    visual = Visual(
        patches=patches,
        slices=np.zeros((rows, 1, 2), np.int32),
        grids=np.tile(np.array([[[1, 4, 4]]], np.int32), (rows, 1, 1)),
        seconds=np.zeros((rows, 1), np.float32),
    )
    logprobs = np.where(chosen, -random.exponential(1.0, (rows, length)), 0).astype(np.float32)
    return Batch(
        tokens=np.where(valid, tokens, 0).astype(np.int32),
        valid=valid,
        loss_mask=chosen,
        logprobs=logprobs,
        old_logprobs=logprobs,
        visual=visual,
        advantage=random.normal(size=rows).astype(np.float32),
        weight=np.ones(rows, np.float32),
    )
