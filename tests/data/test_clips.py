"""Video files: the frames that were written come back, evenly chosen; everything else is refused by name."""

import io
import sys

import av
import numpy as np
import pytest
from PIL import Image

from pixel_jax.data import clips
from pixel_jax.data.clips import clip_size, is_clip, read_frames
from pixel_jax.data.images import ImageError
from pixel_jax.data.jsonl import read_jsonl
from pixel_jax.data.read import read_examples


def clip(count, rate=4, container="mp4", codec="mpeg4", size=(64, 96)) -> bytes:
    """`count` frames, the i-th of grey level 4 i."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.bit_rate, stream.gop_size = 20_000_000, 4
        for i in range(count):
            pixels = np.full((*size, 3), 4 * i, np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
@pytest.mark.parametrize("count", [1, 5, 16, 61])
def test_frames_are_spread_evenly(container, count):
    data = clip(count, container=container)
    assert is_clip(data[:16])
    frames, seconds = read_frames(io.BytesIO(data), "here")
    expected = np.linspace(0, count - 1, min(count, 16)).round()
    assert all(frame.shape == (64, 96, 3) and frame.dtype == np.uint8 for frame in frames)
    np.testing.assert_allclose([frame.mean() for frame in frames], 4 * expected, atol=3)
    assert seconds == pytest.approx(2 * (count / 4) / len(frames))
    assert clip_size(io.BytesIO(data), "here") == [(64, 96)] * len(frames)


def test_a_video_file_is_an_example_s_video(tmp_path):
    (tmp_path / "a.mp4").write_bytes(clip(20))
    Image.new("RGB", (9, 6)).save(tmp_path / "a.png")
    line = '{"question": "?", "images": ["%s"], "answer": "7", "video": true%s}\n'
    path = tmp_path / "data.jsonl"
    path.write_text(line % ("a.mp4", "") + line % ("a.mp4", ', "seconds": 3') + line % ("a.png", ""))
    own, given, still = read_jsonl(path)
    assert (own.query().seconds, given.query().seconds, still.query().seconds) == (0.625, 3.0, 1.0)
    for example in (own, given, still):
        assert [x.shape for x in example.outline().images] == [x.shape for x in example.query().images]
    assert len(own.query().images) == 16


def test_without_av_the_extra_is_named_and_no_row_is_dropped(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(clip(4))
    (tmp_path / "data.jsonl").write_text('{"question": "?", "images": ["a.mp4"], "answer": "7", "video": true}')
    monkeypatch.setitem(sys.modules, "av", None)  # importing it now fails
    with pytest.raises(ValueError, match=r"a.mp4 is a video file: `pip install -e .\[data\]` to read it"):
        read_examples(tmp_path / "data.jsonl", turns=False, drop=True)


def test_what_is_no_video_is_refused(monkeypatch):
    whole = clip(20)
    playlist = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"
    for data, message in (
        (playlist, "here cannot be read: it is no picture .* and no video"),
        (b"", "here cannot be read: it is no picture .* and no video"),
        (whole[:100], "here cannot be read"),
        (whole[:16] + bytes(1000), "here (cannot be read|has no)"),
    ):
        for read in (read_frames, clip_size):
            with pytest.raises(ImageError, match=message):
                read(io.BytesIO(data), "here")
    monkeypatch.setattr(clips, "MAX_PACKETS", 19)
    with pytest.raises(ImageError, match="here has more than 19 frames"):
        read_frames(io.BytesIO(whole), "here")
    monkeypatch.setattr(clips, "MAX_SIDE", 95)
    with pytest.raises(ImageError, match="here has frames of 96 x 64 pixels"):
        clip_size(io.BytesIO(whole), "here")


def test_broken_bytes_give_frames_or_an_image_error():
    random = np.random.default_rng(0)
    data = np.frombuffer(clip(20), np.uint8)
    outcomes = set()
    for _ in range(60):
        broken = data.copy()
        broken[random.integers(12, len(data), 20)] = random.integers(0, 256, 20)
        try:
            assert len(read_frames(io.BytesIO(broken.tobytes()), "here")[0]) >= 1
            outcomes.add("frames")
        except ImageError:
            outcomes.add("error")
    assert outcomes == {"frames", "error"}
