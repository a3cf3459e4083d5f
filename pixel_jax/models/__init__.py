"""Networks: the protocol of a model, its families, positions, attention, cache and adapters."""

from pixel_jax.models.attention import Mask, attention
from pixel_jax.models.config import ModelConfig, TextConfig, TowerConfig
from pixel_jax.models.decoder import KVCache
from pixel_jax.models.families import FAMILIES, Family, config_from_hf, register
from pixel_jax.models.inputs import Visual
from pixel_jax.models.model import LanguageModel, Model, encode_visual, forward_hidden
from pixel_jax.models.qwen_vl import Qwen2_5_VLConfig, VisionConfig
from pixel_jax.models.rope import mrope_positions

__all__ = [
    "FAMILIES",
    "Family",
    "KVCache",
    "LanguageModel",
    "Mask",
    "Model",
    "ModelConfig",
    "Qwen2_5_VLConfig",
    "TextConfig",
    "TowerConfig",
    "VisionConfig",
    "Visual",
    "attention",
    "config_from_hf",
    "encode_visual",
    "forward_hidden",
    "mrope_positions",
    "register",
]
