"""Seeds, from which traces are made: a question, its answer, and the region or frames that show the answer.

A file has one seed per line; paths are relative to it and lead to files in its folder or in the config's `image_folders`. A box
is in pixels of the upright image, frames count from 1.

    {"id": "street-1", "question": "...", "answer": "Exit 12", "images": ["a.jpg"], "cue": "the sign on the left",
     "box": [812, 90, 1020, 210]}
    {"question": "...", "answer": "B", "images": ["1.jpg", "2.jpg", ...], "video": true, "seconds": 2.0,
     "cue": "the moment the door opens", "frames": [5, 6]}
    {"question": "...", "answer": ["7", "seven"], "images": ["a.jpg"]}                  answered without looking closer

`cue` names the region or moment, as in "look clearer at 'the sign on the left'". A box belongs to the first image, or to the
image with the number `"image"`, counted from 1. Of several answers the first is written. Without an `id` it is the line's number.

A mistake in a line is an error. A seed whose image cannot be decoded is dropped and counted.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from pixel_jax.data.example import is_seconds
from pixel_jax.data.images import ImageError, image_size
from pixel_jax.data.sources import locate
from pixel_jax.files import parse_json, read_lines
from pixel_jax.terminal import brief
from pixel_jax.training.answers import references_of

FIELDS = ("id", "question", "answer", "images", "cue", "box", "frames", "image", "video", "seconds")
LONGEST_CUE = 200  # characters
MOST_FRAMES = 8  # frames that the tool selects at once


class SeedError(ValueError):
    """A line that is no seed; the message names file, line and value."""


@dataclasses.dataclass(frozen=True)
class Seed:
    """A question to make a trace of."""

    id: str
    question: str
    answers: tuple[str, ...]
    images: tuple[pathlib.Path, ...]
    cue: str | None = None
    box: tuple[float, float, float, float] | None = None  # x1, y1, x2, y2 in pixels of image number `image`
    frames: tuple[int, ...] | None = None
    image: int = 1
    video: bool = False
    seconds: float | None = None

    @property
    def looks(self) -> bool:
        """Whether there is a region or a moment to look at closely."""
        return self.box is not None or self.frames is not None


def read_seeds(path: str | pathlib.Path, image_folders: Sequence[str] = ()) -> list[Seed]:
    """Reads and checks the seeds of a file.

    Args:
        path: the path of the file.
        image_folders: other folders in which images may lie (`pixel_jax.data.sources.locate`).

    Raises:
        SeedError: a line is no seed, or two have the same id.
    """
    path = pathlib.Path(path)
    seeds: list[Seed] = []
    lines: dict[str, str] = {}
    for where, line in read_lines(path, error=SeedError):
        seed = _seed(line, path.parent, image_folders, where)
        if seed.id in lines:
            raise SeedError(f"{where}: the id {brief(seed.id)} is that of line {lines[seed.id]} already")
        lines[seed.id] = where.rpartition(":")[2]
        seeds.append(seed)
    if not seeds:
        raise SeedError(f"{path} has no seeds")
    return seeds


def _seed(line: bytes, folder: pathlib.Path, others: Sequence[str], where: str) -> Seed:
    number = where.rpartition(":")[2]
    row = parse_json(line, where, SeedError)
    if not isinstance(row, dict):
        raise SeedError(f"{where} is {type(row).__name__}, not an object")
    if unknown := sorted(row.keys() - set(FIELDS)):
        raise SeedError(f"{where} has the unknown field {brief(unknown[0])}; known are {', '.join(FIELDS)}")

    def need(name: str, good: bool, wanted: str) -> None:
        if not good:
            raise SeedError(f"{where}: {name!r} must be {wanted}, not {brief(row.get(name))}")

    def text(x: Any) -> bool:
        return isinstance(x, str) and bool(x.strip())

    def texts(x: Any) -> bool:
        return isinstance(x, list) and bool(x) and all(map(text, x))

    def whole(x: Any) -> bool:
        return type(x) is int

    need("question", text(row.get("question")), "a text")
    need("answer", text(row.get("answer")) or texts(row.get("answer")), "a text or a list of texts")
    need("images", texts(row.get("images")), "a list of at least one path")
    need("id", text(row.get("id", number)), "a text")
    need("video", isinstance(row.get("video", False), bool), "true or false")
    count, video = len(row["images"]), row.get("video", False)
    seconds = row.get("seconds")
    need("seconds", seconds is None or (video and is_seconds(seconds)), "a positive number, of a video")
    image = row.get("image", 1)
    need("image", whole(image) and 1 <= image <= count, f"a number from 1 to {count}")
    images = tuple(
        locate(name, folder, others, error=lambda why: SeedError(f"{where}: {why}")) for name in row["images"]
    )

    box, frames, cue = row.get("box"), row.get("frames"), row.get("cue")
    if box is not None:
        need("box", not video, "left out for a video, which has frames")
        need("box", isinstance(box, list) and len(box) == 4 and all(map(_number, box)), "four numbers")
        with contextlib.suppress(ImageError):
            height, width = image_size(images[image - 1])
            inside = 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height
            need("box", inside, f"x1 < x2 and y1 < y2 within {width} x {height} pixels")
    if frames is not None:
        need("frames", video, "left out for images, which have a box")
        good = isinstance(frames, list) and 0 < len(frames) <= MOST_FRAMES and all(map(whole, frames))
        need("frames", good and all(1 <= x <= count for x in frames), f"1 to {MOST_FRAMES} numbers from 1 to {count}")
        need("frames", len(set(frames)) == len(frames), "numbers that differ")
    if box is not None or frames is not None:
        one_line = isinstance(cue, str) and text(cue) and len(cue) <= LONGEST_CUE and "\n" not in cue
        need("cue", one_line, "the name of what is looked at, one line")
    else:
        need("cue", cue is None, "left out where there is neither a box nor frames")
    return Seed(
        id=row.get("id", number),
        question=row["question"],
        answers=tuple(references_of(row["answer"])),
        images=images,
        cue=cue,
        box=None if box is None else (float(box[0]), float(box[1]), float(box[2]), float(box[3])),
        frames=None if frames is None else tuple(sorted(frames)),
        image=image,
        video=video,
        seconds=seconds,
    )


def _number(x: Any) -> bool:
    return type(x) in (int, float) and abs(x) < 1e9
