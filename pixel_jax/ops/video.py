"""Frames of a video: which to sample, which to show, and how they pair into temporal patches."""

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.ops.arguments import check_pixels, integers


def gather_frames(video: jax.Array, indices: jax.Array) -> jax.Array:
    """Frames `indices` (0-based, any order, repeats allowed) of a video.

    Args:
      video: uint8 [t, h, w, 3].
      indices: int32 [k], traced or concrete. An index outside [0, t) gives a black frame when traced and raises
        ValueError when concrete.

    Returns:
      uint8 [k, h, w, 3].
    """
    check_pixels("video", video)
    if video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(f"video must be [t, h, w, 3], got {video.shape}")
    if np.size(indices) == 0:
        raise ValueError("indices is an empty list of frames")
    indices = integers("indices", indices)
    if not isinstance(indices, jax.core.Tracer):
        concrete = np.asarray(indices)
        outside = concrete[(concrete < 0) | (concrete >= video.shape[0])]
        if outside.size:
            raise ValueError(f"frame indices {outside.tolist()} are outside [0, {video.shape[0]})")
    indices = jnp.asarray(indices, jnp.int32)
    inside = (indices >= 0) & (indices < video.shape[0])
    frames = jnp.asarray(video)[jnp.where(inside, indices, 0)]
    return jnp.where(inside[:, None, None, None], frames, 0).astype(video.dtype)


def sample_frames(num_frames: int, count: int) -> np.ndarray:
    """Indices of `count` frames spread evenly over a video, first and last included (as qwen-vl-utils samples them).

    int32 [min(count, num_frames)]: a shorter video gives all its frames.
    """
    if num_frames < 1 or count < 1:
        raise ValueError(f"need at least one frame to sample from and to sample, got {num_frames} and {count}")
    return np.round(np.linspace(0, num_frames - 1, min(count, num_frames))).astype(np.int32)


def temporal_slices(num_frames: int) -> np.ndarray:
    """The two frames of every temporal patch, int32 [ceil(num_frames / 2), 2]; an odd last frame is repeated."""
    if num_frames < 1:
        raise ValueError(f"a video needs at least one frame, got {num_frames}")
    starts = np.arange(0, num_frames, 2)
    return np.stack([starts, np.minimum(starts + 1, num_frames - 1)], axis=1).astype(np.int32)
