"""Qwen3.5, dense: gated delta rule layers beside attention with an output gate, and the vision tower of Qwen3-VL."""

from dataclasses import dataclass
from typing import Any, ClassVar

from pixel_jax.models.config import (
    MAX_LAYERS,
    NESTED_NAMES,
    ModelConfig,
    TextConfig,
    TowerConfig,
    WeightNames,
    check_flag,
    check_part,
    check_positive,
    check_sections,
    field,
    flag,
    token,
    whole,
)
from pixel_jax.models.hybrid import HybridText
from pixel_jax.models.qwen3_vl import Qwen3Tower, Qwen3VLConfig

PREDICTION = r"mtp\..*"  # weights that predict further tokens, which transformers passes over, too


def _check_gate(value: Any) -> bool:
    if not check_flag(value):
        raise ValueError("false is not supported: attention of this family has an output gate")
    return True


@dataclass(frozen=True)
class Qwen3_5Text(HybridText):
    """The decoder of Qwen3.5: a quarter of each head is rotated, norms are centred at 1."""

    vocab_size: int = whole(248320)
    hidden_size: int = whole(4096)
    intermediate_size: int = whole(12288)
    num_hidden_layers: int = whole(32, MAX_LAYERS)
    num_attention_heads: int = whole(16)
    num_key_value_heads: int = whole(4)
    rms_norm_eps: float = field(1e-6, check_positive)
    rope_theta: float = field(1e4, check_positive)
    mrope_section: tuple[int, int, int] | None = field((11, 11, 10), check_sections)
    head_size: int | None = whole(256, key="head_dim")
    qkv_bias: bool = flag(False, key="attention_bias")
    output_bias: bool = flag(False, key="attention_bias")
    partial_rotary_factor: float = field(0.25, check_part)
    output_gate: bool = field(True, _check_gate, key="attn_output_gate")
    qk_norm: bool = True
    centred_norms: bool = True
    mrope_interleaved: bool = True


@dataclass(frozen=True)
class Qwen3_5Tower(Qwen3Tower):
    """The vision tower of Qwen3.5: that of Qwen3-VL, without outputs of inner blocks."""

    deepstack_visual_indexes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Qwen3_5Config(Qwen3VLConfig):
    """Qwen3.5, dense."""

    image_token_id: int = token(248056)
    video_token_id: int = token(248057)
    vision_start_token_id: int = token(248053)
    vision_end_token_id: int = token(248054)

    model_type: ClassVar[str] = "qwen3_5"
    architecture: ClassVar[str] = "Qwen3_5ForConditionalGeneration"
    names: ClassVar[WeightNames] = WeightNames((NESTED_NAMES,), unread=PREDICTION)
    text_class: ClassVar[type[TextConfig]] = Qwen3_5Text
    vision_class: ClassVar[type[TowerConfig]] = Qwen3_5Tower


@dataclass(frozen=True)
class Qwen3_5LanguageText(Qwen3_5Text):
    """The decoder of Qwen3.5 without a tower: one position for each token."""

    mrope_section: tuple[int, int, int] | None = None

    rope_kinds: ClassVar[tuple[str, ...]] = ("default",)


@dataclass(frozen=True)
class Qwen3_5LanguageConfig(ModelConfig):
    """Qwen3.5, dense, its decoder alone."""

    vision: None = None

    model_type: ClassVar[str] = "qwen3_5_text"
    architecture: ClassVar[str] = "Qwen3_5ForCausalLM"
    names: ClassVar[WeightNames] = WeightNames(unread=PREDICTION)
    text_class: ClassVar[type[TextConfig]] = Qwen3_5LanguageText
