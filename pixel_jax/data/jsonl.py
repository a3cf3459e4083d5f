"""A folder of one's own: `*.jsonl` files, in the order of their names, or one of them, with images beside.

A line is one example. Paths are relative to the file and lead to files in its folder, or in one that the config's
`image_folders` allow: `("/",)` allows all, for lines that one has written oneself. Nothing is fetched from anywhere.

    {"question": "...", "images": ["a.jpg"], "answer": "7"}                                  for reinforcement learning
    {"question": "...", "images": ["a.jpg"], "answer": "7", "turns": ["...", {"text": "...", "learn": false}, "..."]}

`turns` are what the assistant says, one after another; all but the last end with a tool call, whose result is worked out,
not written. A turn with `"learn": false` is read and not learned (a mistake that the next turn corrects). With
`"video": true` the images are the frames of one video, `"seconds"` apart by pairs (default 1), or one video file, whose own
timing is the default. `answer` may be a list, and `id` is what reports call the example (default: the file's name and the
number of the line). An evaluation has a row for every `"category"`.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from pixel_jax.data.example import Example, ExampleError, Report, is_seconds
from pixel_jax.data.sources import locate
from pixel_jax.data.traces import Turn
from pixel_jax.files import parse_json, read_lines
from pixel_jax.terminal import brief

FIELDS = {"question", "images", "answer", "turns", "video", "seconds", "id", "category"}


def read_jsonl(
    path: str | pathlib.Path,
    *,
    turns: bool = False,
    report: Report | None = None,
    image_folders: Sequence[str] = (),
) -> list[Example]:
    """The examples of a file or folder, checked: every field, every image's path. With `turns` they are required.

    Images lie in the folder or in one of `image_folders` (`pixel_jax.data.sources.locate`). A `report` that drops takes note
    of what is no example; otherwise the first such line is an `ExampleError`.
    """
    path = pathlib.Path(path)
    report = report or Report(str(path))
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ExampleError(
            f"{path} holds no *.jsonl files and no prepared TFDS data, whose folder has a dataset_info.json"
        )
    examples: list[Example] = []
    for file in files:
        for where, line in read_lines(file, error=ExampleError):
            report.take(examples, lambda: _example(line, file.parent, image_folders, where, turns))  # noqa: B023
    return examples


def _example(line: bytes, folder: pathlib.Path, others: Sequence[str], where: str, need_turns: bool) -> Example:
    row = parse_json(line, where, ExampleError)
    if not isinstance(row, dict):
        raise ExampleError(f"{where} is {type(row).__name__}, not an object")
    if unknown := sorted(row.keys() - FIELDS):
        raise ExampleError(f"{where} has the unknown field {brief(unknown[0])}; known are {', '.join(sorted(FIELDS))}")

    def field(name: str, check: Callable[[Any], bool], wanted: str, default: Any = None) -> Any:
        value = row.get(name, default)
        if not check(value):
            raise ExampleError(f"{where}: {name!r} must be {wanted}, not {brief(value)}")
        return value

    strings = lambda x: isinstance(x, list) and bool(x) and all(isinstance(item, str) for item in x)
    question = field("question", lambda x: isinstance(x, str) and bool(x), "a text")
    images = field("images", strings, "a list of at least one path")
    answer = field("answer", lambda x: isinstance(x, str) or strings(x), "a text or a list of texts")
    video = field("video", lambda x: isinstance(x, bool), "true or false", False)
    seconds = field("seconds", lambda x: x is None or is_seconds(x), "a positive number, at most a million")
    name = field("id", lambda x: x is None or isinstance(x, str), "a text") or pathlib.PurePath(where).name
    category = field("category", lambda x: isinstance(x, str), "a text", "")
    written = field("turns", lambda x: isinstance(x, list) and (bool(x) or not need_turns), "a list of turns", [])
    turns = []
    for item in written:
        match {"text": item} if isinstance(item, str) else item:
            case {"text": str(text), **rest} if (
                text and rest.keys() <= {"learn"} and type(rest.get("learn", True)) is bool
            ):
                turns.append(Turn(((text, rest.get("learn", True)),)))
            case _:
                wanted = 'a turn is a text or {"text": ..., "learn": true or false}'
                raise ExampleError(f"{where}: {wanted}, not {brief(item)}")
    refuse = lambda why: ExampleError(f"{where}: {why}")
    paths = tuple(locate(image, folder, others, error=refuse) for image in images)
    return Example(
        id=name,
        question=question,
        images=paths,
        answer=(answer,) if isinstance(answer, str) else tuple(answer),
        turns=tuple(turns),
        video=video,
        seconds=None if seconds is None else float(seconds),
        category=category,
    )
