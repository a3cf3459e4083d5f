"""Models of other families roll out, are tuned and learn.

A Qwen3-VL, with patches of 16 pixels, a Qwen3.5, with recurrent layers, and a Llama without eyes.
"""

import dataclasses

import jax
import numpy as np
import pytest

from pixel_jax.models import config_from_hf
from pixel_jax.models.decoder import KVCache
from pixel_jax.models.lora import add_lora
from pixel_jax.parallel import make_mesh, shard
from pixel_jax.rollouts import trajectory
from pixel_jax.rollouts.loop import constrain_rows
from pixel_jax.rollouts.prompts import PromptError, Query, build_prompts
from pixel_jax.rollouts.rollout import rollout
from pixel_jax.rollouts.timing import seconds_of_operations
from pixel_jax.training.batch import from_trajectories
from pixel_jax.training.losses import PolicyLossConfig
from pixel_jax.training.optimizer import OptimizerConfig, make_optimizer
from pixel_jax.training.state import init_state
from pixel_jax.training.steps import ForwardConfig, check_report, make_rl_step, make_score_step, make_sft_step
from tests.rollouts import scripted_model

KEY = jax.random.key(7)
TEXT = {
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "head_dim": 16,
}


def qwen2_vl(words, size, hidden):
    half = hidden // TEXT["num_attention_heads"] // 2
    text = {name: value for name, value in TEXT.items() if name != "head_dim"}
    tower = {"depth": 2, "embed_dim": 32, "hidden_size": hidden, "mlp_ratio": 2, "num_heads": 2, "in_chans": 3}
    marks = ("image_pad", "video_pad", "vision_start", "vision_end")
    tokens = dict(zip(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
                      (getattr(words, mark) for mark in marks), strict=True))  # fmt: skip
    rotary = {"type": "mrope", "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    return config_from_hf(
        {"model_type": "qwen2_vl", **text, **tokens, "vocab_size": size, "hidden_size": hidden, "rope_scaling": rotary,
         "vision_config": tower}
    )  # fmt: skip


def qwen3_vl(words, size, hidden):
    return config_from_hf(
        {
            "model_type": "qwen3_vl",
            "image_token_id": words.image_pad,
            "video_token_id": words.video_pad,
            "text_config": {
                **TEXT,
                "vocab_size": size,
                "hidden_size": hidden,
                "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [4, 2, 2]},
            },
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": hidden,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
        }
    )


def qwen3_5(words, size, hidden):
    return config_from_hf(
        {
            "model_type": "qwen3_5",
            "image_token_id": words.image_pad,
            "video_token_id": words.video_pad,
            "text_config": {
                **TEXT,
                "vocab_size": size,
                "hidden_size": hidden,
                "full_attention_interval": 2,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 16,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "rope_parameters": {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": hidden,
                "num_position_embeddings": 16,
            },
        }
    )


def llama(words, size, hidden):
    return config_from_hf({"model_type": "llama", **TEXT, "vocab_size": size, "hidden_size": hidden})


def visible(model):
    """The model with a tower whose features are as large as an embedding: what it sees changes what it says."""
    tower = jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, model.visual)
    model = jax.tree.map(lambda x: x, model)
    model.visual = tower
    return model


def update(model, batch, kind, targets):
    """The reports of two steps on adapters."""
    optimizer, config = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup=0.0), 10), ForwardConfig()
    adapted = add_lora(model, jax.random.key(1), rank=2, alpha=4.0, targets=targets)
    state = init_state(adapted, optimizer, trainable=r".*lora_[ab]")
    step = make_sft_step(config, optimizer) if kind == "sft" else make_rl_step(config, PolicyLossConfig(), optimizer)
    reports = []
    for number in range(2):
        state, report = step(state, batch)
        reports.append(check_report(jax.device_get(report), number))
    return reports


def learn(model, t, targets=r"model\.layers.*q_proj"):
    """Sampler and trainer agree on the rows; one step of tuning and one of reinforcement learning lower their losses."""
    batch = from_trajectories(t, advantage=np.linspace(-1, 1, len(t.stop)).astype(np.float32))
    logprobs = np.asarray(make_score_step(ForwardConfig(remat=False))(model, batch)[0])
    np.testing.assert_allclose(logprobs[t.loss_mask], t.logprobs[t.loss_mask], atol=5e-5)
    for kind in ("sft", "rl"):
        first, second = update(model, batch, kind, targets)
        assert first["grad_norm"] > 0 and second["loss"] < first["loss"], kind


PIXELS = {
    **dict.fromkeys(("max_pixels", "crop_max_pixels"), 4 * 32**2),
    **dict.fromkeys(("min_pixels", "crop_min_pixels", "select_min_pixels", "video_min_pixels"), 32**2),
    **dict.fromkeys(("select_max_pixels", "video_max_pixels"), 2 * 32**2),
}


@pytest.mark.slow
def test_qwen3_vl():
    model = visible(scripted_model.network(scripted_model.vocabulary(), make_config=qwen3_vl))
    config = dataclasses.replace(scripted_model.CONFIG, **PIXELS)
    with pytest.raises(
        ValueError,
        match="has patch_size=14, split_videos=False; the model needs patch_size=16, split_videos=True: take",
    ):
        rollout(model, scripted_model.prompts(2, config=config), KEY, config)
    config = config.for_model(model.config)
    prompts = scripted_model.prompts(2, config=config, video=True)
    t = trajectory.to_host(rollout(model, prompts, KEY, config))
    found = scripted_model.outcomes(t)
    assert (found == scripted_model.CROPPED).any() and (found == scripted_model.SELECTED).any()
    t = scripted_model.with_pixels(t, prompts, config)
    assert t.visual.patches.shape[-1] == 3 * 16**2
    words = scripted_model.vocabulary()
    for row in range(config.group_size, 2 * config.group_size):  # of the video: each pair of frames behind its time
        text = words.to_bytes(t.tokens[row][t.valid[row]].tolist()).decode()
        first = "<|im_start|>user\n<|vision_start|><0.1 seconds><|vision_start|><|video_pad|><|vision_end|>"
        assert text.count("<|video_pad|>") == 2 and first in text
        assert t.visual.grids[row, :3].tolist() == [[1, 2, 2], [1, 2, 2], [0, 0, 0]]
    shown = t.visual.grids.prod(axis=-1)[t.visual.grids[..., 0] > 0]
    assert (shown % 4 == 0).all() and shown.max() <= 16
    learn(model, t)
    blank = trajectory.to_host(rollout(model, prompts, KEY, dataclasses.replace(config, blank=True)))
    assert (blank.logprobs != t.logprobs).any()  # it sees the crops


def test_qwen3_5():
    """Recurrent states of rows begin as their prompt's, also in slots that are filled again: the trainer, which reads whole
    rows, gives their tokens the probabilities with which they were drawn. On a mesh, whose devices have some of the rows and
    of the heads, rows are the same."""
    model = visible(scripted_model.network(scripted_model.vocabulary(), make_config=qwen3_5))
    config = dataclasses.replace(scripted_model.CONFIG, **PIXELS).for_model(model.config)
    prompts = scripted_model.prompts(4, config=config)
    t = trajectory.to_host(rollout(model, prompts, KEY, dataclasses.replace(config, in_flight=1)))
    assert (scripted_model.outcomes(t) == scripted_model.CROPPED).any()

    mesh = make_mesh({"data": 2, "tensor": 2})
    split = rollout(shard(model, mesh), prompts, KEY, dataclasses.replace(config, in_flight=2))
    assert len(split.tokens.sharding.device_set) == 4
    split = trajectory.to_host(split)
    for name in ("tokens", "valid", "loss_mask", "stop", "num_calls"):
        np.testing.assert_array_equal(getattr(split, name), getattr(t, name), name)
    np.testing.assert_allclose(split.logprobs, t.logprobs, atol=5e-5)

    t = scripted_model.with_pixels(t, prompts, config)
    learn(model, t, r"model\.layers.*(q_proj|in_proj_qkv|in_proj_a|out_proj)")


def test_recurrent_states_are_split_by_rows_and_heads():
    """No device holds the whole state of a row."""
    mesh, words = make_mesh({"data": 4, "tensor": 2}), scripted_model.vocabulary()
    config = qwen3_5(words, 64, 64)
    of_rows = config.text.empty_state(4, np.float32)
    for state, lead in ((of_rows, (1,)), (jax.tree.map(lambda x: np.stack([x, x], axis=1), of_rows), (1, 2))):
        keys = (np.zeros((4, 2, 8, 16), np.float32),)
        cache = KVCache(keys, keys, np.zeros(4, np.int32), (state,))
        placed = jax.jit(lambda x: constrain_rows(x, mesh))(cache)
        tail, memory = (x.sharding.shard_shape(x.shape) for x in placed.recurrent[0])
        heads, channels = config.text.linear_num_value_heads, 2 * config.text.key_size + config.text.value_size
        assert memory == (*lead, heads // 2, 8, 16) and tail == (*lead, 3, channels // 2)


def test_llama():
    model = scripted_model.network(scripted_model.vocabulary(), make_config=llama)
    words, config = scripted_model.vocabulary(), scripted_model.CONFIG.for_model(model.config)
    asked = [Query("Which digit?", []), Query("Which digit is it?", [])]
    with pytest.raises(PromptError, match="comes without an image"):
        build_prompts(asked, words, scripted_model.token_tables(), scripted_model.CONFIG)
    with pytest.raises(PromptError, match="has images, of which a row may have none"):
        build_prompts(scripted_model.queries(1), words, scripted_model.token_tables(), config)
    prompts = build_prompts(asked, words, scripted_model.token_tables(), config)
    with pytest.raises(ValueError, match="family 'llama' sees no images, but rows may have 16"):
        rollout(model, prompts, KEY, scripted_model.CONFIG)
    t = trajectory.to_host(rollout(model, prompts, KEY, config))
    assert t.num_calls.max() > 0 and not (scripted_model.outcomes(t) == scripted_model.CROPPED).any()
    assert seconds_of_operations(model, prompts, t, config) == 0.0
    learn(model, scripted_model.with_pixels(t, prompts, config))
