"""LLaVA-1.5 (arXiv:2310.03744): CLIP's vision tower and a projector before a language model.

Images have one size; each patch but the class token becomes a visual token, which takes a position like a token of text.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from pixel_jax.models.attention import Mask, attention
from pixel_jax.models.config import (
    MAX_LAYERS,
    ModelConfig,
    TowerConfig,
    WeightNames,
    check_flag,
    check_positive,
    check_whole,
    field,
    one_of,
    read_text,
    section,
    shown,
    token,
    whole,
    write_text,
    written,
)
from pixel_jax.models.layers import MLP, LayerNorm, Linear, Remat, normal, rematerialised, stack
from pixel_jax.models.text_families import LlamaConfig, Qwen2Config, Qwen3Config
from pixel_jax.parallel.sharding import keep_rows

TEXT_FAMILIES = {family.model_type: family.text_class for family in (LlamaConfig, Qwen2Config, Qwen3Config)}


def _layers(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    if not values or any(type(x) is not int or abs(x) > MAX_LAYERS for x in values):
        raise ValueError(f"is {shown(value)}, not the number of a layer or a list of such")
    return tuple(values)


@dataclass(frozen=True)
class CLIPConfig(TowerConfig):
    """CLIP's vision tower, and the features of it that LLaVA uses."""

    depth: int = whole(24, MAX_LAYERS, key="num_hidden_layers")
    hidden_size: int = whole(1024)
    intermediate_size: int = whole(4096)
    num_heads: int = whole(16, key="num_attention_heads")
    out_hidden_size: int = 4096  # that of the decoder
    in_channels: int = whole(3, 64, key="num_channels")
    temporal_patch_size: int = 1
    spatial_merge_size: int = 1
    hidden_act: str = field("quick_gelu", one_of("quick_gelu", "gelu"))
    image_size: int = whole(336)
    layer_norm_eps: float = field(1e-5, check_positive)
    # From the fields of the whole model.
    feature_layers: tuple[int, ...] = (-2,)  # whose outputs are projected; layer 0 is the input of the first block
    with_class_token: bool = False
    projector_bias: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise ValueError(f"vision image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        if any(not -self.depth - 1 <= layer <= self.depth for layer in self.feature_layers):
            raise ValueError(f"vision_feature_layer {self.feature_layers}: there are {self.depth} layers")

    @property
    def merger_weights(self) -> int:
        """See `TowerConfig.merger_weights`: the projector's."""
        return (self.hidden_size * len(self.feature_layers) + self.out_hidden_size) * self.out_hidden_size

    @property
    def fixed_grid(self) -> tuple[int, int]:
        """Height and width of every image in patches."""
        side = self.image_size // self.patch_size
        return side, side

    def token_grid(self, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """See `TowerConfig.token_grid`: the class token is one more in a row of all patches."""
        slices, height, width = grid
        return (slices, 1, height * width + 1) if self.with_class_token else grid


@dataclass(frozen=True)
class LlavaConfig(ModelConfig):
    """LLaVA-1.5."""

    vision: CLIPConfig
    image_token_id: int = token(32000, key="image_token_index")

    model_type: ClassVar[str] = "llava"
    architecture: ClassVar[str] = "LlavaForConditionalGeneration"
    vision_class: ClassVar[type[TowerConfig]] = CLIPConfig
    placeholders: ClassVar[tuple[str, ...]] = ("<image>",)
    processor: ClassVar[str] = "LlavaProcessor"
    image_processor: ClassVar[str] = "CLIPImageProcessor"
    names: ClassVar[WeightNames] = WeightNames(
        (
            (
                ("visual.multi_modal_projector.", "multi_modal_projector."),
                ("visual.", "vision_tower.vision_model."),
                ("model.", "language_model.model."),
                ("lm_head.", "language_model.lm_head."),
            ),
            (
                ("visual.multi_modal_projector.", "model.multi_modal_projector."),
                ("visual.", "model.vision_tower.vision_model."),
                ("model.", "model.language_model."),
                ("lm_head.", "lm_head."),
            ),
            (("visual.", "vision_tower."),),
            (
                ("visual.multi_modal_projector.", "model.multi_modal_projector."),
                ("visual.", "model.vision_tower."),
                ("model.", "model.language_model."),
                ("lm_head.", "lm_head."),
            ),
        )
    )

    @property
    def visual_tokens(self) -> tuple[int, ...]:
        """See `ModelConfig.visual_tokens`."""
        return (self.image_token_id,)

    @classmethod
    def _from_hf(cls, config: dict[str, Any]) -> "LlavaConfig":
        inner, tower = section(config, "text_config") or {}, section(config, "vision_config") or {}
        for name, value, supported in (
            ("text_config.model_type", inner.get("model_type", "llama"), tuple(TEXT_FAMILIES)),
            ("vision_config.model_type", tower.get("model_type", "clip_vision_model"), ("clip_vision_model",)),
            ("projector_hidden_act", config.get("projector_hidden_act", "gelu"), ("gelu",)),
            (
                "vision_feature_select_strategy",
                config.get("vision_feature_select_strategy", "default"),
                ("default", "full"),
            ),
        ):
            if value not in supported:
                raise ValueError(f"{name} {shown(value)} is not supported, only {', '.join(map(repr, supported))}")
        text = read_text(TEXT_FAMILIES[inner.get("model_type", "llama")], inner, "text_config.")
        vision = cls.read_vision(tower)
        assert isinstance(vision, CLIPConfig)
        own = {name: value for name, value in (("vision_feature_layer", -2), ("multimodal_projector_bias", True))}
        own |= {name: config[name] for name in own if name in config}
        vision = dataclasses.replace(
            vision,
            out_hidden_size=text.hidden_size,
            feature_layers=_layers(own["vision_feature_layer"]),
            with_class_token=config.get("vision_feature_select_strategy", "default") == "full",
            projector_bias=check_flag(own["multimodal_projector_bias"]),
        )
        number = config.get("image_token_index", config.get("image_token_id", 32000))
        tied = any(check_flag(x.get("tie_word_embeddings", False)) for x in (config, inner))
        return cls(text, vision, check_whole(number, 2**31 - 1), tie_word_embeddings=tied)

    def to_hf(self) -> dict[str, Any]:
        """See `ModelConfig.to_hf`."""
        text, vision = write_text(self.text), self.vision
        family = next(name for name, cls in TEXT_FAMILIES.items() if type(self.text) is cls)
        layers = vision.feature_layers
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **written(self),
            "multimodal_projector_bias": vision.projector_bias,
            "projector_hidden_act": "gelu",
            "vision_feature_layer": layers[0] if len(layers) == 1 else list(layers),
            "vision_feature_select_strategy": "full" if vision.with_class_token else "default",
            "image_seq_length": math.prod(vision.fixed_grid) + vision.with_class_token,
            "text_config": {"model_type": family, **text},
            "vision_config": {"model_type": "clip_vision_model", "projection_dim": 768, **written(vision)},
        }


class CLIPAttention(nnx.Module):
    """Attention of every patch to every patch and the class token, without rotary positions."""

    def __init__(self, key: jax.Array, config: CLIPConfig, dtype):
        keys, dim = jax.random.split(key, 4), config.hidden_size
        inner = lambda key: Linear(key, dim, dim, ("vision_heads", "vision_embed"), bias=True, dtype=dtype)
        self.q_proj, self.k_proj, self.v_proj = inner(keys[0]), inner(keys[1]), inner(keys[2])
        self.out_proj = Linear(keys[3], dim, dim, ("vision_embed", "vision_heads"), bias=True, dtype=dtype)
        self.num_heads = config.num_heads

    def __call__(self, x: jax.Array, implementation: str | None) -> jax.Array:
        """[N, P, D] -> [N, P, D]."""
        split = lambda y: y.reshape(*y.shape[:-1], self.num_heads, -1)
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        everywhere = jnp.zeros(x.shape[:2], jnp.int32)
        out = attention(q, k, v, Mask(everywhere, everywhere), causal=False, implementation=implementation)
        return self.out_proj(out.reshape(x.shape))


class CLIPLayer(nnx.Module):
    """Attention and an MLP, each behind a layer norm."""

    def __init__(self, key: jax.Array, config: CLIPConfig, dtype):
        keys = jax.random.split(key)
        dim, axes = config.hidden_size, ("vision_mlp", "vision_embed")
        self.layer_norm1, self.layer_norm2 = clip_norm(config, dtype), clip_norm(config, dtype)
        self.self_attn = CLIPAttention(keys[0], config, dtype)
        options = {"activation": config.hidden_act, "names": config.mlp_names}
        self.mlp = MLP(keys[1], dim, config.intermediate_size, axes, **options, dtype=dtype)

    def __call__(self, x: jax.Array, implementation: str | None) -> jax.Array:
        """[N, P, D] -> [N, P, D]."""
        x = x + self.self_attn(self.layer_norm1(x), implementation)
        return x + self.mlp(self.layer_norm2(x))


def clip_norm(config: CLIPConfig, dtype) -> LayerNorm:
    """Returns a layer norm of CLIP's width."""
    return LayerNorm(config.hidden_size, ("vision_embed",), eps=config.layer_norm_eps, dtype=dtype)


class CLIPTower(nnx.Module):
    """CLIP's vision tower and the projector into the decoder's width."""

    def __init__(self, config: CLIPConfig, key: jax.Array, dtype):
        keys = jax.random.split(key, 6)
        dim, side = config.hidden_size, config.patch_size
        count = math.prod(config.fixed_grid)
        shape, axes = (dim, config.in_channels, side, side), ("vision_embed", "patch", None, None)
        self.config = config
        self.embeddings = nnx.Dict(
            class_embedding=normal(keys[0], (dim,), ("vision_embed",), dtype),
            patch_embedding=nnx.Dict(weight=normal(keys[1], shape, axes, dtype)),
            position_embedding=nnx.Dict(weight=normal(keys[2], (count + 1, dim), (None, "vision_embed"), dtype)),
        )
        self.pre_layrnorm = clip_norm(config, dtype)  # spelled as in files
        self.encoder = nnx.Dict(layers=stack(lambda k: CLIPLayer(k, config, dtype), keys[3], config.depth))
        self.post_layernorm = clip_norm(config, dtype)  # in the files, but not used by LLaVA
        wide, out, bias = dim * len(config.feature_layers), config.out_hidden_size, config.projector_bias
        self.multi_modal_projector = nnx.Dict(
            linear_1=Linear(keys[4], wide, out, ("vision_mlp", "vision_embed"), bias=bias, dtype=dtype),
            linear_2=Linear(keys[5], out, out, ("embed", "vision_mlp"), bias=bias, dtype=dtype),
        )

    def __call__(
        self, pixels: jax.Array, hw: jax.Array, *, remat: Remat = False, implementation: str | None = None
    ) -> jax.Array:
        """Computes features [N, T, out] of images float [N, P, patch_dim], with patches in raster order.

        All images have the same size, so that `hw` is ignored. P may be larger than the number of patches of an image; T is that
        number, and one more if the class token is projected, too.
        """
        config, count = self.config, math.prod(self.config.fixed_grid)
        if pixels.shape[1] < count:
            raise ValueError(f"an image of this model has {count} patches, there are {pixels.shape[1]}")
        weights = self.embeddings
        kernel = weights["patch_embedding"]["weight"][...]
        patches = jnp.einsum("npi,oi->npo", pixels[:, :count].astype(kernel.dtype), kernel.reshape(kernel.shape[0], -1))
        first = jnp.broadcast_to(jnp.asarray(weights["class_embedding"][...]), (len(pixels), 1, config.hidden_size))
        x = jnp.concatenate([first, patches], axis=1) + weights["position_embedding"]["weight"][...]
        x = self.pre_layrnorm(keep_rows(x))
        layers = [layer % (config.depth + 1) for layer in config.feature_layers]
        numbers = jnp.arange(1, config.depth + 1)

        def block(carry, scanned):
            x, features = carry
            layer, number = scanned
            x = keep_rows(layer(x, implementation))
            return (x, tuple(jnp.where(number == n, x, kept) for n, kept in zip(layers, features, strict=True))), None

        start = (x, tuple(x for _ in layers))
        (_, features), _ = jax.lax.scan(rematerialised(block, remat), start, (self.encoder["layers"], numbers))
        chosen = jnp.concatenate(features, axis=-1)
        chosen = chosen if config.with_class_token else chosen[:, 1:]
        projector = self.multi_modal_projector
        return projector["linear_2"](jax.nn.gelu(projector["linear_1"](chosen), approximate=False))
