"""A question of a benchmark, before its pixels are read."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from pixel_jax.data.sources import Source, frame_sizes, load_frames
from pixel_jax.evaluation.clips import load_clip, size_of
from pixel_jax.rollouts.prompts import Query


class Question(NamedTuple):
    """A question. Its `images` are pictures, or the frames of one video, or one video file.

    Frames of a video file are chosen as in training, or with `video_file` as MVBench does: `frames` of them within `bound`.
    """

    id: str
    question: str
    answers: tuple[str, ...]  # any of them is right
    images: tuple[Source, ...]
    category: str = ""
    is_video: bool = False
    # That two frames cover, as the model is told; the released code says 1 for every video. None: what the file says.
    seconds: float | None = 1.0
    video_file: bool = False
    bound: tuple[float, float] | None = None  # seconds of the video file to look between
    frames: int = 16
    fields: Mapping[str, Any] = {}  # what else its row has, as JSON values

    @property
    def video_path(self) -> pathlib.Path:
        """The file of a question with `video_file`: MVBench lies in folders."""
        path = self.images[0]
        assert isinstance(path, pathlib.Path)
        return path

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every picture or frame, from the files' headers."""
        if self.video_file:
            return [size_of(self.video_path)] * self.frames
        return frame_sizes(self.images, self.is_video)

    def query(self) -> Query:
        """The question with its pixels."""
        if self.video_file:
            pixels, seconds = load_clip(self.video_path, self.bound, count=self.frames), None
        else:
            pixels, seconds = load_frames(self.images, self.is_video)
        return Query(self.question, pixels, self.is_video, self.seconds or seconds or 1.0)
