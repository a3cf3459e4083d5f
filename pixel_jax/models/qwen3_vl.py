"""Qwen3-VL, dense: its configuration, and what its vision tower has beyond that of Qwen2-VL."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from pixel_jax.models.config import (
    MAX_LAYERS,
    NESTED_NAMES,
    TextConfig,
    TowerConfig,
    WeightNames,
    check_positive,
    check_sections,
    check_wholes,
    field,
    flag,
    one_of,
    whole,
)
from pixel_jax.models.layers import LayerNorm, Linear, normal
from pixel_jax.models.qwen_vl import QwenVLConfig
from pixel_jax.models.vision import EPS, PatchLayout, VisionTower


@dataclass(frozen=True)
class Qwen3VLText(TextConfig):
    """The decoder of Qwen3-VL: norms of queries and keys, positions of the three axes interleaved."""

    vocab_size: int = whole(151936)
    hidden_size: int = whole(4096)
    intermediate_size: int = whole(22016)
    num_hidden_layers: int = whole(32, MAX_LAYERS)
    num_attention_heads: int = whole(32)
    num_key_value_heads: int = whole(32)
    rms_norm_eps: float = field(1e-6, check_positive)
    rope_theta: float = field(5e5, check_positive)
    mrope_section: tuple[int, int, int] | None = field((24, 20, 20), check_sections)
    max_position_embeddings: int = whole(128000, 2**31 - 1)
    head_size: int | None = whole(128, key="head_dim")
    qkv_bias: bool = flag(False, key="attention_bias")
    output_bias: bool = flag(False, key="attention_bias")
    qk_norm: bool = True
    mrope_interleaved: bool = True


@dataclass(frozen=True)
class Qwen3Tower(TowerConfig):
    """The vision tower of Qwen3-VL: a learned table of positions, and outputs of inner blocks for the decoder."""

    depth: int = whole(27, MAX_LAYERS)
    hidden_size: int = whole(1152)
    intermediate_size: int = whole(4304)
    patch_size: int = whole(16, 256)
    patch_bias: bool = True
    mlp_names: tuple[str, str] = ("linear_fc1", "linear_fc2")
    hidden_act: str = field("gelu_pytorch_tanh", one_of("gelu_pytorch_tanh"))
    num_position_embeddings: int = whole(2304)
    deepstack_visual_indexes: tuple[int, ...] = field((8, 16, 24), check_wholes)

    pixel_mean: ClassVar[tuple[float, float, float]] = (0.5, 0.5, 0.5)
    pixel_std: ClassVar[tuple[float, float, float]] = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Qwen3VLConfig(QwenVLConfig):
    """Qwen3-VL, dense (arXiv:2511.21631): each temporal patch of a video is an item behind its time stamp in the text."""

    model_type: ClassVar[str] = "qwen3_vl"
    architecture: ClassVar[str] = "Qwen3VLForConditionalGeneration"
    names: ClassVar[WeightNames] = WeightNames((NESTED_NAMES,))
    text_class: ClassVar[type[TextConfig]] = Qwen3VLText
    vision_class: ClassVar[type[TowerConfig]] = Qwen3Tower
    nested: ClassVar[bool] = True
    splits_videos: ClassVar[bool] = True
    processor: ClassVar[str] = "Qwen3VLProcessor"
    image_processor: ClassVar[str] = "Qwen2VLImageProcessorFast"

    def __post_init__(self):
        super().__post_init__()
        side = math.isqrt(self.vision.num_position_embeddings or 0)
        if side**2 != self.vision.num_position_embeddings:
            raise ValueError(
                f"vision num_position_embeddings {self.vision.num_position_embeddings} is not the square of a whole number"
            )
        if len(self.vision.deepstack_visual_indexes) > self.text.num_hidden_layers:
            raise ValueError(
                f"vision deepstack_visual_indexes {self.vision.deepstack_visual_indexes} need as many decoder layers, "
                f"there are {self.text.num_hidden_layers}"
            )


class Merger(nnx.Module):
    """Merges neighbouring patches to one visual token in the decoder's width.

    The norm is over each patch, or, for outputs of inner blocks (`together`), over all patches of the token.
    """

    def __init__(self, key: jax.Array, config: TowerConfig, dtype, *, together: bool):
        keys = jax.random.split(key)
        wide = config.hidden_size * config.merge_unit
        self.norm = LayerNorm(wide if together else config.hidden_size, ("vision_embed",), eps=EPS, dtype=dtype)
        axes = ("vision_mlp", "vision_embed")
        self.linear_fc1 = Linear(keys[0], wide, wide, axes, bias=True, dtype=dtype)
        self.linear_fc2 = Linear(keys[1], wide, config.out_hidden_size, ("embed", "vision_mlp"), bias=True, dtype=dtype)
        self.together = together

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, P, hidden] -> [N, P / 4, out_hidden]."""
        wide = self.linear_fc1.weight.shape[-1]
        tokens = lambda x: x.reshape(x.shape[0], -1, wide)
        x = self.norm(tokens(x)) if self.together else tokens(self.norm(x))
        return self.linear_fc2(jax.nn.gelu(self.linear_fc1(x), approximate=False))


class DeepstackTower(VisionTower):
    """A vision tower with a learned table of positions, whose inner blocks have features for the decoder, too."""

    def __init__(self, config: TowerConfig, key: jax.Array, dtype):
        tower, table, merger, *rest = jax.random.split(key, 3 + len(config.deepstack_visual_indexes))
        super().__init__(config, tower, dtype)
        assert config.num_position_embeddings is not None
        shape = (config.num_position_embeddings, config.hidden_size)
        self.pos_embed = nnx.Dict(weight=normal(table, shape, (None, "vision_embed"), dtype))
        self.merger = Merger(merger, config, dtype, together=False)
        # The names are indices in the original's list.
        mergers = {str(i): Merger(k, config, dtype, together=True) for i, k in enumerate(rest)}
        self.deepstack_merger_list = nnx.Dict(mergers)

    def embed(self, pixels: jax.Array, hw: jax.Array, layout: PatchLayout) -> jax.Array:
        """See `VisionTower.embed`."""
        return super().embed(pixels, hw, layout) + self.table(hw, layout)

    def table(self, hw: jax.Array, layout: PatchLayout) -> jax.Array:
        """Interpolates the learned square table bilinearly over grids of `hw` int32 [N, 2] patches: [N, P, hidden]."""
        weight = self.pos_embed["weight"][...]
        side = math.isqrt(weight.shape[0])

        def taps(index: jax.Array, size: jax.Array):
            """Along an axis of `size` [N] patches: two indices into the table for each patch [N, P], and their weights."""
            at = index.astype(jnp.float32) * (side - 1) / jnp.maximum(size - 1, 1)[:, None].astype(jnp.float32)
            low = jnp.clip(jnp.floor(at), 0, side - 1)
            part = at - low
            low = low.astype(jnp.int32)
            return (low, 1 - part), (jnp.minimum(low + 1, side - 1), part)

        rows, columns = taps(layout.row, hw[:, 0]), taps(layout.column, hw[:, 1])
        weighed = [
            weight[row * side + column] * (of_row * of_column)[..., None]
            for row, of_row in rows
            for column, of_column in columns
        ]
        return sum(weighed[1:], start=weighed[0]).astype(weight.dtype)

    def merge(self, x: jax.Array, taps, layout: PatchLayout) -> jax.Array:
        """See `VisionTower.merge`."""
        features = [self.merger(x), *(self.deepstack_merger_list[str(i)](tap) for i, tap in enumerate(taps))]
        return jnp.concatenate(features, axis=-1)
