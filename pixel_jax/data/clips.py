"""Reads video files: frames spread evenly over the whole, as a player shows them.

ffmpeg's libraries decode: packets that an edit list hides are not shown, the picture is turned by the display matrix and
stretched where its pixels are not square, and colours follow the matrix and range that the file names. An `ImageWarning`
names properties of a file that are ignored.
"""

import contextlib
import math
import os
import pathlib
import struct
from collections.abc import Callable, Generator, Iterator, Sequence
from fractions import Fraction
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pixel_jax.data.images import UNKNOWN, container_of, image_size, read_image
from pixel_jax.data.limits import limits, reserve_decoding
from pixel_jax.files import open_regular
from pixel_jax.pictures import ImageError, announce

FRAMES = 16  # frames taken of a video (Pixel Reasoner §3), or all if it has fewer
MAX_PACKETS = 1 << 18  # an hour and more at sixty frames a second
COUNTED = 4  # packets for each frame that is taken: a clip with no more of them is decoded to count its frames
DECODER_FRAMES = 24  # most frames in a decoder: 16 references, and some being decoded or converted (measured: 21)

HDR = {16: "PQ", 18: "HLG"}  # transfer functions (ITU-T H.273) of high dynamic range, which 8 bits cannot show


def is_clip(head: bytes) -> bool:
    """Whether a file that begins with these (at least twelve) bytes is a video that `read_frames` reads."""
    return container_of(head) is not None


def read_video(path: str | os.PathLike, frames: int = FRAMES, *, fps: float | None = None) -> tuple[np.ndarray, float]:
    """Reads frames of a video file, evenly spread over it, as a player shows them.

    Args:
      path: the path of a local file (MP4, QuickTime, Matroska, WebM or AVI).
      frames: the most frames to return.
      fps: frames a second: those that a player shows at equal steps of time, whatever the rate of the file. If there would be
        more than `frames`, the steps are longer. None: `frames` frames, evenly spread by their number, whatever their times.

    Returns:
      uint8 [frames, height, width, 3], RGB, and the seconds from one frame to the next. `Processor` takes
      `fps=1 / seconds`; `Query.seconds`, the time that two frames cover, is twice as long.

    Raises:
      ImageError: the file is no video, is too large or too long, or has no frame that can be decoded.

    Warns:
      ImageWarning: some packets cannot be decoded, or a property of the file is ignored.
    """
    if frames < 1:
        raise ValueError(f"frames must be positive, not {frames}")
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"fps must be positive, not {fps}")
    with open_regular(path, ImageError) as file:
        name = repr(os.fspath(path))
        return read_frames(file, name, frames) if fps is None else _at_times(file, name, frames, fps)


def _at_times(file: BinaryIO, name: str, frames: int, fps: float) -> tuple[np.ndarray, float]:
    """Reads the frames that are visible at equal steps of time, `fps` a second, or fewer so that there are at most `frames`."""
    with VideoFile(file, name, frames) as clip:
        step = max(1 / fps, clip.seconds / frames)
        # Rounding of the quotient must not add a frame.
        times = step * np.arange(max(1, min(frames, math.ceil(clip.seconds / step - 1e-6))))

        def visible(count: int) -> list[int]:
            indices = np.searchsorted(clip.times[:count], times + 1e-6, side="right") - 1
            return np.maximum(indices, 0).tolist()

        return clip.show(visible), step


def read_frames(file: BinaryIO, name: str, frames: int = FRAMES) -> tuple[np.ndarray, float]:
    """Reads an open file as `read_video` does; errors and warnings call it `name`."""
    with VideoFile(file, name, frames) as clip:
        promised = min(clip.count, frames)
        shown = clip.show(lambda count: spread(count, frames))
        if len(shown) < promised:
            raise ImageError(f"{name}: only {len(shown)} frames can be decoded, of at least {promised}: it is damaged")
        return shown, clip.seconds / len(shown)


def clip_size(file: BinaryIO, name: str) -> list[tuple[int, int]]:
    """Reads the (height, width) of every frame that `read_frames` would return."""
    with VideoFile(file, name) as clip:
        return [clip.size] * min(clip.count, FRAMES)


def spread(count: int, frames: int = FRAMES) -> list[int]:
    """Returns the indices of at most `frames` of `count` frames, evenly spread."""
    return np.linspace(0, count - 1, min(count, frames)).round().astype(int).tolist()


class VideoFile:
    """An open video file, for a `with` statement, which reserves memory for `frames` frames before it decodes.

    Attributes:
        size: (height, width) of its frames, as shown.
        count: number of frames; of a long clip the number that the container states, until `show` has decoded fewer.
        rate: frames a second, on average; 0: the file does not say.
        seconds: its length; half a second a frame if the file does not say.
        times: when each frame appears, in seconds after the first one, float64 [count].

    Raises:
        ImageError: the file is no video, is too large or too long, or has no frame that can be decoded.
    """

    def __init__(self, file: BinaryIO, name: str, frames: int = FRAMES):
        self.file, self.name, self._reserved = file, name, contextlib.ExitStack()
        self._frames = frames

    def __enter__(self) -> "VideoFile":
        try:
            import av.filter  # noqa: F401
        except ImportError:
            # This is no ImageError, because nothing is wrong with the video: it must not be dropped as a bad row.
            raise ValueError(f"{self.name} is a video file: `pip install av` to read it") from None

        self.container = container_of(self.file.read(16))
        if self.container is None:
            raise ImageError(f"{self.name} {UNKNOWN}")
        try:
            self._most = limits().pixels
            with self._opened() as (container, stream):
                self._measure(container, stream)
            decoded = self._decoded()
            first = next(decoded, None)
            if first is None:
                raise ImageError(f"{self.name} has no frame that can be decoded")
            self._picture = _Picture(first, self.shape, self.name)
            self.size = self._picture.pixels(first).shape[:2]
            if self.count <= COUNTED * self._frames:
                frame_times = [first.time, *(frame.time for frame in decoded)]
                self._found(len(frame_times))
                if None not in frame_times and self._timed:
                    self.times = np.array(frame_times) - frame_times[0]
            decoded.close()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._reserved.close()
        if isinstance(error, Exception) and not isinstance(error, ImageError):  # decoders raise errors of many types
            reason = getattr(error, "strerror", None) or error  # PyAV's own text has a number and a descriptor
            raise ImageError(f"{self.name} cannot be read: {reason}") from error

    def show(self, choose: Callable[[int], list[int]]) -> np.ndarray:
        """Decodes the frames that `choose` picks.

        Args:
            choose: maps the number of frames to the indices of those to return. It is called again if fewer frames can be
                decoded than the container states.

        Returns:
            uint8 [n, h, w, 3].
        """
        while True:
            chosen = np.array(choose(self.count))
            shown = np.empty((len(chosen), *self.size, 3), np.uint8)
            count = 0
            with contextlib.closing(self._decoded()) as decoded:
                for count, frame in enumerate(decoded, 1):
                    matches = chosen == count - 1
                    if matches.any():
                        shown[matches] = self._picture.pixels(frame)
                    if count > chosen.max():
                        return shown
            self._found(count)

    def _found(self, count: int) -> None:
        """Sets the count of frames that can be decoded, whatever the container says."""
        if count < self.packets:
            announce(f"{self.name} has {self.packets} frames by its container, of which {count} can be shown")
        self.count = count

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """Opens the container and the stream that players choose: no cover picture, the default one of several."""
        import av

        self.file.seek(0)
        most = {"max_pixels": str(self._most)}
        # Metadata in another encoding is no reason to refuse a video. PyAV 19 and later do not refuse it by default.
        titles: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
        with av.open(self.file, format=self.container, options=most, **titles) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise ImageError(f"{self.name} has no video in it")
            if stream.codec_context is None:
                raise ImageError(f"{self.name} has a video of a codec that is not known")
            stream.thread_type = "NONE"  # several files are decoded at once, in the callers' threads
            stream.codec_context.thread_count = 1
            stream.codec_context.options = most
            yield container, stream

    def _measure(self, container, stream) -> None:
        """Reads sizes and times from the container, and reserves memory for decoding."""
        import av

        codec = stream.codec_context
        if not 0 < min(codec.width, codec.height):
            raise ImageError(f"{self.name} does not say how large its frames are")
        limits().check(codec.width, codec.height, self.name)
        # The limits hold also for frames that are stretched to square pixels.
        self.shape = _square(codec.width, codec.height, stream.sample_aspect_ratio)
        limits().check(*self.shape, self.name)
        self.count, times = 0, []
        for packet in container.demux(stream):
            if not packet.size or packet.is_discard:
                continue
            self.count += 1
            if self.count > MAX_PACKETS:
                raise ImageError(f"{self.name} has more than {MAX_PACKETS} frames")
            if packet.pts is not None:
                times.append(packet.pts)
        if not self.count:
            raise ImageError(f"{self.name} has no frames")
        self.packets = self.count
        self.rate = float(stream.average_rate or 0)
        self._timed = len(times) == self.count and max(times) > min(times)
        if self._timed:
            # The rate that the container states may count hidden frames, or the ticks of its clock.
            measured = (self.count - 1) / float((max(times) - min(times)) * stream.time_base)
            self.rate = self.rate if math.isclose(self.rate, measured, rel_tol=0.01) else measured
        self.seconds = self.count / (self.rate or 2)
        self.times = np.arange(self.count) / (self.rate or 2)
        if self._timed:
            shown_at = np.sort(times) * float(stream.time_base)
            self.times = shown_at - shown_at[0]
        whole = float((stream.duration or 0) * stream.time_base) or (container.duration or 0) / av.time_base
        if self.seconds < min(0.9 * whole, whole - 1):
            announce(f"{self.name} shall last {whole:.1f} s, but its pictures end after {self.seconds:.1f}")
        bits = av.VideoFormat(codec.pix_fmt).padded_bits_per_pixel if codec.pix_fmt else 48
        # Decoders round sizes up and add borders. A file whose frames grow later is refused.
        self._most = (codec.width + 256) * max(codec.height + 128, 280)
        frame_bytes = (min(self._frames, self.count) + 3) * 3 * math.prod(self.shape)
        self._reserved.enter_context(reserve_decoding(DECODER_FRAMES * self._most * bits // 8 + frame_bytes, self.name))

    def _decoded(self) -> Generator[Any, None, None]:
        """Decodes every frame that can be decoded, in the order in which they are shown."""
        import av.error

        lost = 0
        try:
            with self._opened() as (container, stream):
                stream.codec_context.open(strict=False)
                for packet in container.demux(stream):
                    try:
                        yield from stream.decode(packet)
                    except av.error.EOFError:  # the decoder was asked for the last frames twice
                        return
                    except av.error.MemoryError:
                        raise
                    except av.error.FFmpegError:
                        lost += 1
        finally:
            if lost:
                announce(f"{self.name} is damaged: {lost} of its {self.packets} packets cannot be decoded")


def _square(width: int, height: int, aspect: Fraction | None) -> tuple[int, int]:
    """Returns the (width, height) in square pixels of a frame whose pixels have this aspect ratio; the height stays."""
    return (max(1, int(width * aspect)) if aspect else width, height)


class _Picture:
    """Turns decoded frames like `first` into what a player shows, by ffmpeg's own filters, in its order.

    `shape` is (width, height) in square pixels, before a frame is turned.
    """

    def __init__(self, first, shape: tuple[int, int], name: str):
        self.size, self.name = (first.width, first.height), name
        self.filters = [*([("scale", f"{shape[0]}:{shape[1]}")] if shape != self.size else []), *_turns(first)]
        self._graphs: dict[tuple, Any] = {}
        if first.color_trc in HDR:
            announce(
                f"{name} is in high dynamic range ({HDR[first.color_trc]}) and shown without tone mapping: too pale"
            )

    def pixels(self, frame) -> np.ndarray:
        """The frame as it is shown, uint8 [h, w, 3]."""
        if (frame.width, frame.height) != self.size:
            raise ImageError(f"{self.name} has a frame of {frame.width} x {frame.height}, the first one is not")
        kind = (frame.format.name, frame.colorspace, frame.color_range)
        if kind not in self._graphs:
            self._graphs = {kind: self._graph(frame)}
        self._graphs[kind].push(frame)
        return self._graphs[kind].pull().to_ndarray()

    def _graph(self, frame):
        import av.filter

        graph = av.filter.Graph()
        graph.threads = 1
        source = (
            f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base={frame.time_base or '1/1000'}"
            f":colorspace={int(frame.colorspace)}:range={int(frame.color_range)}"
        )
        graph.link_nodes(
            graph.add("buffer", source),
            *(graph.add(kind, how) for kind, how in self.filters),
            graph.add("format", "rgb24"),
            graph.add("buffersink"),
        )
        graph.configure()
        return graph


def _turns(frame) -> list[tuple[str, str]]:
    """ffmpeg's filters for the display matrix of a frame, as its command line chooses them (`configure_input_video_filter`)."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return []
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data)[:36])  # a pixel at (x, y) is shown at (ax + cy, bx + dy)
    if not (a or c) or not (b or d):
        return []
    angle = round(math.degrees(math.atan2(b / math.hypot(b, d), a / math.hypot(a, c)))) % 360
    match angle:
        case 0:
            return [("vflip", "")] if d < 0 else []
        case 90:
            return [("transpose", "cclock_flip" if c > 0 else "clock")]
        case 180:
            return [("hflip", "")] * (a < 0) + [("vflip", "")] * (d < 0)
        case 270:
            return [("transpose", "clock_flip" if c < 0 else "cclock")]
    return [("rotate", f"{angle}*PI/180")]


class Span(NamedTuple):
    """The frames of a video that a question of MVBench shows, evenly spread over a part of it."""

    bound: tuple[float, float] | None = None  # start and end of the part in seconds; None: the whole video
    frames: int = 16


def frame_indices(bound: tuple[float, float] | None, rate: float, last: int, count: int, first: int = 0) -> list[int]:
    """Returns the middle frames of `count` equal stretches of a video with frames `first` to `last` at `rate` a second.

    `bound` has the start and the end of the part that is divided, in seconds; None: the whole video. The
    arithmetic, rounding included, is that of MVBench's released code.
    """
    start, end = bound or (-1e5, 1e5)
    begin, finish = max(first, round(start * rate)), min(round(end * rate), last)
    step = (finish - begin) / count
    indices = [int(begin + step / 2 + np.round(step * i)) for i in range(count)]
    return [min(max(index, first), last) for index in indices]


def clip_frame_size(path: str | os.PathLike) -> tuple[int, int]:
    """Reads the (height, width) of a video file, or of the first frame of a folder of frames."""
    path = pathlib.Path(path)
    if path.is_dir():
        return image_size(_listed_frames(path)[0])
    with open_regular(path, ImageError) as file, VideoFile(file, str(path)) as clip:
        return clip.size


def load_clip(
    path: str | os.PathLike,
    span: Span = Span(),  # noqa: B008, never changed
    *,
    folder_rate: float = 3.0,
) -> list[np.ndarray]:
    """Reads the frames of a span, uint8 [h, w, 3] each, of a video file or a folder (as TVQA's, `folder_rate` a second).

    Raises:
        ImageError: the video or a frame is broken, or the folder has no frames.
    """
    bound, count = span
    path = pathlib.Path(path)
    if path.is_dir():
        files = _listed_frames(path)
        # Frames of a folder are numbered from 1.
        wanted = frame_indices(bound, folder_rate, len(files), count, first=1)
        return [read_image(files[index - 1]) for index in wanted]
    with open_regular(path, ImageError) as file, VideoFile(file, str(path), count) as clip:
        return list(clip.show(lambda frames: frame_indices(bound, float(clip.rate or 25), frames - 1, count)))


def _listed_frames(path: pathlib.Path) -> Sequence[pathlib.Path]:
    files = sorted(path.glob("*.jpg"))
    if not files:
        raise ImageError(f"{path} holds no frames (*.jpg)")
    return files
