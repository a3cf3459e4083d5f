"""The vision tower of Qwen2.5-VL: patches of one temporal slice in, visual tokens out, for any grid in one compilation.

Most blocks attend within windows of `window_size` pixels, a few over the whole slice. The grid (height, width) is a traced
value: only the number of patches P is static. Patches stay in merge order (the four patches of a visual token contiguous, the
tokens in raster order) all the way, so the merger needs no reordering; for windowed attention alone, queries, keys and values
are gathered into [windows, patches of a window] and back.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from pixel_jax.models.attention import Mask, attention
from pixel_jax.models.config import VisionConfig
from pixel_jax.models.layers import GatedMLP, Linear, Remat, RMSNorm, normal, rematerialised, stack
from pixel_jax.models.rope import rotate, vision_angles
from pixel_jax.parallel.sharding import keep_rows

EPS = 1e-6  # fixed in the original, not a field of its configuration


class Layout:
    """Where the patches of a batch of slices lie. Arrays are [N, P] unless said otherwise.

    valid: bool; row, column: int32 patch coordinates
    to_slot: which slot of the windows [N, windows * slots] a patch occupies; out of range for padding
    from_slot: int32 [N, windows * slots], which patch occupies a slot; P = none
    """

    def __init__(self, hw: jax.Array, num_patches: int, config: VisionConfig):
        merge, unit, cells = config.spatial_merge_size, config.merge_unit, config.window_cells
        self.slots = cells * cells * unit
        self.windows = max_windows(num_patches // unit, cells)
        index = jnp.arange(num_patches)[None]
        height, width = hw[:, :1], hw[:, 1:]
        across = jnp.maximum(width // merge, 1)
        token, sub = index // unit, index % unit
        token_row, token_column = token // across, token % across
        self.valid = index < height * width
        self.row = token_row * merge + sub // merge
        self.column = token_column * merge + sub % merge
        window = token_row // cells * -(-across // cells) + token_column // cells
        slot = window * self.slots + (token_row % cells * cells + token_column % cells) * unit + sub
        self.to_slot = jnp.where(self.valid, slot, self.windows * self.slots)
        rows = jnp.arange(hw.shape[0])[:, None]
        empty = jnp.full((hw.shape[0], self.windows * self.slots), num_patches, jnp.int32)
        self.from_slot = empty.at[rows, self.to_slot].set(index.astype(jnp.int32), mode="drop")


@functools.cache
def max_windows(num_tokens: int, cells: int) -> int:
    """The most windows that any grid of up to `num_tokens` merged cells needs; windows are `cells` x `cells`.

    The worst grid is one cell high: num_tokens / cells windows, `cells` times as many as a square needs. Only windowed
    attention pays for the difference; projections and the MLP run on the P patches themselves.
    """
    return max(-(-high // cells) * -(-(num_tokens // high) // cells) for high in range(1, num_tokens + 1))


class PatchEmbed(nnx.Module):
    """A convolution whose kernel is its stride: one product with the patch's pixels (C, 2, 14, 14)."""

    def __init__(self, key: jax.Array, config: VisionConfig, dtype):
        side = config.patch_size
        shape = (config.hidden_size, config.in_channels, config.temporal_patch_size, side, side)
        self.proj = nnx.Dict(weight=normal(key, shape, ("vision_embed", "patch", None, None, None), dtype))

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """[..., 1176] -> [..., hidden]"""
        weight = self.proj["weight"][...]
        return jnp.einsum("...i,oi->...o", pixels.astype(weight.dtype), weight.reshape(weight.shape[0], -1))


class VisionAttention(nnx.Module):
    def __init__(self, key: jax.Array, config: VisionConfig, dtype):
        keys = jax.random.split(key)
        dim = config.hidden_size
        self.qkv = Linear(keys[0], dim, 3 * dim, ("vision_heads", "vision_embed"), bias=True, dtype=dtype)
        self.proj = Linear(keys[1], dim, dim, ("vision_embed", "vision_heads"), bias=True, dtype=dtype)
        self.heads = config.num_heads

    def __call__(self, x, cos, sin, layout: Layout, full: jax.Array, implementation: str) -> jax.Array:
        """x [N, P, D]; full: bool scalar, attend over the whole slice instead of the window"""
        n, p, dim = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(n, p, 3, self.heads, dim // self.heads), 2, 0)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)

        def whole(q, k, v):
            mask = Mask(jnp.zeros((n, p), jnp.int32), jnp.where(layout.valid, 0, -1))
            return attention(q, k, v, mask, causal=False, implementation=implementation)

        def windowed(q, k, v):
            packed = jnp.concatenate([q, k, v], axis=-1).reshape(n, p, -1)
            packed = jnp.take_along_axis(packed, layout.from_slot[..., None], axis=1, mode="fill", fill_value=0)
            packed = packed.reshape(n * layout.windows, layout.slots, self.heads, -1)
            keys = jnp.where(layout.from_slot < p, 0, -1).reshape(n * layout.windows, layout.slots)
            out = attention(*jnp.split(packed, 3, axis=-1), Mask(jnp.zeros_like(keys), keys), causal=False)
            out = out.reshape(n, layout.windows * layout.slots, -1)
            out = jnp.take_along_axis(out, layout.to_slot[..., None], axis=1, mode="fill", fill_value=0)
            return out.reshape(q.shape)

        with jax.named_scope("full_attention"):
            out = jax.lax.cond(full, whole, windowed, q, k, v)
        return self.proj(out.reshape(n, p, dim))


class VisionBlock(nnx.Module):
    def __init__(self, key: jax.Array, config: VisionConfig, dtype):
        keys = jax.random.split(key)
        dim = config.hidden_size
        self.norm1 = RMSNorm(dim, ("vision_embed",), eps=EPS, dtype=dtype)
        self.norm2 = RMSNorm(dim, ("vision_embed",), eps=EPS, dtype=dtype)
        self.attn = VisionAttention(keys[0], config, dtype)
        axes = ("vision_mlp", "vision_embed")
        self.mlp = GatedMLP(keys[1], dim, config.intermediate_size, axes, bias=True, dtype=dtype)

    def __call__(self, x, cos, sin, layout: Layout, full: jax.Array, implementation: str) -> jax.Array:
        x = x + self.attn(self.norm1(x), cos, sin, layout, full, implementation)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nnx.Module):
    """Four neighbouring patches -> one visual token in the decoder's width."""

    def __init__(self, key: jax.Array, config: VisionConfig, dtype):
        keys = jax.random.split(key)
        wide = config.hidden_size * config.merge_unit
        self.ln_q = RMSNorm(config.hidden_size, ("vision_embed",), eps=EPS, dtype=dtype)
        # The names are places in the original's Sequential(Linear, GELU, Linear).
        first = Linear(keys[0], wide, wide, ("vision_mlp", "vision_embed"), bias=True, dtype=dtype)
        last = Linear(keys[1], wide, config.out_hidden_size, ("embed", "vision_mlp"), bias=True, dtype=dtype)
        self.mlp = nnx.Dict({"0": first, "2": last})
        self.unit = config.merge_unit

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, P, hidden] -> [N, P / 4, out_hidden]"""
        x = self.ln_q(x)
        x = x.reshape(x.shape[0], x.shape[1] // self.unit, -1)
        return self.mlp["2"](jax.nn.gelu(self.mlp["0"](x), approximate=False))


class VisionTower(nnx.Module):
    def __init__(self, config: VisionConfig, key: jax.Array, dtype):
        keys = jax.random.split(key, 3)
        self.config = config
        self.patch_embed = PatchEmbed(keys[0], config, dtype)
        self.blocks = stack(lambda k: VisionBlock(k, config, dtype), keys[1], config.depth)
        self.merger = PatchMerger(keys[2], config, dtype)

    def __call__(
        self, pixel_values: jax.Array, hw: jax.Array, *, remat: Remat = False, implementation: str = "dense"
    ) -> jax.Array:
        """One temporal slice each: float [N, P, 1176] in merge order and int32 [N, 2] patches -> [N, P / 4, out_hidden].

        Beyond a slice's height * width patches the input may be anything finite; the output there means nothing (finite).
        """
        config = self.config
        num_patches = pixel_values.shape[1]
        if num_patches % config.merge_unit:
            raise ValueError(f"number of patches {num_patches} is no multiple of {config.merge_unit}")
        layout = Layout(hw, num_patches, config)
        cos, sin = vision_angles(layout.row, layout.column, config.head_dim)

        def block(x, scanned):
            layer, full = scanned
            return keep_rows(layer(x, cos, sin, layout, full, implementation)), None

        full = jnp.isin(jnp.arange(config.depth), jnp.array(config.fullatt_block_indexes, jnp.int32))
        x = keep_rows(self.patch_embed(pixel_values))
        x, _ = jax.lax.scan(rematerialised(block, remat), x, (self.blocks, full))
        return keep_rows(self.merger(x))
