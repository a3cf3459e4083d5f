"""Configuration of Qwen2.5-VL, read from and written to the `config.json` of a Hugging Face directory.

Two layouts are in circulation: the released one, in which the text fields stand flat beside `vision_config`, and the nested
one of transformers 4.52 and later, in which they stand in `text_config` and, since 5.0, the rotary fields in
`rope_parameters`. Both are read; the released one is written, because every release of transformers reads it.

A field that is missing has the default of transformers' configuration class: 4.49 leaves out whatever equals it, at any
level. These defaults are those of the dataclasses here.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixel_jax.files import FileError, read_json

CONFIG = "config.json"
MAX_LAYERS = 1000
MAX_SIZE = 2**20  # of a vocabulary, a width, a window
DTYPES = ("bfloat16", "float16", "float32", "float64")


def shown(value: Any) -> str:
    """A value in an error message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _field(default: Any, read: Callable[[Any], Any]) -> Any:
    """A field of a configuration: transformers' default, and what makes a value of a JSON value or raises ValueError."""
    return dataclasses.field(default=default, metadata={"read": read})


def _whole(default: int, most: int = MAX_SIZE, least: int = 1) -> Any:
    return _field(default, lambda value: _check_whole(value, most, least))


def _check_whole(value: Any, most: int, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"is {shown(value)}, not a whole number from {least} to {most}")
    return value


def _check_wholes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(x) is not int or not 0 <= x <= MAX_SIZE for x in value):
        raise ValueError(f"is {shown(value)}, not a list of whole numbers")
    return tuple(value)


def _check_sections(value: Any) -> tuple[int, ...]:
    if len(found := _check_wholes(value)) != 3:
        raise ValueError(f"is {shown(value)}, not three whole numbers")
    return found


def _check_positive(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"is {shown(value)}, not a positive number")
    return float(value)


def _check_token(value: Any) -> int | None:
    return None if value is None else _check_whole(value, 2**31 - 1, -1)  # -1: some files' word for none


def _check_tokens(value: Any) -> int | tuple[int, ...] | None:
    return tuple(_check_whole(x, 2**31 - 1) for x in value) if isinstance(value, list) else _check_token(value)


def _check_flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"is {shown(value)}, not true or false")
    return value


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower."""

    depth: int = _whole(32, MAX_LAYERS)
    hidden_size: int = _whole(3584)
    intermediate_size: int = _whole(3420)
    num_heads: int = _whole(16)
    out_hidden_size: int = _whole(3584)
    in_channels: int = _whole(3, 64)
    patch_size: int = _whole(14, 256)
    temporal_patch_size: int = _whole(2, 64)
    spatial_merge_size: int = _whole(2, 64)
    window_size: int = _whole(112)  # pixels
    fullatt_block_indexes: tuple[int, ...] = _field((7, 15, 23, 31), _check_wholes)
    tokens_per_second: int = _whole(4)

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

    vocab_size: int = _whole(152064)
    hidden_size: int = _whole(8192)
    intermediate_size: int = _whole(29568)
    num_hidden_layers: int = _whole(80, MAX_LAYERS)
    num_attention_heads: int = _whole(64)
    num_key_value_heads: int = _whole(8)
    rms_norm_eps: float = _field(1e-5, _check_positive)
    rope_theta: float = _field(1e6, _check_positive)
    mrope_section: tuple[int, int, int] = _field((16, 24, 24), _check_sections)
    max_position_embeddings: int = _whole(32768, 2**31 - 1)
    # For text generation elsewhere; nothing in the network depends on them. transformers 5, which has other defaults, always
    # writes them.
    bos_token_id: int | None = _field(None, _check_token)
    eos_token_id: int | tuple[int, ...] | None = _field(None, _check_tokens)
    pad_token_id: int | None = _field(None, _check_token)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class Qwen2_5_VLConfig:
    """The whole model: hashable, a static attribute of the modules."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int = _whole(151655, 2**31 - 1, 0)
    video_token_id: int = _whole(151656, 2**31 - 1, 0)
    vision_start_token_id: int = _whole(151652, 2**31 - 1, 0)
    vision_end_token_id: int = _whole(151653, 2**31 - 1, 0)
    tie_word_embeddings: bool = _field(False, _check_flag)

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
    def from_hf(cls, config: Any, where: str = CONFIG) -> "Qwen2_5_VLConfig":
        """The configuration that the contents of a `config.json` describe, in either layout.

        Args:
            config: the parsed file; fields that the network does not depend on are passed over.
            where: what messages call it.

        Raises:
            FileError: a value is not what its field takes, or asks for what is not supported. The message names both.
        """
        try:
            return cls._from_hf(config)
        except ValueError as error:
            raise FileError(f"{where}: {error}") from None

    @classmethod
    def _from_hf(cls, config: Any) -> "Qwen2_5_VLConfig":
        if not isinstance(config, dict):
            raise ValueError(f"the file holds {shown(config)}, not an object of fields")
        if config.get("model_type") != "qwen2_5_vl":
            raise ValueError(f"model_type is {shown(config.get('model_type'))}, expected 'qwen2_5_vl'")
        inner = _section(config, "text_config")
        text, prefix = (dict(config), "") if inner is None else (dict(inner), "text_config.")
        vision = dict(_section(config, "vision_config") or {})
        text |= _rotary(text, prefix)
        if "in_chans" in vision:  # the released spelling, beside which transformers may write its own
            vision = {"in_channels": vision["in_chans"]} | vision
        if text.get("num_key_value_heads", 0) is None:
            text["num_key_value_heads"] = text.get("num_attention_heads", TextConfig.num_attention_heads)
        own = _read_fields(cls, config, "")
        inside = text.get("tie_word_embeddings", False)  # there transformers 4.52 to 4.57 write it
        own["tie_word_embeddings"] = own.get("tie_word_embeddings", False) or _check_flag(inside)
        found = cls(
            text=TextConfig(**_read_fields(TextConfig, text, prefix)),
            vision=VisionConfig(**_read_fields(VisionConfig, vision, "vision_config.")),
            **own,
        )
        _check_supported(found, text, prefix, vision)
        return found

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


def read_config(directory: Path) -> tuple[Qwen2_5_VLConfig, str | None]:
    """The configuration in a model directory, and the name of the dtype that its weights are meant to have, if it says.

    Raises:
        FileError: `config.json` is not what it should be.
    """
    path = directory / CONFIG
    values = read_json(path, limit=2**24)
    config = Qwen2_5_VLConfig.from_hf(values, str(path))
    named = values.get("torch_dtype") or values.get("dtype")  # as transformers up to 4.55, and since
    if named is not None and named not in DTYPES:
        raise FileError(f"{path}: torch_dtype is {shown(named)}, not one of {', '.join(DTYPES)}")
    return config, named


def _section(config: dict[str, Any], name: str) -> dict[str, Any] | None:
    """An object inside the file; None if it is missing or null."""
    value = config.get(name)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name} is {shown(value)}, not an object of fields")
    return value


def _check_supported(config: Qwen2_5_VLConfig, text: dict[str, Any], prefix: str, vision: dict[str, Any]) -> None:
    """ValueError if a field that no dataclass holds asks for another network."""
    kinds = text.get("layer_types") or []
    kinds = kinds if isinstance(kinds, list) else [kinds]
    rope = _section(vision, "rope_parameters") or {}
    for name, value, supported in (
        (f"{prefix}hidden_act", text.get("hidden_act", "silu"), ("silu",)),
        (f"{prefix}use_sliding_window", text.get("use_sliding_window", False), (None, False)),
        (f"{prefix}head_dim", text.get("head_dim"), (None, config.text.head_dim)),
        *((f"{prefix}layer_types", kind, ("full_attention",)) for kind in kinds),
        ("vision_config.hidden_act", vision.get("hidden_act", "silu"), ("silu",)),
        ("vision_config.rope_parameters.rope_theta", rope.get("rope_theta", 10000), (10000,)),
    ):
        if value not in supported:
            raise ValueError(f"{name} {shown(value)} is not supported, only {supported[-1]!r}")


def _rotary(text: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The fields of the rotary embedding that stand in an object of their own."""
    name = "rope_parameters" if text.get("rope_parameters") else "rope_scaling"
    rope = _section(text, name) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise ValueError(f"{prefix}{name}: rope type {shown(kind)} is not supported, only 'mrope'")
    return {field: rope[field] for field in ("rope_theta", "mrope_section") if field in rope}


def _read_fields(cls, values: dict[str, Any], where: str) -> dict[str, Any]:
    """The arguments of a dataclass that a JSON object gives; what is missing keeps its default."""
    chosen = {}
    for spec in dataclasses.fields(cls):
        if spec.name in values and "read" in spec.metadata:
            try:
                chosen[spec.name] = spec.metadata["read"](values[spec.name])
            except ValueError as error:
                raise ValueError(f"{where}{spec.name} {error}") from None
    return chosen
