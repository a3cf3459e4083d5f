"""Frames: gathered, sampled and paired."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixel_jax.ops import gather_frames, sample_frames, temporal_slices

VIDEO = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)


def test_gather_frames():
    for indices in ([0], [6, 0, 3], [2, 2, 2], list(range(7))):
        for out in (gather_frames(VIDEO, indices), jax.jit(gather_frames)(VIDEO, jnp.array(indices))):
            assert out.dtype == jnp.uint8
            np.testing.assert_array_equal(out, VIDEO[indices])


def test_gather_frames_in_a_batch():
    videos = np.stack([VIDEO, VIDEO[::-1]])
    out = jax.jit(jax.vmap(gather_frames))(videos, jnp.array([[0, 1], [0, 5]]))
    np.testing.assert_array_equal(out, np.stack([VIDEO[[0, 1]], VIDEO[[6, 1]]]))


def test_frames_that_do_not_exist():
    with pytest.raises(ValueError, match=r"frame indices \[-1, 7\] are outside \[0, 7\)"):
        gather_frames(VIDEO, [0, -1, 7])
    out = jax.jit(gather_frames)(VIDEO, jnp.array([0, -1, 7]))
    np.testing.assert_array_equal(out, np.stack([VIDEO[0], 0 * VIDEO[0], 0 * VIDEO[0]]))


def test_bad_arguments():
    with pytest.raises(ValueError, match="empty list of frames"):
        gather_frames(VIDEO, [])
    with pytest.raises(ValueError, match="must be integers"):
        gather_frames(VIDEO, [0.5])
    with pytest.raises(ValueError, match=r"must be \[t, h, w, 3\], got \(4, 5, 3\)"):
        gather_frames(VIDEO[0], [0])


def test_sample_frames():
    assert sample_frames(16, 16).tolist() == list(range(16))
    assert sample_frames(5, 16).tolist() == [0, 1, 2, 3, 4]
    assert sample_frames(100, 1).tolist() == [0]
    assert sample_frames(31, 16).tolist() == list(range(0, 31, 2))
    assert sample_frames(11, 4).tolist() == [0, 3, 7, 10]
    for frames in (17, 1000, 12345):
        indices = sample_frames(frames, 16)
        assert indices.dtype == np.int32 and indices[0] == 0 and indices[-1] == frames - 1
        assert np.ptp(np.diff(indices)) <= 1
    for arguments in ((0, 16), (16, 0)):
        with pytest.raises(ValueError, match="at least one frame"):
            sample_frames(*arguments)


def test_temporal_slices():
    assert temporal_slices(1).tolist() == [[0, 0]]
    assert temporal_slices(4).tolist() == [[0, 1], [2, 3]]
    assert temporal_slices(5).tolist() == [[0, 1], [2, 3], [4, 4]]
    assert temporal_slices(5).dtype == np.int32
    with pytest.raises(ValueError, match="at least one frame, got 0"):
        temporal_slices(0)
