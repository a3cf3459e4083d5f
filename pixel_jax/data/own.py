"""A folder of one's own: `*.jsonl` and `*.parquet` files, in the order of their names, or one of them, with images beside.

A line, or row, is one example. Paths are relative to the file and lead to files in its folder, or in one that the config's
`image_folders` allow: `("/",)` allows all, for lines that one has written oneself. Nothing is fetched from anywhere.

    {"question": "...", "images": ["a.jpg"], "answer": "7"}                                  for reinforcement learning
    {"question": "...", "images": ["a.jpg"], "answer": "7", "turns": ["...", {"text": "...", "learn": false}, "..."]}

`turns` are what the assistant says, one after another; all but the last end with a tool call, whose result is worked out,
not written. A turn with `"learn": false` is read and not learned (a mistake that the next turn corrects). With
`"video": true` the images are the frames of one video, `"seconds"` apart by pairs (default 1), or one video file, whose own
timing is the default. `answer` may be a list, and `id` is what reports call the example (default: the file's name and the
number of the line). An evaluation has a row for every `"category"`.

In the place of `question` and `turns` a row may have `messages` (`pixel_jax.data.messages`), OpenAI's or those of TRL and
LLaMA-Factory, with pictures in their parts or, where `<image>` or an empty part says so, in `images`:

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "..."}]},
                  {"role": "assistant", "content": "..."}], "answer": "7"}

All turns of the assistant are learned but those of `"weight": 0`; without an `answer` the last one's \\boxed{} is it. A picture
may be its content, too: a data URL, or in Parquet bytes or a struct of `bytes` and `path`; it is kept in memory as it is encoded.
Data with other names is read by `columns`, as in `{"question": "prompt", "images": "image"}`. Whatever further fields a row has
are in `Example.fields`.
"""

import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pixel_jax.data.example import Example, ExampleError, ReadReport
from pixel_jax.data.parquet import parquet_rows
from pixel_jax.data.rows import check_columns, read_row
from pixel_jax.dialog.grammar import RELEASED_LANGUAGE, Language
from pixel_jax.files import parse_json, read_lines

Rows = Iterator[tuple[str, Callable[[], Any]]]  # where each stands, and how it is read


def read_own(
    path: str | pathlib.Path,
    *,
    turns: bool = False,
    report: ReadReport | None = None,
    image_folders: Sequence[str] = (),
    columns: Mapping[str, str] = {},  # noqa: B006, never changed
    language: Language = RELEASED_LANGUAGE,
) -> list[Example]:
    """The examples of a file or folder, checked: every field, every image's path. With `turns` they are required.

    Images lie in the folder or in one of `image_folders` (`pixel_jax.data.sources.locate`); `columns` has the data's names for
    our fields; calls in `messages` are in the `language`. A `report` that drops takes note of what is no example; otherwise the
    first such row is an `ExampleError`.
    """
    path = pathlib.Path(path)
    report = report or ReadReport(str(path))
    check_columns(columns)
    files = sorted(x for kind in READERS for x in path.glob(f"*{kind}")) if path.is_dir() else [path]
    if not files:
        raise ExampleError(
            f"{path} holds no *.jsonl or *.parquet files and no prepared TFDS data, whose folder has a dataset_info.json"
        )
    options = {"image_folders": image_folders, "columns": columns, "turns": turns, "language": language}
    examples: list[Example] = []
    for file in files:
        for where, row in READERS[file.suffix](file):
            report.take(examples, lambda: read_row(row(), where, file.parent, report=report, **options))  # noqa: B023
    return examples


def json_lines(path: pathlib.Path) -> Rows:
    def read(line: bytes, where: str) -> dict[str, Any]:
        row = parse_json(line, where, ExampleError)
        if not isinstance(row, dict):
            raise ExampleError(f"{where} is {type(row).__name__}, not an object")
        return row

    for where, line in read_lines(path, error=ExampleError):
        yield where, lambda line=line, where=where: read(line, where)


READERS: Mapping[str, Callable[[pathlib.Path], Rows]] = {
    ".jsonl": json_lines,
    ".parquet": lambda path: parquet_rows(path, None, ExampleError),
}
