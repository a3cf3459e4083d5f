"""The configuration of a model: the fields of `config.json` that all families share, and how they are read and checked.

A family is a subclass of `ModelConfig` with its own `TextConfig` and, if it has a vision tower, its own `TowerConfig`
(docs/add-a-family.md). A missing field has the default of transformers' configuration class, because transformers leaves out
fields that equal it; the dataclasses have the same defaults.

Two layouts are in circulation: flat, in which the text fields stand beside `vision_config`, and nested, in which they stand
in `text_config` and, since transformers 5.0, the rotary fields in `rope_parameters`. Both are read.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self

from pixel_jax.files import FileError
from pixel_jax.ops import IMAGE_MEAN, IMAGE_STD

CONFIG = "config.json"
MAX_LAYERS = 1000
MAX_SIZE = 2**20  # of a vocabulary, a width, a window


def shown(value: Any) -> str:
    """Returns a value as an error message shows it, at most 80 characters long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def field(default: Any, read: Callable[[Any], Any], key: str | None = None) -> Any:
    """Declares a field of a configuration.

    Args:
        default: the default of transformers' configuration class.
        read: converts a JSON value to that of the field, or raises ValueError.
        key: the name in the file; None: that of the field.
    """
    return dataclasses.field(default=default, metadata={"read": read, "key": key})


def whole(default: int, most: int = MAX_SIZE, least: int = 1, key: str | None = None) -> Any:
    """Declares a field that holds a whole number from `least` to `most`."""
    return field(default, lambda value: check_whole(value, most, least), key)


def flag(default: bool, key: str | None = None) -> Any:
    """Declares a field that is true or false."""
    return field(default, check_flag, key)


def token(default: int, key: str | None = None) -> Any:
    """Declares a field that holds the number of a token."""
    return whole(default, 2**31 - 1, 0, key)


def check_whole(value: Any, most: int, least: int = 0) -> int:
    """Returns a whole number from `least` to `most`; anything else raises ValueError."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"is {shown(value)}, not a whole number from {least} to {most}")
    return value


def check_size(value: Any) -> int | None:
    """Returns a positive whole number, or None; anything else raises ValueError."""
    return None if value is None else check_whole(value, MAX_SIZE, 1)


def check_wholes(value: Any) -> tuple[int, ...]:
    """Returns the numbers of a list of whole numbers; anything else raises ValueError."""
    if not isinstance(value, list) or any(type(x) is not int or not 0 <= x <= MAX_SIZE for x in value):
        raise ValueError(f"is {shown(value)}, not a list of whole numbers")
    return tuple(value)


def check_sections(value: Any) -> tuple[int, int, int]:
    """Returns the three numbers of `mrope_section`; anything else raises ValueError."""
    if len(sections := check_wholes(value)) != 3:
        raise ValueError(f"is {shown(value)}, not three whole numbers")
    return sections


def check_positive(value: Any) -> float:
    """Returns a positive finite number; anything else raises ValueError."""
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"is {shown(value)}, not a positive number")
    return float(value)


def check_flag(value: Any) -> bool:
    """Returns true or false; anything else raises ValueError."""
    if type(value) is not bool:
        raise ValueError(f"is {shown(value)}, not true or false")
    return value


def one_of(*values: str) -> Callable[[Any], Any]:
    """Returns a reader that takes only these strings."""

    def read(value: Any) -> str:
        if value not in values:
            raise ValueError(f"{shown(value)} is not supported, only {', '.join(map(repr, values))}")
        return value

    return read


def _check_token(value: Any) -> int | None:
    return None if value is None else check_whole(value, 2**31 - 1, -1)  # some files write -1 for none


def _check_tokens(value: Any) -> int | tuple[int, ...] | None:
    return tuple(check_whole(x, 2**31 - 1) for x in value) if isinstance(value, list) else _check_token(value)


def _check_whole_head(value: Any) -> float:
    """Returns the one part of a head that is rotated in families that do not declare it."""
    if value != 1:
        raise ValueError(f"{shown(value)} is not supported, only 1")
    return 1.0


def check_part(value: Any) -> float:
    """Returns a number above 0, at most 1; anything else raises ValueError."""
    if (part := check_positive(value)) > 1:
        raise ValueError(f"is {shown(value)}, not a number from 0 to 1")
    return part


class RopeScaling(NamedTuple):
    """How the rotary frequencies of a longer context follow from those of training.

    kind: 'linear' divides all frequencies by `factor`; 'llama3' only low ones, with a smooth transition (Llama 3.1).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class TextConfig:
    """The decoder. Defaults are those of Qwen2.5-VL; a family that has others is a subclass."""

    vocab_size: int = whole(152064)
    hidden_size: int = whole(8192)
    intermediate_size: int = whole(29568)
    num_hidden_layers: int = whole(80, MAX_LAYERS)
    num_attention_heads: int = whole(64)
    num_key_value_heads: int = whole(8)  # 0: num_attention_heads
    rms_norm_eps: float = field(1e-5, check_positive)
    rope_theta: float = field(1e6, check_positive)
    # The numbers of frequencies of time, height and width. None: positions are single numbers.
    mrope_section: tuple[int, int, int] | None = field((16, 24, 24), check_sections)
    max_position_embeddings: int = whole(32768, 2**31 - 1)
    # For text generation elsewhere; nothing in the network depends on them. transformers 5, which has other defaults, always
    # writes them.
    bos_token_id: int | None = field(None, _check_token)
    eos_token_id: int | tuple[int, ...] | None = field(None, _check_tokens)
    pad_token_id: int | None = field(None, _check_token)
    # What differs between families. A family that reads one of these from its file declares it again.
    head_size: int | None = None  # None: hidden_size / num_attention_heads
    qkv_bias: bool = True
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # an RMS norm of each head's query and key, before they are rotated
    mrope_interleaved: bool = False  # frequencies of time, height and width alternate, instead of forming blocks
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = 1.0  # the share of a head's numbers that are rotated, from the first on
    output_gate: bool = False  # attention's output is multiplied by the sigmoid of a gate, which `q_proj` computes, too
    centred_norms: bool = False  # whether RMS norms multiply by 1 + weight

    layer_kinds: ClassVar[tuple[str, ...]] = ("full_attention",)  # that the family supports
    rope_kinds: ClassVar[tuple[str, ...]] = ("default", "mrope")  # that the family supports; messages name the last one

    def __post_init__(self):
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_size is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        rotated = "the head dim" if self.partial_rotary_factor == 1 else "the rotated part of a head,"
        if self.mrope_section is not None and 2 * sum(self.mrope_section) != self.rotary_dim:
            raise ValueError(f"mrope_section {self.mrope_section} must add up to half of {rotated} {self.rotary_dim}")
        if self.rotary_dim % 2:
            raise ValueError(f"{rotated} {self.rotary_dim} is odd: rotary positions turn pairs")

    @property
    def head_dim(self) -> int:
        """Numbers in one head."""
        return self.head_size or self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Numbers in one head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def attention_layers(self) -> int:
        """The number of layers with attention, which keep keys and values."""
        return self.num_hidden_layers

    @property
    def recurrent_layers(self) -> int:
        """The number of recurrent layers, which keep a state of fixed size."""
        return 0

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of all layers."""
        heads = (self.num_attention_heads + self.num_key_value_heads) * self.head_dim
        return self.num_hidden_layers * self.hidden_size * (2 * heads + 3 * self.intermediate_size)

    @property
    def recurrence_flops(self) -> int:
        """Floating-point operations of all layers on their recurrent states, for each token."""
        return 0

    def cache_bytes(self, tokens: int, itemsize: int) -> int:
        """Returns the bytes of a row's cache for `tokens` tokens, of numbers of `itemsize` bytes."""
        return 2 * self.attention_layers * self.num_key_value_heads * self.head_dim * tokens * itemsize

    def layer_numbers(self, key: str, count: int) -> Sequence[int]:
        """Returns the layers that have a weight, in the order of its stack.

        Args:
            key: our name of the weight, or of its module, with `{}` for the layer.
            count: length of the stack.
        """
        return range(count)


@dataclass(frozen=True)
class TowerConfig:
    """A vision tower that reads patches of images and of pairs of frames.

    A visual token is made of `spatial_merge_size` ** 2 neighbouring patches.
    """

    depth: int = whole(32, MAX_LAYERS)
    hidden_size: int = whole(1280)
    intermediate_size: int = whole(3420)
    num_heads: int = whole(16)
    out_hidden_size: int = whole(3584)
    in_channels: int = whole(3, 64)
    patch_size: int = whole(14, 256)
    temporal_patch_size: int = whole(2, 64)
    spatial_merge_size: int = whole(2, 64)
    # What differs between families. A family that reads one of these from its file declares it again.
    hidden_act: str = "silu"
    gated: bool = False  # blocks of RMS norms and gated MLPs; else of layer norms and MLPs of two layers
    mlp_names: tuple[str, str] = ("fc1", "fc2")  # of an MLP of two layers
    patch_bias: bool = False
    window_size: int | None = None  # pixels; None: every block attends to the whole image
    fullatt_block_indexes: tuple[int, ...] = ()  # of a tower with windows: the blocks that attend to the whole image
    tokens_per_second: int | None = None  # positions in a second of video; None: one for each temporal patch
    num_position_embeddings: int | None = None  # of a learned square table
    deepstack_visual_indexes: tuple[int, ...] = ()  # blocks whose outputs are added in the first decoder layers

    pixel_mean: ClassVar[tuple[float, float, float]] = IMAGE_MEAN
    pixel_std: ClassVar[tuple[float, float, float]] = IMAGE_STD

    def __post_init__(self):
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"vision hidden_size {self.hidden_size} is no multiple of 4 x num_heads ({self.num_heads})"
            )
        if self.window_size is not None and self.window_cells < 1:
            raise ValueError(f"vision window_size {self.window_size} is smaller than one merged cell")
        if any(i >= self.depth for i in self.deepstack_visual_indexes):
            raise ValueError(
                f"vision deepstack_visual_indexes {self.deepstack_visual_indexes}: there are {self.depth} blocks"
            )

    @property
    def head_dim(self) -> int:
        """Numbers in one head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch: channels x frames x height x width (1176 in Qwen2.5-VL)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches merged into one visual token."""
        return self.spatial_merge_size**2

    @property
    def factor(self) -> int:
        """Pixels along one side of a visual token: the sides of an image are multiples of it."""
        return self.patch_size * self.spatial_merge_size

    @property
    def fixed_grid(self) -> tuple[int, int] | None:
        """Height and width in patches, where all images have one size."""
        return None

    def token_grid(self, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """Returns the grid in patches that has as many visual tokens as an item of `grid` (slices, height, width)."""
        return grid

    @property
    def window_cells(self) -> int:
        """Merged cells along one side of an attention window (4 in Qwen2.5-VL)."""
        assert self.window_size is not None
        return self.window_size // self.patch_size // self.spatial_merge_size

    @property
    def merger_weights(self) -> int:
        """Numbers in the matrices that a visual token is multiplied with after the last block."""
        wide = self.hidden_size * self.merge_unit
        return (wide**2 + wide * self.out_hidden_size) * (1 + len(self.deepstack_visual_indexes))

    @property
    def feature_size(self) -> int:
        """Size of a visual token's features: of the decoder's input, and of what is added in its first layers."""
        return self.out_hidden_size * (1 + len(self.deepstack_visual_indexes))


class WeightNames(NamedTuple):
    """The names of weights in the files of a family.

    Our names are the same for all families: the decoder is `model`, the vision tower `visual`, the head `lm_head`.

    Args:
        spellings: for each spelling in circulation, the prefixes that differ: (ours, that of the file). The first spelling
            is written, all are read; the last one is that of the modules of transformers, which adapters of PEFT name.
        unread: pattern of names in files of weights that the network has no use for; "": of none.
    """

    spellings: tuple[tuple[tuple[str, str], ...], ...] = ((),)
    unread: str = ""

    def in_file(self, key: str) -> str:
        """Returns our name of a weight as the family's files spell it."""
        return self._spelled(key, self.spellings[0])

    def in_transformers(self, key: str) -> str:
        """Returns our name of a weight or a module as transformers spells it."""
        return self._spelled(key, self.spellings[-1])

    def all_spellings(self, key: str) -> list[str]:
        """Returns our name of a weight or a module in each spelling, that of transformers first."""
        return [self._spelled(key, spelling) for spelling in reversed(self.spellings)]

    def _spelled(self, key: str, spelling: tuple[tuple[str, str], ...]) -> str:
        ours, files = max((x for x in spelling if key.startswith(x[0])), default=("", ""), key=_first)
        return files + key[len(ours) :]

    def ours(self, key: str) -> str:
        """Returns a name in a file, in any of the spellings, as we spell it."""
        pairs = [(files, ours) for spelling in self.spellings for ours, files in spelling if key.startswith(files)]
        files, ours = max(pairs, default=("", ""), key=_first)
        return ours + key[len(files) :]


def _first(pair: tuple[str, str]) -> int:
    return len(pair[0])


# The spelling since transformers 4.52, and the one before.
NESTED_NAMES = (("visual.", "model.visual."), ("model.", "model.language_model."))
FLAT_NAMES = (("visual.", "visual."), ("model.", "model."))


@dataclass(frozen=True)
class ModelConfig:
    """The whole model of a family: hashable, a static attribute of the modules."""

    text: TextConfig
    vision: TowerConfig | None
    tie_word_embeddings: bool = dataclasses.field(default=False, metadata={"read": check_flag}, kw_only=True)

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    names: ClassVar[WeightNames] = WeightNames()
    text_class: ClassVar[type[TextConfig]] = TextConfig
    vision_class: ClassVar[type[TowerConfig] | None] = None
    nested: ClassVar[bool] = False  # whether the layout that is written has a `text_config`
    # For processors: the texts that stand for an image and for a video, whether each temporal patch of a video is a separate item
    # behind its time in the text, and transformers' classes.
    placeholders: ClassVar[tuple[str, ...]] = ()
    splits_videos: ClassVar[bool] = False
    processor: ClassVar[str] = ""
    image_processor: ClassVar[str] = ""

    def __post_init__(self):
        if self.vision is not None and self.vision.out_hidden_size != self.text.hidden_size:
            raise ValueError(
                f"vision out_hidden_size {self.vision.out_hidden_size} differs from the text hidden_size {self.text.hidden_size}"
            )

    @property
    def visual_tokens(self) -> tuple[int, ...]:
        """The placeholder tokens, which the decoder replaces by visual features."""
        return ()

    @classmethod
    def from_hf(cls, config: Any, where: str = CONFIG) -> Self:
        """Returns the configuration that the contents of a `config.json` describe, in either layout.

        Args:
            config: the parsed file; fields that do not concern the network are ignored.
            where: the file's name in messages.

        Raises:
            FileError: the value of a field is invalid or not supported. The message names both.
        """
        try:
            if not isinstance(config, dict):
                raise ValueError(f"the file holds {shown(config)}, not an object of fields")
            if config.get("model_type") != cls.model_type:
                raise ValueError(f"model_type is {shown(config.get('model_type'))}, expected {cls.model_type!r}")
            return cls._from_hf(config)
        except ValueError as error:
            raise FileError(f"{where}: {error}") from None

    @classmethod
    def _from_hf(cls, config: dict[str, Any]) -> Self:
        inner = section(config, "text_config")
        text, prefix = (dict(config), "") if inner is None else (dict(inner), "text_config.")
        own = read_fields(cls, config, "")
        inside = text.get("tie_word_embeddings", False)  # there transformers 4.52 to 4.57 write it
        own["tie_word_embeddings"] = own.get("tie_word_embeddings", False) or check_flag(inside)
        if cls.vision_class is not None:
            own["vision"] = cls.read_vision(section(config, "vision_config") or {})
        return cls(text=read_text(cls.text_class, text, prefix), **own)

    @classmethod
    def read_vision(cls, vision: dict[str, Any]) -> TowerConfig:
        """Returns the tower that the contents of `vision_config` describe."""
        assert cls.vision_class is not None
        return read_tower(cls.vision_class, vision)

    def to_hf(self) -> dict[str, Any]:
        """Returns the contents of `config.json` in the released layout."""
        text = write_text(self.text)
        values = {"architectures": [self.architecture], "model_type": self.model_type, **written(self)}
        if self.nested:
            values["text_config"] = {"model_type": f"{self.model_type}_text", **text}
        else:
            values = {**text, **values}
        if self.vision is not None:
            values["vision_config"] = {"model_type": self.model_type, **self.vision_to_hf(self.vision)}
        return values

    def vision_to_hf(self, vision: TowerConfig) -> dict[str, Any]:
        """Returns the contents of `vision_config`."""
        return written(vision)


def section(config: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Returns an object inside the file; None if it is missing or null."""
    value = config.get(name)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name} is {shown(value)}, not an object of fields")
    return value


def read_text(cls: type[TextConfig], text: dict[str, Any], prefix: str) -> TextConfig:
    """Returns the decoder that an object of fields describes; `prefix` is its path in the file, for messages.

    Raises:
        ValueError: a field asks for another network than the family has.
    """
    text = dict(text)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    rotary = _rotary(cls, text, prefix)
    if text.get("num_key_value_heads", 0) is None:
        text["num_key_value_heads"] = text.get("num_attention_heads", fields["num_attention_heads"].default)
    config = cls(**{**read_fields(cls, text, prefix), **rotary})
    kinds = text.get("layer_types") or []
    kinds = kinds if isinstance(kinds, list) else [kinds]
    for name, value, supported in (
        ("hidden_act", text.get("hidden_act", "silu"), ("silu",)),
        ("use_sliding_window", text.get("use_sliding_window", False), (None, False)),
        ("head_dim", text.get("head_dim"), (None, config.head_dim)),
        *(("layer_types", kind, cls.layer_kinds) for kind in kinds),
    ):
        if value not in supported:
            raise ValueError(f"{prefix}{name} {shown(value)} is not supported, only {supported[-1]!r}")
    return config


def _rotary(cls: type[TextConfig], text: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Returns the fields of the rotary embedding, which may stand in an object of their own."""
    name = "rope_parameters" if text.get("rope_parameters") else "rope_scaling"
    rope = section(text, name) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in cls.rope_kinds:
        raise ValueError(f"{prefix}{name}: rope type {shown(kind)} is not supported, only {cls.rope_kinds[-1]!r}")
    where, values = f"{prefix}{name}.", {}
    for field_name, read in (
        ("rope_theta", check_positive),
        ("mrope_section", check_sections),
        ("mrope_interleaved", check_flag),
    ):
        if field_name in rope and (field_name == "rope_theta" or "mrope" in cls.rope_kinds):
            values[field_name] = check_at(f"{prefix}{field_name}", read, rope[field_name])
    if "partial_rotary_factor" in rope:
        read = next(f.metadata.get("read") for f in dataclasses.fields(cls) if f.name == "partial_rotary_factor")
        values["partial_rotary_factor"] = check_at(
            f"{where}partial_rotary_factor", read or _check_whole_head, rope["partial_rotary_factor"]
        )
    if kind in ("linear", "llama3"):
        names = RopeScaling._fields[1:] if kind == "llama3" else ("factor",)
        if missing := [n for n in names if n not in rope]:
            raise ValueError(f"{prefix}{name}: rope type {kind!r} needs {', '.join(missing)}")
        values["rope_scaling"] = RopeScaling(kind, *(check_at(where + n, check_positive, rope[n]) for n in names))
    return values


def check_at(where: str, read: Callable[[Any], Any], value: Any) -> Any:
    """Returns `read(value)`; the message of a ValueError says where the value stands."""
    try:
        return read(value)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from None


def read_tower(cls: type[TowerConfig], vision: dict[str, Any]) -> TowerConfig:
    """Returns the vision tower that the contents of `vision_config` describe."""
    rope = section(vision, "rope_parameters") or {}
    if rope.get("rope_theta", 10000) != 10000:
        raise ValueError(
            f"vision_config.rope_parameters.rope_theta {shown(rope['rope_theta'])} is not supported, only 10000"
        )
    if "in_chans" in vision:  # the released spelling, beside which transformers may write its own
        vision = {"in_channels": vision["in_chans"]} | vision
    return cls(**read_fields(cls, vision, "vision_config."))


def read_fields(cls: Any, values: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns the arguments of a dataclass that are in a JSON object; the others have their defaults."""
    chosen = {}
    for spec in dataclasses.fields(cls):
        key = spec.metadata.get("key") or spec.name
        if key in values and "read" in spec.metadata:
            chosen[spec.name] = check_at(f"{where}{key}", spec.metadata["read"], values[key])
    return chosen


def written(config: Any) -> dict[str, Any]:
    """Returns the fields of a configuration that stand in files, by their names there."""
    specs = [spec for spec in dataclasses.fields(config) if "read" in spec.metadata]
    return {spec.metadata.get("key") or spec.name: getattr(config, spec.name) for spec in specs}


def write_text(text: TextConfig) -> dict[str, Any]:
    """Returns the fields of a decoder as the files of all releases of transformers have them."""
    values = {"hidden_act": "silu", "use_sliding_window": False, **written(text)}
    section_, scaling = values.pop("mrope_section", None), text.rope_scaling
    if section_ is not None:
        kind = "default" if text.mrope_interleaved else "mrope"
        values["rope_scaling"] = {"rope_type" if text.mrope_interleaved else "type": kind, "mrope_section": section_}
        if text.mrope_interleaved:
            values["rope_scaling"]["mrope_interleaved"] = True
        if "partial_rotary_factor" in values:
            values["rope_scaling"]["partial_rotary_factor"] = values.pop("partial_rotary_factor")
    elif scaling is not None:
        rope = scaling._asdict()
        values["rope_scaling"] = {
            "rope_type": rope.pop("kind"),
            **(rope if scaling.kind == "llama3" else {"factor": scaling.factor}),
        }
    return values
