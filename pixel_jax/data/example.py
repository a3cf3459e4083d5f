"""The example: a row of data from a file of any format. Its pixels stay in their files until they are needed."""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from pixel_jax.data.clips import Span, clip_frame_size, load_clip
from pixel_jax.data.images import ImageError
from pixel_jax.data.sources import Source, SourceError, frame_sizes, load_frames
from pixel_jax.data.traces import Trace, Turn
from pixel_jax.rollouts.prompts import Query

Read = TypeVar("Read")  # a row of data, as its reader makes it


class ExampleError(ValueError):
    """A row that cannot be read as an example. The message names file, row and field."""


def is_seconds(value: Any) -> bool:
    """Whether `value` is a time between frames: a number that a float32 holds, up to eleven days."""
    return type(value) in (int, float) and 1e-6 <= value <= 1e6


class Example(NamedTuple):
    """A question about images or a video, with its answer and, for tuning, what the assistant says."""

    id: str
    question: str
    images: tuple[Source, ...]  # or the frames of one video, or one video file
    answer: tuple[str, ...]  # each of them is right
    turns: tuple[Turn, ...] = ()
    video: bool = False
    seconds: float | None = None  # time that two frames cover; None: as the video file says, 1 for frames
    category: str = ""  # by which the report of an evaluation groups questions
    text_first: bool = False  # the images follow the question
    fields: Mapping[str, Any] = {}  # further fields of its row, as JSON values: rewards may use them
    span: Span | None = None  # the part of a video that is shown; None: the whole, as in training

    def query(self) -> Query:
        """Reads the question with its pixels."""
        if self.span is None:
            frames, seconds = load_frames(self.images, self.video)
        else:
            frames, seconds = load_clip(self._video_path, self.span), None
        return Query(self.question, frames, self.video, self.seconds or seconds or 1.0, self.text_first)

    def outline(self) -> Query:
        """Makes the question with images of the right sizes whose pixels are not read and take no memory."""
        if self.span is None:
            sizes = frame_sizes(self.images, self.video)
        else:
            sizes = [clip_frame_size(self._video_path)] * self.span.frames
        images = [np.broadcast_to(np.uint8(0), (*size, 3)) for size in sizes]
        return Query(self.question, images, self.video, self.seconds or 1.0, self.text_first)

    @property
    def _video_path(self) -> pathlib.Path:
        (path,) = self.images
        assert isinstance(path, pathlib.Path)  # a span is of a file, or of a folder of frames
        return path

    def trace(self, query: Query) -> Trace:
        """Makes a trace of the turns about `query`, which is the question with its pixels (`query`) or without (`outline`)."""
        return Trace(query, self.turns, self.answer[0] if self.answer else "")


@dataclasses.dataclass
class ReadReport:
    """Counts the rows of a file that were left out or changed."""

    source: str
    drop: bool = False  # rows that cannot be used are left out and counted; otherwise the first one is an error
    dropped: list[str] = dataclasses.field(default_factory=list)  # why, in the words of the error
    mended: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def take(self, examples: list[Read], make: Callable[[], Read]) -> None:
        """Appends what `make` returns, or notes the error that it raises."""
        try:
            examples.append(make())
        except (ExampleError, SourceError, ImageError) as error:
            if not self.drop:
                raise
            self.dropped.append(str(error))

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.dropped)} rows dropped"] if self.dropped else []
        lines += [f"  {why}" for why in self.dropped[:20]]
        lines += [f"  and {len(self.dropped) - 20} more"] if len(self.dropped) > 20 else []
        return "\n".join([*lines, *(f"{self.source}: {count} times {what}" for what, count in self.mended.items())])
