"""The images and videos of a batch as a model reads them, and the items to which visual tokens belong."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pixel_jax.arrays import AnyArray
from pixel_jax.models.config import TowerConfig
from pixel_jax.ops import pixel_values


class Visual(NamedTuple):
    """Images and videos of a batch of rows, padded to static shapes.

    An item is an image (one temporal slice) or a video (several); a temporal slice is two frames, for a still image the same
    one twice. Every slice goes through the vision tower on its own: attention never crosses slices.

    patches:  uint8 [B, F, P, 3 p p]  frame patches of p x p pixels in merge order (`pixel_jax.ops.patchify`), at most F
    slices:   int32 [B, S, 2]       the two frames of each slice, in order of appearance; -1 = absent, at the end
    grids:    int32 [B, K, 3]       items in order of appearance: slices, height and width in patches; zeros = absent
    seconds:  float32 [B, K]        seconds between the slices of a video item; 0 for images
    """

    patches: AnyArray
    slices: AnyArray
    grids: AnyArray
    seconds: AnyArray


class Located(NamedTuple):
    """The location of each visual token among its row's items. Arrays [B, T], int32 except `known`.

    item:   index among the row's items
    within: index within the item (raster order, slice by slice)
    slice:  index among the row's temporal slices
    offset: index within the slice
    known:  bool, False beyond the last token of the row's items
    """

    item: jax.Array
    within: jax.Array
    slice: jax.Array
    offset: jax.Array
    known: jax.Array


def merged_grids(grids: AnyArray, merge: int) -> jax.Array:
    """Converts grids [..., 3] in patches to visual tokens."""
    return jnp.asarray(grids) // jnp.array([1, merge, merge], jnp.int32)


def locate(rank: jax.Array, grids: AnyArray, merge: int) -> Located:
    """Finds the item, slice and offset of visual tokens, from their `rank` [B, T] in the row and its `grids` [B, K, 3]."""
    t, h, w = jnp.moveaxis(merged_grids(grids, merge), -1, 0)
    count = t * h * w
    ends = jnp.cumsum(count, axis=1)
    item = jnp.sum(rank[:, :, None] >= ends[:, None, :], axis=-1, dtype=jnp.int32)
    known = (rank >= 0) & (item < grids.shape[1])
    item = jnp.minimum(item, grids.shape[1] - 1)
    take = lambda x: jnp.take_along_axis(x, item, axis=1)
    within = rank - take(ends - count)
    area = jnp.maximum(take(h * w), 1)
    return Located(item, within, take(jnp.cumsum(t, axis=1) - t) + within // area, within % area, known)


def slice_grids(grids: AnyArray, num_slices: int) -> jax.Array:
    """Computes (height, width) in patches of each temporal slice of items [B, K, 3], int32 [B, num_slices, 2]; 0: absent."""
    ends = jnp.cumsum(grids[..., 0], axis=1)
    item = jnp.sum(jnp.arange(num_slices)[None, :, None] >= ends[:, None, :], axis=-1)
    # One item more, of size zero, stands for "absent".
    padded = jnp.pad(grids[..., 1:], ((0, 0), (0, 1), (0, 0)))
    return jnp.take_along_axis(padded, item[..., None], axis=1)


def slice_pixels(first: jax.Array, second: jax.Array, vision: TowerConfig) -> jax.Array:
    """Computes the vision tower's input for temporal slices.

    Args:
        first: uint8 [..., P, 3 p p], the patches of each slice's first frame.
        second: those of its second frame; for a still image the same.
        vision: sizes and normalisation of the family.

    Returns:
        float32 [..., P, patch_dim], normalised; the second frame is left out if a temporal slice of the family is one frame.
    """
    frames = (first, second)[: vision.temporal_patch_size]
    return pixel_values(*frames, patch=vision.patch_size, mean=vision.pixel_mean, std=vision.pixel_std)
