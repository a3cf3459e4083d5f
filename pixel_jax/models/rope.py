"""Rotary positions: two-dimensional ones for vision towers; for decoders one number for each token, or M-RoPE.

M-RoPE has three numbers for each token: time, height and width.

Positions, angles and the rotation are float32 whatever the weights are: bfloat16 rounds 257 to 256, and sin(257) is far from
sin(256).
"""

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.arrays import AnyArray
from pixel_jax.models.config import ModelConfig, RopeScaling, TextConfig
from pixel_jax.models.inputs import locate, merged_grids


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the two halves of the first R numbers of the last dimension against each other; the others are not changed.

    x: [..., T, heads, head_dim]; cos, sin: float32 [..., T, R / 2]
    """
    if 2 * cos.shape[-1] < x.shape[-1]:
        turned, rest = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
        return jnp.concatenate([rotate(turned, cos, sin), rest], axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, cos.dtype)), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _frequencies(dim: int, theta: float) -> np.ndarray:
    """Computes theta^(-2i / dim), float32 [dim / 2], on the host: an error in the last bit changes an angle by .002 at 30,000."""
    return (1 / np.float32(theta) ** (np.arange(0, dim, 2, dtype=np.float32) / dim)).astype(np.float32)


def vision_angles(rows: jax.Array, columns: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Computes cos, sin float32 [..., T, head_dim / 2] of patch coordinates int32 [..., T]: first rows, then columns."""
    spatial = head_dim // 2
    frequencies = _frequencies(spatial, 10000.0)
    angles = jnp.stack([rows, columns], axis=-1)[..., None].astype(jnp.float32) * frequencies
    angles = angles.reshape(*rows.shape, -1)
    return jnp.cos(angles), jnp.sin(angles)


def scaled(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Scales frequencies for a context longer than that of training, float32 [dim / 2].

    'llama3' keeps frequencies whose wavelength is short compared with the context of training, divides those of long wavelengths
    by `factor`, and interpolates in between.
    """
    low = (frequencies / np.float32(scaling.factor)).astype(np.float32)
    if scaling.kind == "linear":
        return low
    waves = scaling.original_max_position_embeddings * frequencies / np.float32(2 * np.pi)  # in the context of training
    smooth = (waves - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0, 1).astype(np.float32)
    return ((1 - smooth) * low + smooth * frequencies).astype(np.float32)


def rotary_frequencies(config: TextConfig) -> np.ndarray:
    """Returns the angles by which one position turns the pairs of a head, float32 [rotary_dim / 2]."""
    frequencies = _frequencies(config.rotary_dim, config.rope_theta)
    return frequencies if config.rope_scaling is None else scaled(frequencies, config.rope_scaling)


def rotary_angles(positions: jax.Array, config: TextConfig) -> tuple[jax.Array, jax.Array]:
    """Computes cos, sin float32 [B, T, rotary_dim / 2] of positions int32 [3, B, T].

    With an `mrope_section` the frequencies are divided among time, height and width, in blocks or alternating. Without one the
    three positions of a token are equal.
    """
    half, section, frequencies = config.rotary_dim // 2, config.mrope_section, rotary_frequencies(config)
    if section is None:
        angles = positions[0].astype(jnp.float32)[..., None] * frequencies
        return jnp.cos(angles), jnp.sin(angles)
    axis = np.repeat(np.arange(3), section)
    if config.mrope_interleaved:
        axis = np.zeros(half, int)
        for number in (1, 2):
            axis[number : 3 * section[number] : 3] = number
    angles = jnp.moveaxis(positions, 0, -1).astype(jnp.float32)[..., axis] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def text_positions(valid: AnyArray, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes positions of text tokens, each one more than that before it, as `mrope_positions` returns them."""
    counted = start[:, None] + jnp.cumsum(valid, axis=1) - valid
    positions = jnp.broadcast_to(counted, (3, *counted.shape)).astype(jnp.int32)
    return positions, (start + valid.sum(axis=1)).astype(jnp.int32)


def mrope_positions(
    is_visual: AnyArray,
    valid: AnyArray,
    grids: AnyArray,
    seconds: AnyArray,
    start: jax.Array,
    config: ModelConfig,
) -> tuple[jax.Array, jax.Array]:
    """Computes position ids of tokens with the original semantics of the Qwen-VL families.

    Text advances all three axes by one. The tokens of an item share a base; time, height and width count within its grid, time
    in steps of one, or of `seconds * tokens_per_second` cut to whole numbers where the family has that rate. What follows an
    item starts one past its largest position.
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
    assert config.vision is not None
    merge, rate = config.vision.spatial_merge_size, config.vision.tokens_per_second
    rank = jnp.cumsum(is_visual, axis=1) - 1
    located = locate(rank, grids, merge)
    is_visual = is_visual & located.known  # a visual token that belongs to no item is text
    t, h, w = jnp.moveaxis(merged_grids(grids, merge), -1, 0)
    take = lambda x: jnp.take_along_axis(x, located.item, axis=1)

    def time_to_ids(index):  # [B, T] slices since the item's first -> positions
        return index if rate is None else (index.astype(jnp.float32) * take(seconds) * rate).astype(jnp.int32)

    t, h, w = take(t), jnp.maximum(take(h), 1), jnp.maximum(take(w), 1)
    span = jnp.maximum(jnp.maximum(h, w), time_to_ids(t - 1) + 1)
    last = located.within == t * h * w - 1
    increment = jnp.where(is_visual, jnp.where(last, span, 0), 1) * valid
    base = start[:, None] + jnp.cumsum(increment, axis=1) - increment
    inside = jnp.stack([time_to_ids(located.within // (h * w)), located.within // w % h, located.within % w])
    return (base + inside * is_visual).astype(jnp.int32), (start + increment.sum(axis=1)).astype(jnp.int32)
