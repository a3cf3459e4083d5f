"""The configurations of the Qwen-VL families, which share placeholder tokens and the layout of their files."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from pixel_jax.models.config import (
    FLAT_NAMES,
    NESTED_NAMES,
    ModelConfig,
    TowerConfig,
    WeightNames,
    check_at,
    check_positive,
    check_wholes,
    field,
    one_of,
    token,
    whole,
    written,
)


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """The vision tower of Qwen2.5-VL: most blocks attend within windows."""

    hidden_size: int = whole(3584)
    hidden_act: str = field("silu", one_of("silu"))
    gated: bool = True
    window_size: int = whole(112)
    fullatt_block_indexes: tuple[int, ...] = field((7, 15, 23, 31), check_wholes)
    tokens_per_second: int = whole(4)


@dataclass(frozen=True)
class QwenVLConfig(ModelConfig):
    """A Qwen-VL model: a vision tower, and a decoder with positions of time, height and width."""

    vision: TowerConfig
    image_token_id: int = token(151655)
    video_token_id: int = token(151656)
    vision_start_token_id: int = token(151652)
    vision_end_token_id: int = token(151653)

    names: ClassVar[WeightNames] = WeightNames((FLAT_NAMES, NESTED_NAMES))
    placeholders: ClassVar[tuple[str, ...]] = ("<|image_pad|>", "<|video_pad|>")
    image_processor: ClassVar[str] = "Qwen2VLImageProcessor"

    @property
    def visual_tokens(self) -> tuple[int, ...]:
        """See `ModelConfig.visual_tokens`."""
        return self.image_token_id, self.video_token_id


@dataclass(frozen=True)
class Qwen2_5_VLConfig(QwenVLConfig):
    """Qwen2.5-VL (arXiv:2502.13923): the positions of a video follow its seconds."""

    model_type: ClassVar[str] = "qwen2_5_vl"
    architecture: ClassVar[str] = "Qwen2_5_VLForConditionalGeneration"
    processor: ClassVar[str] = "Qwen2_5_VLProcessor"
    vision_class: ClassVar[type[TowerConfig]] = VisionConfig

    def vision_to_hf(self, vision: TowerConfig) -> dict[str, Any]:
        """See `ModelConfig.vision_to_hf`."""
        return {**written(vision), "in_chans": vision.in_channels}


@dataclass(frozen=True)
class Qwen2Tower(TowerConfig):
    """The vision tower of Qwen2-VL, whose file calls the tower's width `embed_dim` and the decoder's `hidden_size`."""

    hidden_size: int = whole(1280, key="embed_dim")
    out_hidden_size: int = whole(3584, key="hidden_size")
    intermediate_size: int = 5120  # the file gives it as a multiple of the width, `mlp_ratio`
    hidden_act: str = field("quick_gelu", one_of("quick_gelu"))


@dataclass(frozen=True)
class Qwen2VLConfig(QwenVLConfig):
    """Qwen2-VL (arXiv:2409.12191): each temporal patch of a video takes one position of time."""

    model_type: ClassVar[str] = "qwen2_vl"
    architecture: ClassVar[str] = "Qwen2VLForConditionalGeneration"
    processor: ClassVar[str] = "Qwen2VLProcessor"
    vision_class: ClassVar[type[TowerConfig]] = Qwen2Tower

    @classmethod
    def read_vision(cls, vision: dict[str, Any]) -> TowerConfig:
        """See `ModelConfig.read_vision`."""
        tower = super().read_vision(vision)
        ratio = check_at("vision_config.mlp_ratio", check_positive, vision.get("mlp_ratio", 4))
        return dataclasses.replace(tower, intermediate_size=int(tower.hidden_size * ratio))

    def vision_to_hf(self, vision: TowerConfig) -> dict[str, Any]:
        """See `ModelConfig.vision_to_hf`."""
        ratio = vision.intermediate_size / vision.hidden_size
        whole_ratio = int(ratio) if ratio == int(ratio) else ratio
        return {**written(vision), "in_chans": vision.in_channels, "mlp_ratio": whole_ratio}
