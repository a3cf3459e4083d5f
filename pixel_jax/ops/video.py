"""Frames of a video: which to sample, which to show, and how they pair into temporal patches."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.arrays import AnyArray
from pixel_jax.ops.arguments import check_pixels, integers, is_concrete


def gather_frames(video: AnyArray, indices: AnyArray | Sequence[int]) -> jax.Array:
    """Takes frames of a video, in any order, repeats allowed.

    Args:
      video: uint8 [t, h, w, 3].
      indices: int32 [k], 0-based; traced or concrete.

    Returns:
      uint8 [k, h, w, 3]. A traced index outside [0, t) gives a black frame.

    Raises:
      ValueError: there are no indices, a concrete one is outside [0, t), or the video has another shape.
    """
    check_pixels("video", video)
    if video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(f"video must be [t, h, w, 3], got {video.shape}")
    if np.size(indices) == 0:
        raise ValueError("indices is an empty list of frames")
    indices = integers("indices", indices)
    if is_concrete(indices):
        concrete = np.asarray(indices)
        outside = concrete[(concrete < 0) | (concrete >= video.shape[0])]
        if outside.size:
            raise ValueError(f"frame indices {outside.tolist()} are outside [0, {video.shape[0]})")
    indices = jnp.asarray(indices, jnp.int32)
    inside = (indices >= 0) & (indices < video.shape[0])
    frames = jnp.asarray(video)[jnp.where(inside, indices, 0)]
    return jnp.where(inside[:, None, None, None], frames, 0).astype(video.dtype)


def sample_frames(num_frames: int, count: int) -> np.ndarray:
    """Samples frames evenly over a video, first and last included, as qwen-vl-utils does.

    Returns:
      int32 [min(count, num_frames)], 0-based indices: of a shorter video, all frames.
    """
    if num_frames < 1 or count < 1:
        raise ValueError(f"need at least one frame to sample from and to sample, got {num_frames} and {count}")
    return np.round(np.linspace(0, num_frames - 1, min(count, num_frames))).astype(np.int32)


def temporal_slices(num_frames: int) -> np.ndarray:
    """Returns the two frames of every temporal patch: int32 [ceil(num_frames / 2), 2]. An odd last frame is repeated."""
    if num_frames < 1:
        raise ValueError(f"a video needs at least one frame, got {num_frames}")
    starts = np.arange(0, num_frames, 2)
    return np.stack([starts, np.minimum(starts + 1, num_frames - 1)], axis=1).astype(np.int32)


def timestamps(num_frames: int, fps: float) -> list[str]:
    """Returns what stands before every temporal patch of a video where a family writes its time: `<0.3 seconds>`.

    The time is the middle of those of its two frames, in the arithmetic of `Qwen3VLProcessor` in transformers: another order of
    the operations rounds some times to another tenth.

    Args:
      num_frames: of the video.
      fps: its frames in a second.
    """
    return [f"<{(first / fps + last / fps) / 2:.1f} seconds>" for first, last in temporal_slices(num_frames).tolist()]
