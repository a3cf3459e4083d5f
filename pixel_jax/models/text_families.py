"""Language models without a vision tower: Qwen2 and Qwen2.5, Qwen3, and Llama, whose architecture SmolLM2 shares.

Only their configurations differ; the decoder is that of the vision-language families.
"""

from dataclasses import dataclass
from typing import ClassVar

from pixel_jax.models.config import MAX_LAYERS, ModelConfig, TextConfig, check_positive, check_size, field, flag, whole


@dataclass(frozen=True)
class Qwen2Text(TextConfig):
    """The decoder of Qwen2 and Qwen2.5."""

    vocab_size: int = whole(151936)
    hidden_size: int = whole(4096)
    intermediate_size: int = whole(22016)
    num_hidden_layers: int = whole(32, MAX_LAYERS)
    num_attention_heads: int = whole(32)
    num_key_value_heads: int = whole(32)
    rms_norm_eps: float = field(1e-6, check_positive)
    rope_theta: float = field(1e4, check_positive)
    mrope_section: tuple[int, int, int] | None = None

    rope_kinds: ClassVar[tuple[str, ...]] = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Qwen3Text(Qwen2Text):
    """The decoder of Qwen3: norms of queries and keys, and a size of heads that does not follow from the width."""

    head_size: int | None = whole(128, key="head_dim")
    qkv_bias: bool = flag(False, key="attention_bias")
    output_bias: bool = flag(False, key="attention_bias")
    qk_norm: bool = True


@dataclass(frozen=True)
class LlamaText(TextConfig):
    """The decoder of Llama 1 to 3 and of what shares its architecture."""

    vocab_size: int = whole(32000)
    hidden_size: int = whole(4096)
    intermediate_size: int = whole(11008)
    num_hidden_layers: int = whole(32, MAX_LAYERS)
    num_attention_heads: int = whole(32)
    num_key_value_heads: int = whole(0)
    rms_norm_eps: float = field(1e-6, check_positive)
    rope_theta: float = field(1e4, check_positive)
    mrope_section: tuple[int, int, int] | None = None
    max_position_embeddings: int = whole(2048, 2**31 - 1)
    head_size: int | None = field(None, check_size, key="head_dim")
    qkv_bias: bool = flag(False, key="attention_bias")
    output_bias: bool = flag(False, key="attention_bias")
    mlp_bias: bool = flag(False)

    rope_kinds: ClassVar[tuple[str, ...]] = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Qwen2Config(ModelConfig):
    """Qwen2 and Qwen2.5."""

    vision: None = None

    model_type: ClassVar[str] = "qwen2"
    architecture: ClassVar[str] = "Qwen2ForCausalLM"
    text_class: ClassVar[type[TextConfig]] = Qwen2Text


@dataclass(frozen=True)
class Qwen3Config(ModelConfig):
    """Qwen3, dense."""

    vision: None = None

    model_type: ClassVar[str] = "qwen3"
    architecture: ClassVar[str] = "Qwen3ForCausalLM"
    text_class: ClassVar[type[TextConfig]] = Qwen3Text


@dataclass(frozen=True)
class LlamaConfig(ModelConfig):
    """Llama 1 to 3, SmolLM2."""

    vision: None = None

    model_type: ClassVar[str] = "llama"
    architecture: ClassVar[str] = "LlamaForCausalLM"
    text_class: ClassVar[type[TextConfig]] = LlamaText
