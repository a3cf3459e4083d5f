"""Reads examples from a file or folder in any of the formats."""

import pathlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from pixel_jax.data.example import Example, ExampleError, ReadReport
from pixel_jax.data.images import ImageError
from pixel_jax.data.own import READERS, read_own
from pixel_jax.data.parquet import column_names
from pixel_jax.data.released import QUESTION_COLUMNS, read_questions, read_traces
from pixel_jax.dialog.grammar import RELEASED_LANGUAGE, Language


def read_examples(
    path: str | pathlib.Path,
    *,
    turns: bool,
    drop: bool = False,
    image_folders: Sequence[str] = (),
    columns: Mapping[str, str] = {},  # noqa: B006, never changed
    language: Language = RELEASED_LANGUAGE,
    pictures: bool = True,
) -> tuple[list[Example], ReadReport]:
    """Reads the examples of a file, whose pixels stay where they are, and a report on rows that were left out or changed.

    Args:
      path: `*.jsonl` or `*.parquet` of one's own, or a directory of them (`pixel_jax.data.own`); `*.json` or `*.parquet` as
        released (`pixel_jax.data.released`); or a directory that TFDS has prepared (`pixel_jax.data.tfds_builders`).
      turns: whether turns are required, as for tuning.
      drop: whether rows that cannot be used are left out and counted; every image is decoded for that. Otherwise the first bad
        row is an error, and a broken image is one when it is read.
      image_folders: folders other than the data's in which images may lie (`pixel_jax.data.sources.locate`).
      columns: the names of the fields in the user's own data: field -> column.
      language: the language of the calls in conversations: the tools and the call format of the config.
      pictures: whether examples need them. Those of the user's own data for a language model may have none.

    Raises:
      ExampleError: the file, or a row of it, cannot be read; or no example is left.
    """
    report = ReadReport(str(path), drop)
    options = {"image_folders": image_folders, "columns": columns, "language": language, "pictures": pictures}
    examples = read_rows(path, report, turns=turns, **options)
    if drop:
        examples = readable(examples, report)
    if not examples:
        raise ExampleError(f"{report.source} has no examples. {report}")
    return examples, report


def read_rows(
    path: str | pathlib.Path,
    report: ReadReport,
    *,
    turns: bool,
    image_folders: Sequence[str] = (),
    columns: Mapping[str, str] = {},  # noqa: B006, never changed
    language: Language = RELEASED_LANGUAGE,
    pictures: bool = True,
) -> list[Example]:
    """Reads examples as `read_examples` does, but decodes no image; there may be no examples.

    Raises:
      ExampleError: the file, or a row of it that `report` does not drop, cannot be read.
    """
    path = pathlib.Path(path)
    if (path / "dataset_info.json").is_file():
        try:
            from pixel_jax.data.prepared import read_prepared
        except ImportError as error:
            raise ExampleError(
                f"{path} was prepared by TFDS: `pip install tensorflow-datasets importlib-resources` to read it ({error})"
            ) from None
        examples = read_prepared(path)
    elif not (path.is_file() or path.is_dir()):
        raise ExampleError(f"{path} is not a file or directory")
    elif path.suffix == ".json":
        examples = read_traces(path, report, image_folders, language)
    elif path.suffix == ".parquet" and not columns and set(QUESTION_COLUMNS) <= set(column_names(path, ExampleError)):
        examples = read_questions(path, report, image_folders)
    elif path.is_dir() or path.suffix in READERS:
        options = {"image_folders": image_folders, "columns": columns, "language": language, "pictures": pictures}
        examples = read_own(path, turns=turns, report=report, **options)
    else:
        raise ExampleError(
            f"{path} must be a .jsonl, .json or .parquet file, or a directory of .jsonl and .parquet files or prepared by TFDS"
        )
    if columns and (path.suffix == ".json" or (path / "dataset_info.json").is_file()):
        raise ExampleError(
            f"{path}: columns are of data of one's own, in JSON lines or Parquet; this has fields of its own"
        )
    if turns and (lacking := [x.id for x in examples if not x.turns]):
        raise ExampleError(f"{path}: {len(lacking)} examples have no turns to learn, the first one is {lacking[0]}")
    return examples


def readable(examples: list[Example], report: ReadReport) -> list[Example]:
    """The examples whose pixels can all be read; the others are noted in `report`."""

    def problem(example: Example) -> str | None:
        try:
            example.query()
        except ImageError as error:
            return f"{example.id}: {error}"

    with ThreadPoolExecutor() as pool:
        problems = list(pool.map(problem, examples))
    report.dropped += [why for why in problems if why]
    return [example for example, why in zip(examples, problems, strict=True) if not why]
