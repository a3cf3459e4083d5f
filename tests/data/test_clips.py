"""Video files: what ffmpeg shows is what is read, evenly chosen; everything else is refused by name."""

import io
import pathlib
import sys

import av
import numpy as np
import pytest
from PIL import Image

import pixel_jax
from pixel_jax.data import clips
from pixel_jax.data.clips import clip_size, is_clip, read_frames
from pixel_jax.data.images import ImageError, ImageWarning
from pixel_jax.data.limits import Limits, use_limits
from pixel_jax.data.own import read_own
from pixel_jax.data.read import read_examples
from tests.data.ffmpeg import H264, ffmpeg, frames_of, make


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


# One that a test waits for is one of several.
pytestmark = pytest.mark.filterwarnings("ignore::pixel_jax.pictures.ImageWarning")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """80 frames, 20 a second."""
    return make(tmp_path_factory.mktemp("original") / "original.mp4")


def check(path: pathlib.Path, expected: np.ndarray) -> None:
    """Every frame is ffmpeg's, to the bit; sixteen are those of an even spread; sizes are known beforehand."""
    found, _ = pixel_jax.read_video(path, frames=1000)
    np.testing.assert_array_equal(found, expected)
    some, _ = pixel_jax.read_video(path)
    numbers = np.linspace(0, len(expected) - 1, min(16, len(expected))).round().astype(int)
    np.testing.assert_array_equal(some, expected[numbers])
    with path.open("rb") as file:
        assert clip_size(file, "here") == [expected.shape[1:3]] * len(some)


@pytest.mark.parametrize("container", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize("how", ["0", "90", "180", "270", "45", "90 hflip", "0 vflip"])
def test_what_is_turned_is_shown_upright(how, container, original, tmp_path):
    angle, *flip = how.split()
    turned = tmp_path / f"turned.{container}"
    ffmpeg("-display_rotation", angle, *(f"-display_{x}" for x in flip), "-i", original, "-c", "copy", turned)
    expected = frames_of(turned)
    assert expected.shape == ((80, 64, 48, 3) if angle in ("90", "270") else (80, 48, 64, 3))
    check(turned, expected)
    if how != "0":
        assert (expected.shape != (80, 48, 64, 3)) or (expected != frames_of(original)).any()


@pytest.mark.parametrize("container", ["mp4", "mov", "mkv"])
def test_what_was_cut_off_without_encoding_is_not_shown(container, original, tmp_path):
    trimmed = tmp_path / f"trimmed.{container}"
    ffmpeg("-ss", "1.7", "-i", original, "-t", "0.8", "-c", "copy", trimmed)
    with av.open(str(trimmed)) as opened:
        packets = sum(packet.size > 0 for packet in opened.demux(video=0))
    expected = frames_of(trimmed)
    assert len(expected) < packets or container == "mkv"  # which has no edit lists
    check(trimmed, expected)
    _, seconds = pixel_jax.read_video(trimmed)
    assert seconds * 16 == pytest.approx(len(expected) / 20, abs=0.11)


@pytest.mark.parametrize("codec", ["libx265", "libvpx", "libvpx-vp9", "libaom-av1", "mpeg4", "mjpeg", "ffv1"])
def test_codecs(codec, tmp_path):
    check(make(tmp_path / "a.mkv", "-c:v", codec, count=20), frames_of(tmp_path / "a.mkv"))


@pytest.mark.parametrize(
    "how",
    [
        ("-vf", "scale=out_color_matrix=bt709:out_range=full", "-colorspace", "bt709", "-color_range", "pc"),
        ("-pix_fmt", "yuv420p10le"),
        ("-pix_fmt", "yuv444p"),
        ("-flags", "+ildct+ilme", "-x264opts", "tff=1"),
        ("-movflags", "frag_keyframe+empty_moov"),
        ("-vf", "select='lt(n,20)+not(mod(n,7))'", "-fps_mode", "vfr"),
    ],
    ids=["range and matrix", "10 bits", "full chroma", "interlaced", "fragments", "variable rate"],
)
def test_what_a_file_says_of_its_pixels_is_followed(how, tmp_path):
    check(make(tmp_path / "a.mp4", *H264, *how), frames_of(tmp_path / "a.mp4"))


@pytest.mark.parametrize("aspect, width", [("16/11", 93), ("8/9", 56), ("2/1", 128)])
def test_pixels_are_made_square(aspect, width, tmp_path):
    path = make(tmp_path / "a.mp4", *H264, "-vf", f"setsar={aspect}", count=20)
    expected = frames_of(path, "scale=iw*sar:ih")
    assert expected.shape == (20, 48, width, 3)
    check(path, expected)
    turned = tmp_path / "turned.mp4"
    ffmpeg("-display_rotation", "90", "-i", path, "-c", "copy", turned)
    found, _ = pixel_jax.read_video(turned, frames=1000)
    assert found.shape == (20, width, 48, 3)
    assert np.abs(found.astype(int) - np.rot90(expected, axes=(1, 2))).mean() < 3  # chroma is placed otherwise


@pytest.mark.parametrize("container", ["mp4", "mkv", "avi", "mov"])
@pytest.mark.parametrize("count", [1, 2, 17])
def test_short_clips(container, count, tmp_path):
    path = make(tmp_path / f"a.{container}", count=count)
    check(path, frames_of(path))
    frames, seconds = pixel_jax.read_video(path)
    assert seconds * len(frames) == pytest.approx(count / 20, abs=0.002)


def test_times_are_those_of_the_frames(original, tmp_path):
    """A copy of an MP4 in AVI counts the ticks of its clock as frames: 600 a second."""
    ffmpeg("-i", original, "-c", "copy", tmp_path / "a.avi")
    with av.open(str(tmp_path / "a.avi")) as container:
        assert container.streams.video[0].average_rate == 600
    frames, seconds = pixel_jax.read_video(tmp_path / "a.avi")
    assert len(frames) == 16 and seconds == pytest.approx(4 / 16, rel=0.02)
    check(tmp_path / "a.avi", frames_of(original))


def test_titles_in_another_encoding(original, tmp_path):
    path = tmp_path / "a.mkv"
    ffmpeg("-i", original, "-metadata", "title=Strasse", "-c", "copy", path)
    path.write_bytes(path.read_bytes().replace(b"Strasse", "Straße!".encode("latin-1")))
    check(path, frames_of(original))


def test_the_cover_of_a_film_is_not_the_film(original, tmp_path):
    Image.new("RGB", (320, 240), "red").save(tmp_path / "cover.jpg")
    both = tmp_path / "both.mp4"
    order = ("-map", "0", "-map", "1", "-c", "copy", "-disposition:v:0", "attached_pic")
    ffmpeg("-i", tmp_path / "cover.jpg", "-i", original, *order, both)
    check(both, frames_of(original))


def packets_of(path) -> list[tuple[int, int]]:
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


@pytest.mark.parametrize("number", [3, 33, 41])
def test_a_damaged_packet_costs_its_own_frames_and_is_announced(number, original, tmp_path):
    data = bytearray(original.read_bytes())
    at, size = packets_of(original)[number]
    data[at : at + size] = bytes(size)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    expected = frames_of(path)
    assert 60 < len(expected) < 80
    with pytest.warns(ImageWarning, match="damaged.mp4' is damaged: 1 of its 80 packets cannot be decoded"):
        check(path, expected)
    with pytest.warns(ImageWarning, match=f"has 80 frames by its container, of which {len(expected)} can be shown"):
        pixel_jax.read_video(path)


def test_a_file_that_was_cut_shows_what_there_is_and_says_so(original, tmp_path):
    whole = tmp_path / "whole.mkv"
    ffmpeg("-i", original, "-c", "copy", whole)
    path = tmp_path / "cut.mkv"
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    expected = frames_of(path)
    assert 16 < len(expected) < 60
    with pytest.warns(ImageWarning, match="shall last 4.0 s, but its pictures end after"):
        check(path, expected)


def test_a_clip_with_nothing_left_is_an_error(original, tmp_path):
    data = bytearray(original.read_bytes())
    for at, size in packets_of(original):
        data[at : at + size] = bytes(size)
    path = tmp_path / "nothing.mp4"
    path.write_bytes(data)
    with pytest.warns(ImageWarning), pytest.raises(ImageError, match="nothing.mp4' has no frame that can be decoded"):
        pixel_jax.read_video(path)


def test_few_frames_left_of_many_are_refused(original, tmp_path):
    """Their prompt was made for sixteen."""
    data = bytearray(original.read_bytes())
    for at, size in packets_of(original)[6:]:
        data[at : at + size] = bytes(size)
    path = tmp_path / "little.mp4"
    path.write_bytes(data)
    assert len(frames_of(path)) < 16
    with pytest.warns(ImageWarning), pytest.raises(ImageError, match="only . frames can be decoded, of at least 16"):
        pixel_jax.read_video(path)


def test_high_dynamic_range_is_announced(tmp_path):
    path = make(tmp_path / "a.mp4", *H264, "-vf", "setparams=color_trc=arib-std-b67", count=5)
    with pytest.warns(ImageWarning, match=r"high dynamic range \(HLG\) and shown without tone mapping"):
        check(path, frames_of(path))


@pytest.mark.parametrize("box", [b"free", b"wide"])
def test_quicktime_of_before_there_were_brands(box, original, tmp_path):
    path = tmp_path / "old.mov"
    ffmpeg("-i", original, "-c", "copy", path)
    data = bytearray(path.read_bytes())
    assert data[4:8] == b"ftyp"
    data[4:8] = box
    path.write_bytes(data)
    check(path, frames_of(original))


@pytest.mark.parametrize("container", ["ts", "mpg", "flv", "wmv", "gif"])
def test_other_containers_are_refused_with_a_remedy(container, tmp_path):
    path = make(tmp_path / f"a.{container}", "-an", count=5)  # by the codec that is usual there
    with pytest.raises(ImageError, match=f"a.{container}' cannot be read: .*`ffmpeg -i FILE -c copy FILE.mkv`"):
        pixel_jax.read_video(path)
    (tmp_path / "data.jsonl").write_text(
        f'{{"question": "?", "images": ["a.{container}"], "answer": "7", "video": true}}'
    )
    (example,) = read_own(tmp_path / "data.jsonl")
    for look in (example.query, example.outline):
        with pytest.raises(ImageError, match=r"`ffmpeg -i FILE (-c copy FILE.mkv|FILE.mp4)`"):
            look()


def test_a_still_picture_in_boxes_is_no_video(tmp_path):
    Image.new("RGB", (20, 10), "blue").save(tmp_path / "a.avif")
    assert not is_clip((tmp_path / "a.avif").read_bytes()[:16])
    with pytest.raises(ImageError, match="cannot be read: it is"):
        pixel_jax.read_video(tmp_path / "a.avif")


def test_arguments_are_checked(original, tmp_path):
    with pytest.raises(ValueError, match="frames must be positive, not 0"):
        pixel_jax.read_video(original, frames=0)
    with pytest.raises(ImageError, match="nowhere.mp4' cannot be opened"):
        pixel_jax.read_video(tmp_path / "nowhere.mp4")


def test_seconds_are_those_between_frames(tmp_path):
    """3.2 s at ten frames a second: every second frame is shown, and a prompt counts two of them."""
    make(tmp_path / "a.mp4", count=32, rate=10)
    frames, seconds = pixel_jax.read_video(tmp_path / "a.mp4")
    assert len(frames) == 16 and seconds == pytest.approx(0.2)
    (tmp_path / "data.jsonl").write_text('{"question": "?", "images": ["a.mp4"], "answer": "7", "video": true}')
    (example,) = read_own(tmp_path / "data.jsonl")
    assert example.query().seconds == pytest.approx(0.4)


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
@pytest.mark.parametrize("count", [1, 5, 16, 61])
def test_frames_are_spread_evenly(container, count):
    data = clip(count, container=container)
    assert is_clip(data[:16])
    frames, seconds = read_frames(io.BytesIO(data), "here")
    expected = np.linspace(0, count - 1, min(count, 16)).round()
    assert all(frame.shape == (64, 96, 3) and frame.dtype == np.uint8 for frame in frames)
    np.testing.assert_allclose([frame.mean() for frame in frames], 4 * expected, atol=3)
    assert seconds == pytest.approx(count / 4 / len(frames))
    assert clip_size(io.BytesIO(data), "here") == [(64, 96)] * len(frames)


def test_a_video_file_is_an_example_s_video(tmp_path):
    (tmp_path / "a.mp4").write_bytes(clip(20))
    Image.new("RGB", (9, 6)).save(tmp_path / "a.png")
    line = '{"question": "?", "images": ["%s"], "answer": "7", "video": true%s}\n'
    path = tmp_path / "data.jsonl"
    path.write_text(line % ("a.mp4", "") + line % ("a.mp4", ', "seconds": 3') + line % ("a.png", ""))
    own, given, still = read_own(path)
    assert (own.query().seconds, given.query().seconds, still.query().seconds) == (0.625, 3.0, 1.0)
    for example in (own, given, still):
        assert [x.shape for x in example.outline().images] == [x.shape for x in example.query().images]
    assert len(own.query().images) == 16


def test_without_av_the_extra_is_named_and_no_row_is_dropped(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(clip(4))
    (tmp_path / "data.jsonl").write_text('{"question": "?", "images": ["a.mp4"], "answer": "7", "video": true}')
    monkeypatch.setitem(sys.modules, "av", None)  # importing it now fails
    with pytest.raises(ValueError, match=r"a.mp4 is a video file: `pip install av` to read it"):
        read_examples(tmp_path / "data.jsonl", turns=False, drop=True)


def test_what_is_no_video_is_refused(monkeypatch, own_limits):
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
    use_limits(Limits(side=95))
    with pytest.raises(ImageError, match="here is 96 x 64 pixels, more than 95 on a side"):
        clip_size(io.BytesIO(whole), "here")


@pytest.mark.parametrize("container", ["mp4", "mkv", "avi"])
def test_of_broken_files_as_much_is_shown_as_by_ffmpeg(container, original, tmp_path):
    whole, broken = tmp_path / f"whole.{container}", tmp_path / f"broken.{container}"
    ffmpeg("-i", original, "-c", "copy", whole)
    random = np.random.default_rng(0)
    outcomes = set()
    for _ in range(16):
        data = np.frombuffer(whole.read_bytes(), np.uint8).copy()
        places = random.integers(20, len(data), random.integers(1, 12))
        data[places] = random.integers(0, 256, len(places))
        broken.write_bytes(data.tobytes())
        try:
            found = len(pixel_jax.read_video(broken, frames=1000)[0])
        except ImageError:
            found = 0
        try:
            expected = len(frames_of(broken))
        except AssertionError:  # it gives up
            expected = 0
        assert found == expected
        outcomes.add(found)
    assert len(outcomes) > 1


def at_rate(path, rate):
    """What ffmpeg shows at a steady rate: at each time the last frame that has begun."""
    return frames_of(path, f"fps={rate}:round=up")


@pytest.mark.parametrize("rate", [2.5, 20])
@pytest.mark.parametrize(
    "how",
    [
        (),
        ("-vf", "select='lt(n,20)+not(mod(n,7))'", "-fps_mode", "vfr"),
        ("-vf", "setpts='N*N/400/TB'", "-fps_mode", "vfr"),
    ],
    ids=["steady", "gaps", "slower and slower"],
)
@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_frames_by_rate_are_those_seen_at_the_times(container, how, rate, tmp_path):
    path = make(tmp_path / f"a.{container}", *H264, *how, count=60)
    expected = at_rate(path, rate)
    found, seconds = pixel_jax.read_video(path, frames=1000, fps=rate)
    # How long the last frame is seen is the average here, and what the file says of it there.
    assert seconds == pytest.approx(1 / rate) and abs(len(found) - len(expected)) <= 2 + 0.3 * rate
    least = min(len(found), len(expected))
    # A container's clock may place a frame a tick behind a time that it stands on.
    same = (found[:least] == expected[:least]).all(axis=(1, 2, 3))
    assert same.mean() > 0.9 and same[0]


def test_frames_by_rate_and_number(original):
    """80 frames in four seconds; a turned picture comes out upright."""
    found, seconds = pixel_jax.read_video(original, frames=8, fps=20)
    assert len(found) == 8 and seconds == pytest.approx(0.5)
    np.testing.assert_array_equal(found, pixel_jax.read_video(original, frames=80)[0][::10])
    found, seconds = pixel_jax.read_video(original, frames=100, fps=2)
    assert len(found) == 8 and seconds == 0.5
    found, seconds = pixel_jax.read_video(original, fps=0.01)
    assert len(found) == 1 and seconds == 100
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="fps must be positive"):
            pixel_jax.read_video(original, fps=wrong)
