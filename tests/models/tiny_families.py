"""Tiny random models of every family: the contents of their `config.json`, transformers' model of it, and ours."""

import copy
import functools
import json
import tempfile
from pathlib import Path

import pytest
from tiny_qwen import random_weights, tiny_config

import pixel_jax

IMAGE, VIDEO, START, END = 60, 61, 58, 59
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": 2,
}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
LLAVA = {"model_type": "llava", "image_token_index": IMAGE, "text_config": {"model_type": "llama", **TEXT}}
LLAMA3 = {
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}
LINEAR = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
QWEN3_VL = {
    "model_type": "qwen3_vl",
    **TOKENS,
    "text_config": {
        "model_type": "qwen3_vl_text",
        **TEXT,
        "head_dim": 16,
        "rope_theta": 5e6,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [4, 2, 2]},
    },
    "vision_config": {
        "model_type": "qwen3_vl",
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 2],
    },
}
DELTA = {
    **TEXT,
    "head_dim": 32,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
        "mrope_section": [2, 1, 1],
    },
}
VALUES = {
    "qwen2": {"model_type": "qwen2", **TEXT, "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", **TEXT, "head_dim": 16, "rope_theta": 1e6, "tie_word_embeddings": True},
    "llama": {"model_type": "llama", **TEXT, **LINEAR, "attention_bias": True, "mlp_bias": True},
    "llama3": {"model_type": "llama", **TEXT, **LLAMA3, "head_dim": 8, "rope_theta": 5e5, "tie_word_embeddings": True},
    "qwen2_vl": {
        "model_type": "qwen2_vl",
        **TEXT,
        **TOKENS,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "mlp_ratio": 2,
            "num_heads": 2,
            "in_chans": 3,
        },
    },
    "qwen2_5_vl": json.loads(json.dumps(tiny_config().to_hf())),
    "qwen3_vl": QWEN3_VL,
    "qwen3_vl_tied": {**QWEN3_VL, "tie_word_embeddings": True},
    "qwen3_5": {
        "model_type": "qwen3_5",
        **TOKENS,
        "text_config": {
            "model_type": "qwen3_5_text",
            **DELTA,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        },
        "vision_config": {
            "model_type": "qwen3_5",
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 36,
        },
    },
    "qwen3_5_text": {
        "model_type": "qwen3_5_text",
        **DELTA,
        "num_hidden_layers": 4,
        "full_attention_interval": 2,
        "tie_word_embeddings": True,
    },
    "llava": {**LLAVA, "vision_config": CLIP},
    "llava_full": {
        **LLAVA,
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": CLIP,
        "vision_feature_layer": [-1, 1],
        "vision_feature_select_strategy": "full",
        "multimodal_projector_bias": False,
    },
}  # fmt: skip
TEXT_ONLY = ("qwen2", "qwen3", "llama", "llama3", "qwen3_5_text")
VISUAL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_tied", "qwen3_5", "llava", "llava_full")


def parameters(names) -> list:
    """Names of families as parameters of tests: Qwen2.5-VL, with tests of its own (test_decoder_parity.py), as a slow one."""
    return [pytest.param(name, marks=pytest.mark.slow) if name == "qwen2_5_vl" else name for name in names]


def values(name: str) -> dict:
    """The contents of a `config.json`."""
    return copy.deepcopy(VALUES[name])


def torch_model(name: str, seed: int = 0, **fields):
    """A transformers model in float32 with random weights; `fields` of the `config.json` have other values."""
    import torch
    import transformers

    contents = values(name) | fields
    config = transformers.AutoConfig.for_model(**contents)
    config._attn_implementation = "eager"
    kind = transformers.AutoModelForImageTextToText if name in VISUAL else transformers.AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="eager").float().eval()
    model = random_weights(model, seed)
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__ == "Qwen3_5RMSNorm":  # its weight is what is added to 1
                module.weight -= 1
            if type(module).__name__ == "Qwen3_5GatedDeltaNet":
                # A state that remembers. What is read of a short memory is about one value times the product of a query and a
                # key, which may be near zero, and the norm behind it blows up that number's rounding.
                module.A_log -= 3
    return model


@functools.cache
def pair(name: str, **fields):
    """(our model, transformers' model) with the same weights, read from the directory that transformers writes."""
    theirs = torch_model(name, **fields)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours, processor = pixel_jax.from_pretrained(Path(folder))
    assert processor is None
    return ours, theirs
