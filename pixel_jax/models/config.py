"""Configuration of Qwen2.5-VL, read from and written to the `config.json` of a Hugging Face directory.

Two layouts are in circulation: the released one, in which the text fields stand flat beside `vision_config`, and the nested
one of transformers 5, in which they stand in `text_config` and the rotary fields in `rope_parameters`. Both are read; the
released one is written, because every release of transformers reads it.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower. Defaults are those of the released checkpoints; sizes have none."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112  # pixels
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    tokens_per_second: int = 4

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch: channels x frames x height x width (1176 as released)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches merged into one visual token (4)."""
        return self.spatial_merge_size**2

    @property
    def window_cells(self) -> int:
        """Merged cells along one side of an attention window (4)."""
        return self.window_size // self.patch_size // self.spatial_merge_size


@dataclass(frozen=True)
class TextConfig:
    """The decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    max_position_embeddings: int = 128000
    # For text generation elsewhere; nothing in the network depends on them.
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class Qwen2_5_VLConfig:
    """The whole model: hashable, a static attribute of the modules."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    tie_word_embeddings: bool = False

    def __post_init__(self):
        text, vision = self.text, self.vision
        if text.hidden_size % text.num_attention_heads:
            raise ValueError(
                f"hidden_size {text.hidden_size} is no multiple of num_attention_heads {text.num_attention_heads}"
            )
        if text.num_attention_heads % text.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {text.num_attention_heads} is no multiple of "
                f"num_key_value_heads {text.num_key_value_heads}"
            )
        if 2 * sum(text.mrope_section) != text.head_dim:
            raise ValueError(f"mrope_section {text.mrope_section} must add up to half of the head dim {text.head_dim}")
        if vision.hidden_size % (4 * vision.num_heads):
            raise ValueError(
                f"vision hidden_size {vision.hidden_size} is no multiple of 4 x num_heads ({vision.num_heads})"
            )
        if vision.out_hidden_size != text.hidden_size:
            raise ValueError(
                f"vision out_hidden_size {vision.out_hidden_size} differs from the text hidden_size {text.hidden_size}"
            )
        if vision.window_cells < 1:
            raise ValueError(f"vision window_size {vision.window_size} is smaller than one merged cell")

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Qwen2_5_VLConfig":
        """Read the contents of `config.json`, either layout. A missing or unsupported value raises with its name."""
        if config.get("model_type") != "qwen2_5_vl":
            raise ValueError(f"config.json: model_type is {config.get('model_type')!r}, expected 'qwen2_5_vl'")
        if not isinstance(config.get("vision_config"), dict):
            raise ValueError("config.json: field 'vision_config' is missing")
        where = "text_config." if "text_config" in config else ""
        text = dict(config["text_config"] if where else config)
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "mrope"):
            raise ValueError(f"config.json: rope type {rope_type!r} is not supported, only 'mrope'")
        text |= {name: rope[name] for name in ("rope_theta", "mrope_section") if name in rope}
        vision = dict(config["vision_config"])
        if "in_chans" in vision:  # the released spelling
            vision["in_channels"] = vision["in_chans"]
        for part, prefix in ((text, where), (vision, "vision_config.")):
            if part.get("hidden_act", "silu") != "silu":
                raise ValueError(
                    f"config.json: {prefix}hidden_act {part['hidden_act']!r} is not supported, only 'silu'"
                )
        if text.get("use_sliding_window", False):
            raise ValueError("config.json: use_sliding_window is not supported")
        ids = {name: config[name] for name in cls.__dataclass_fields__ if name.endswith("_id") and name in config}
        tied = bool(config.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False))
        return cls(
            text=_build(TextConfig, text, where),
            vision=_build(VisionConfig, vision, "vision_config."),
            tie_word_embeddings=tied,
            **ids,
        )

    def to_hf(self) -> dict[str, Any]:
        """The contents of `config.json` in the released layout."""
        text, vision = dataclasses.asdict(self.text), dataclasses.asdict(self.vision)
        rope = {"type": "mrope", "mrope_section": text.pop("mrope_section")}
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("text", "vision")}
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "hidden_act": "silu",
            "use_sliding_window": False,
            **text,
            **own,
            "rope_scaling": rope,
            "vision_config": {
                "model_type": "qwen2_5_vl",
                "hidden_act": "silu",
                **vision,
                "in_chans": vision["in_channels"],
            },
        }


def _build(cls, values: dict[str, Any], where: str):
    """A config dataclass from JSON values; a field that is missing and has no default raises with its name."""
    chosen = {}
    for spec in dataclasses.fields(cls):
        value = values.get(spec.name)
        if value is not None:
            chosen[spec.name] = tuple(value) if isinstance(value, list) else value
        elif spec.default is dataclasses.MISSING:
            raise ValueError(f"config.json: field '{where}{spec.name}' is missing")
    return cls(**chosen)
