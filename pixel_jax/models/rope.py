"""Rotary positions: two-dimensional ones for the vision tower, M-RoPE (time, height, width) for the decoder.

Positions, angles and the rotation are float32 whatever the weights are: bfloat16 rounds 257 to 256, and sin(257) is far from
sin(256).
"""

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.models.config import Qwen2_5_VLConfig
from pixel_jax.models.inputs import locate, merged_grids


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the two halves of the last dimension against each other.

    x: [..., T, heads, head_dim]; cos, sin: float32 [..., T, head_dim / 2]
    """
    cos, sin = cos[..., None, :], sin[..., None, :]
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, cos.dtype)), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _frequencies(dim: int, theta: float) -> np.ndarray:
    """theta^(-2i / dim), float32 [dim / 2]. On the host: at position 30000 an error in the last bit turns the angle by .002."""
    return (1 / np.float32(theta) ** (np.arange(0, dim, 2, dtype=np.float32) / dim)).astype(np.float32)


def vision_angles(rows: jax.Array, columns: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Patch coordinates int32 [..., T] -> cos, sin float32 [..., T, head_dim / 2]: first half rows, second half columns."""
    spatial = head_dim // 2
    frequencies = _frequencies(spatial, 10000.0)
    angles = jnp.stack([rows, columns], axis=-1)[..., None].astype(jnp.float32) * frequencies
    angles = angles.reshape(*rows.shape, -1)
    return jnp.cos(angles), jnp.sin(angles)


def mrope_angles(
    positions: jax.Array, head_dim: int, theta: float, section: tuple[int, int, int]
) -> tuple[jax.Array, jax.Array]:
    """Positions int32 [3, B, T] -> cos, sin float32 [B, T, head_dim / 2].

    The frequencies are dealt out in blocks: `section` says how many belong to time, height and width.
    """
    frequencies = _frequencies(head_dim, theta)
    angles = jnp.moveaxis(positions, 0, -1).astype(jnp.float32)  # [B, T, 3]
    axis = jnp.repeat(jnp.arange(3), jnp.array(section), total_repeat_length=head_dim // 2)
    angles = angles[..., axis] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def mrope_positions(
    is_visual: jax.Array,
    valid: jax.Array,
    grids: jax.Array,
    seconds: jax.Array,
    start: jax.Array,
    config: Qwen2_5_VLConfig,
) -> tuple[jax.Array, jax.Array]:
    """Position ids of a stretch of tokens, in the original semantics of Qwen2.5-VL.

    Text advances all three axes by one. The tokens of an item share a base; time, height and width count within its grid, time
    in steps of `seconds * tokens_per_second`, cut to whole numbers. What follows an item starts one past its largest position.
    (transformers 5.3 and later start the text after a video elsewhere.)

    is_visual: bool [B, T]      the tokens that stand for pixels, in order of the row's items
    valid:     bool [B, T]      False: no token, takes no position
    grids:     int32 [B, K, 3]  items: slices, height, width in patches; zeros = absent
    seconds:   float32 [B, K]   seconds between slices; 0 for images
    start:     int32 [B]        position of the first token
    -> int32 [3, B, T], and int32 [B]: the position after the last token, `start` of the row's next stretch
    """
    is_visual = is_visual & valid
    if grids.shape[1] == 0:
        is_visual = jnp.zeros_like(is_visual)
        grids, seconds = jnp.zeros((*grids.shape[:1], 1, 3), jnp.int32), jnp.zeros((*grids.shape[:1], 1), jnp.float32)
    rank = jnp.cumsum(is_visual, axis=1) - 1
    place = locate(rank, grids, config.vision.spatial_merge_size)
    is_visual = is_visual & place.known  # a visual token that belongs to no item is text
    t, h, w = jnp.moveaxis(merged_grids(grids, config.vision.spatial_merge_size), -1, 0)
    take = lambda x: jnp.take_along_axis(x, place.item, axis=1)

    def seconds_to_ids(index):  # [B, T] slices since the item's first -> positions
        return (index.astype(jnp.float32) * take(seconds) * config.vision.tokens_per_second).astype(jnp.int32)

    t, h, w = take(t), jnp.maximum(take(h), 1), jnp.maximum(take(w), 1)
    span = jnp.maximum(jnp.maximum(h, w), seconds_to_ids(t - 1) + 1)
    last = place.within == t * h * w - 1
    increment = jnp.where(is_visual, jnp.where(last, span, 0), 1) * valid
    base = start[:, None] + jnp.cumsum(increment, axis=1) - increment
    inside = jnp.stack([seconds_to_ids(place.within // (h * w)), place.within // w % h, place.within % w])
    return (base + inside * is_visual).astype(jnp.int32), (start + increment.sum(axis=1)).astype(jnp.int32)
