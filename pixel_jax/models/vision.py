"""The vision tower of the Qwen-VL families: from the patches of a temporal slice to visual tokens.

The grid (height, width) is a traced value and only the number of patches P is static, so one compilation serves all grids. In
Qwen2.5-VL most blocks attend within windows of `window_size` pixels, a few over the whole slice; in the other families all
attend over the whole slice. Patches come in merge order: the four patches of a visual token are contiguous, the tokens in raster
order. With windows, patches are put into the order of their windows once, at the start, as the original does, and the visual
tokens are put back at the end. A window then spans at most two neighbouring blocks, if a block has as many patches as a full
window.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pixel_jax.models.attention import Mask, attention
from pixel_jax.models.config import TowerConfig
from pixel_jax.models.layers import (
    MLP,
    GatedMLP,
    LayerNorm,
    Linear,
    Remat,
    RMSNorm,
    Weight,
    normal,
    rematerialised,
    stack,
)
from pixel_jax.models.rope import rotate, vision_angles
from pixel_jax.parallel.sharding import keep_rows

EPS = 1e-6  # fixed in the original, not a field of its configuration


class PatchLayout:
    """The order of the patches of a batch of slices: merge order, or window by window in a tower with windows.

    valid: bool [N, P]; row, column: int32 [N, P], patch coordinates
    With windows also `window`, int32 [N, P], the number of the patch's window, and `order`, int32 [N, P / 4], the number in
    raster order of the visual token at each index.
    """

    def __init__(self, hw: jax.Array, num_patches: int, config: TowerConfig):
        merge, unit = config.spatial_merge_size, config.merge_unit
        index = jnp.arange(num_patches // unit)[None]
        down, across = hw[:, :1] // merge, jnp.maximum(hw[:, 1:] // merge, 1)
        patches = lambda x: jnp.repeat(x, unit, axis=1, total_repeat_length=num_patches)
        valid = index < down * across
        if config.window_size is None:
            row, column = jnp.divmod(index, across)
        else:
            cells = config.window_cells
            left = lambda size, windows: jnp.clip(size - windows * cells, 1, cells)  # the last of a line may be cut
            band, rest = jnp.divmod(index, across * cells)
            beside, rest = jnp.divmod(rest, left(down, band) * cells)
            row, column = jnp.divmod(rest, left(across, beside))
            row, column = row + band * cells, column + beside * cells
            self.order = jnp.where(valid, row * across + column, index)
            self.window = patches(band * across + beside)
        sub = jnp.arange(num_patches)[None] % unit
        self.valid = patches(valid)
        self.row = patches(row) * merge + sub // merge
        self.column = patches(column) * merge + sub % merge


class Blocks(NamedTuple):
    """The blocks of windowed attention over P patches: `number` blocks of `size`, which see `reach` blocks on either side."""

    number: int
    size: int
    reach: int

    @classmethod
    def of(cls, num_patches: int, config: TowerConfig) -> "Blocks":
        """Returns the blocks of `num_patches` patches."""
        size = config.window_cells**2 * config.merge_unit
        # A block and its two neighbours would be all patches, and one block is faster (docs/performance.md).
        if num_patches <= 3 * size:
            return cls(1, num_patches, 0)
        return cls(-(-num_patches // size), size, 1)

    def around(self, x: jax.Array, padding: int = 0) -> jax.Array:
        """[N, P, ...] -> [N * number, (2 * reach + 1) * size, ...]: each block between its neighbours."""
        outside = self.reach * self.size
        widths = [(0, 0), (outside, outside + self.number * self.size - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]
        blocks = jnp.pad(x, widths, constant_values=padding).reshape(x.shape[0], -1, self.size, *x.shape[2:])
        beside = [blocks[:, i : i + self.number] for i in range(2 * self.reach + 1)]
        return jnp.concatenate(beside, axis=2).reshape(x.shape[0] * self.number, -1, *x.shape[2:])


class PatchEmbed(nnx.Module):
    """A convolution whose kernel is its stride: one product with the patch's pixels (C, 2, 14, 14)."""

    def __init__(self, key: jax.Array, config: TowerConfig, dtype):
        side = config.patch_size
        shape = (config.hidden_size, config.in_channels, config.temporal_patch_size, side, side)
        weights = {"weight": normal(key, shape, ("vision_embed", "patch", None, None, None), dtype)}
        if config.patch_bias:
            weights["bias"] = Weight(jnp.zeros(shape[:1], dtype), axes=("vision_embed",))
        self.proj = nnx.Dict(weights)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """[..., patch_dim] -> [..., hidden]."""
        weight = self.proj["weight"][...]
        embedded = jnp.einsum("...i,oi->...o", pixels.astype(weight.dtype), weight.reshape(weight.shape[0], -1))
        return embedded + self.proj["bias"][...] if "bias" in self.proj else embedded


class VisionAttention(nnx.Module):
    """Attention over a slice; in most blocks of a tower with windows only within the window."""

    def __init__(self, key: jax.Array, config: TowerConfig, dtype):
        keys = jax.random.split(key)
        dim = config.hidden_size
        self.qkv = Linear(keys[0], dim, 3 * dim, ("vision_heads", "vision_embed"), bias=True, dtype=dtype)
        self.proj = Linear(keys[1], dim, dim, ("vision_embed", "vision_heads"), bias=True, dtype=dtype)
        self.config = config

    def __call__(self, x, cos, sin, layout: PatchLayout, full: jax.Array, implementation: str | None) -> jax.Array:
        """x [N, P, D]; full: bool scalar, in a tower with windows: attend over the whole slice instead of the window."""
        n, p, dim = x.shape
        config = self.config
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(n, p, 3, config.num_heads, config.head_dim), 2, 0)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)

        def whole(q, k, v, window=None):
            mask = Mask(jnp.zeros((n, p), jnp.int32), jnp.where(layout.valid, 0, -1), window, window)
            return attention(q, k, v, mask, causal=False, implementation=implementation)

        def windowed(q, k, v):
            blocks = Blocks.of(p, config)
            own = blocks._replace(reach=0)
            keys = blocks.around(jnp.where(layout.valid, 0, -1), -1)
            queries = own.around(jnp.zeros((n, p), jnp.int32))
            mask = Mask(queries, keys, own.around(layout.window), blocks.around(layout.window))
            near = blocks.around(k), blocks.around(v)
            out = attention(own.around(q), *near, mask, causal=False, implementation="dense")
            return out.reshape(n, -1, *q.shape[2:])[:, :p]

        if config.window_size is None:
            out = whole(q, k, v)
        elif Blocks.of(p, config).number == 1:
            out = whole(q, k, v, jnp.where(full, 0, layout.window))
        else:
            with jax.named_scope("full_attention"):
                out = jax.lax.cond(full, whole, windowed, q, k, v)
        return self.proj(out.reshape(n, p, dim))


def norm(config: TowerConfig, dtype) -> RMSNorm | LayerNorm:
    """Returns the family's norm of patches."""
    return (RMSNorm if config.gated else LayerNorm)(config.hidden_size, ("vision_embed",), eps=EPS, dtype=dtype)


class VisionBlock(nnx.Module):
    """Attention and an MLP, each behind a norm."""

    def __init__(self, key: jax.Array, config: TowerConfig, dtype):
        keys = jax.random.split(key)
        dim, hidden, axes = config.hidden_size, config.intermediate_size, ("vision_mlp", "vision_embed")
        self.norm1, self.norm2 = norm(config, dtype), norm(config, dtype)
        self.attn = VisionAttention(keys[0], config, dtype)
        if config.gated:
            self.mlp = GatedMLP(keys[1], dim, hidden, axes, bias=True, dtype=dtype)
        else:
            options = {"activation": config.hidden_act, "names": config.mlp_names}
            self.mlp = MLP(keys[1], dim, hidden, axes, **options, dtype=dtype)

    def __call__(self, x, cos, sin, layout: PatchLayout, full: jax.Array, implementation: str | None) -> jax.Array:
        """x [N, P, D] -> [N, P, D]; the arguments are those of `VisionAttention`."""
        x = x + self.attn(self.norm1(x), cos, sin, layout, full, implementation)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nnx.Module):
    """Merges four neighbouring patches to one visual token in the decoder's width."""

    def __init__(self, key: jax.Array, config: TowerConfig, dtype):
        keys = jax.random.split(key)
        wide = config.hidden_size * config.merge_unit
        self.ln_q = norm(config, dtype)
        # The names are indices in the original's Sequential(Linear, GELU, Linear).
        first = Linear(keys[0], wide, wide, ("vision_mlp", "vision_embed"), bias=True, dtype=dtype)
        last = Linear(keys[1], wide, config.out_hidden_size, ("embed", "vision_mlp"), bias=True, dtype=dtype)
        self.mlp = nnx.Dict({"0": first, "2": last})
        self.unit = config.merge_unit

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, P, hidden] -> [N, P / 4, out_hidden]."""
        x = self.ln_q(x)
        x = x.reshape(x.shape[0], x.shape[1] // self.unit, -1)
        return self.mlp["2"](jax.nn.gelu(self.mlp["0"](x), approximate=False))


class VisionTower(nnx.Module):
    """Blocks of attention between the embedding of patches and their merger."""

    def __init__(self, config: TowerConfig, key: jax.Array, dtype):
        keys = jax.random.split(key, 3)
        self.config = config
        self.patch_embed = PatchEmbed(keys[0], config, dtype)
        self.blocks = stack(lambda k: VisionBlock(k, config, dtype), keys[1], config.depth)
        self.merger = PatchMerger(keys[2], config, dtype)

    def __call__(
        self, pixel_values: jax.Array, hw: jax.Array, *, remat: Remat = False, implementation: str | None = None
    ) -> jax.Array:
        """Computes features [N, P / 4, F] of temporal slices float [N, P, patch_dim] in merge order; hw: int32 [N, 2] in patches.

        Beyond a slice's height * width patches the input may be any finite numbers; the output there is finite and meaningless.
        """
        config = self.config
        num_patches = pixel_values.shape[1]
        if num_patches % config.merge_unit:
            raise ValueError(f"number of patches {num_patches} is no multiple of {config.merge_unit}")
        layout = PatchLayout(hw, num_patches, config)
        cos, sin = vision_angles(layout.row, layout.column, config.head_dim)
        inner = config.deepstack_visual_indexes

        def block(carry, scanned):
            x, taps = carry
            layer, full, slot = scanned
            x = keep_rows(layer(x, cos, sin, layout, full, implementation))
            return (x, taps if taps is None else taps.at[slot].set(x, mode="drop")), None

        number = np.arange(config.depth)
        full = jnp.asarray(np.isin(number, config.fullatt_block_indexes))
        slots = jnp.asarray([inner.index(i) if i in inner else len(inner) for i in number], jnp.int32)
        x = self.embed(pixel_values, hw, layout)
        taps = jnp.zeros((len(inner), *x.shape), x.dtype) if inner else None
        (x, taps), _ = jax.lax.scan(rematerialised(block, remat), (x, taps), (self.blocks, full, slots))
        return keep_rows(self.merge(x, () if taps is None else taps, layout))

    def embed(self, pixels: jax.Array, hw: jax.Array, layout: PatchLayout) -> jax.Array:
        """Embeds pixels [N, P, patch_dim] in merge order: the input of the first block, [N, P, hidden], in `layout`'s order."""
        x = keep_rows(self.patch_embed(keep_rows(pixels)))
        if self.config.window_size is None:
            return x
        tokens = x.reshape(x.shape[0], x.shape[1] // self.config.merge_unit, -1)
        return keep_rows(jnp.take_along_axis(tokens, layout.order[..., None], axis=1).reshape(x.shape))

    def merge(self, x: jax.Array, taps, layout: PatchLayout) -> jax.Array:
        """Merges outputs of the last block [N, P, hidden], and of inner blocks, to visual tokens [N, P / 4, features]."""
        merged = self.merger(x)
        if self.config.window_size is None:
            return merged
        return jnp.take_along_axis(merged, jnp.argsort(layout.order)[..., None], axis=1)
