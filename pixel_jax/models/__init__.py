"""Networks: Qwen2.5-VL, its positions, attention, cache and adapters."""

from pixel_jax.models.attention import Mask, attention
from pixel_jax.models.config import Qwen2_5_VLConfig, TextConfig, VisionConfig
from pixel_jax.models.decoder import KVCache
from pixel_jax.models.inputs import Visual
from pixel_jax.models.qwen2_5_vl import Qwen2_5_VL, encode_visual, forward_hidden
from pixel_jax.models.rope import mrope_positions

__all__ = [
    "KVCache",
    "Mask",
    "Qwen2_5_VL",
    "Qwen2_5_VLConfig",
    "TextConfig",
    "VisionConfig",
    "Visual",
    "attention",
    "encode_visual",
    "forward_hidden",
    "mrope_positions",
]
