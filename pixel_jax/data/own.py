r"""The user's own data: `*.jsonl` and `*.parquet` files with images beside them.

A folder of such files, read in the order of their names, or one file is read.

A line, or row, is one example. Paths are relative to the file and lead to files in its folder, or in one that the config's
`image_folders` allow: `("/",)` allows all, for lines that one has written oneself. Nothing is fetched from anywhere.

    {"question": "...", "images": ["a.jpg"], "answer": "7"}                                  for reinforcement learning
    {"question": "...", "images": ["a.jpg"], "answer": "7", "turns": ["...", {"text": "...", "learn": false}, "..."]}

`turns` are what the assistant says, one after another; all but the last end with a tool call, whose result is
computed, not written. A turn with `"learn": false` is read and not learned (a mistake that the next turn corrects). With
`"video": true` the images are the frames of one video, `"seconds"` apart by pairs (default 1), or one video file, whose own
timing is the default. `answer` may be a list, and `id` is what reports call the example (default: the file's name and the
number of the line). An evaluation has a row for every `"category"`.

In the place of `question` and `turns` a row may have `messages` (`pixel_jax.data.messages`), OpenAI's or those of TRL and
LLaMA-Factory, with pictures in their parts or, where `<image>` or an empty part says so, in `images`:

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "..."}]},
                  {"role": "assistant", "content": "..."}], "answer": "7"}

All turns of the assistant are learned but those of `"weight": 0`; without an `answer` the last one's \boxed{} is it. A picture
may also be given by its content: a data URL, or in Parquet bytes or a struct of `bytes` and `path`; it is kept in memory as it
is encoded.
For a language model rows need no images (`pictures` of `read_own`).

Data with other names is read by `columns`, as in `{"question": "prompt", "images": "image"}`. Further fields of a row
are kept in `Example.fields`.
"""

import datetime
import decimal
import difflib
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pixel_jax.data.example import Example, ExampleError, ReadReport, is_seconds
from pixel_jax.data.messages import Dialogue, picture, read_dialogue
from pixel_jax.data.parquet import parquet_rows
from pixel_jax.data.sources import Embedded, Source, locate
from pixel_jax.data.traces import Turn
from pixel_jax.dialog.grammar import RELEASED_LANGUAGE, Language
from pixel_jax.dialog.template import system_prompt
from pixel_jax.files import parse_json, read_lines
from pixel_jax.terminal import brief
from pixel_jax.training.answers import last_boxed

FIELDS = ("question", "images", "answer", "turns", "messages", "video", "seconds", "id", "category")
ALIKE = 0.8  # similarity of two names from which on one counts as a misspelling of the other
TURN = 'a turn is a text or {{"text": ..., "learn": true or false}}, not {}'


def check_columns(columns: Mapping[str, str]) -> None:
    """Checks that `columns` maps fields to names of columns. ExampleError: it does not."""
    for name, column in columns.items():
        if name not in FIELDS:
            raise ExampleError(f"columns: there is no field {brief(name)}; the fields are {', '.join(FIELDS)}")
        if not column:
            raise ExampleError(f"columns: {name!r} has no name in the data")
    if twice := [column for column in columns.values() if list(columns.values()).count(column) > 1]:
        raise ExampleError(f"columns: {brief(twice[0])} cannot be two fields")


def renamed(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """Renames the columns of `row` to fields, as `columns` (field -> column) says.

    A column that has the name of a field which another column is renamed to is left out.
    """
    for name, column in columns.items():
        if column not in row:
            raise ExampleError(f"{where} has no {column!r} to be the {name} (columns), only {brief(sorted(row))}")
    back = {column: name for name, column in columns.items()}
    return {back.get(name, name): value for name, value in row.items() if name in back or name not in columns}


def read_row(
    row: Mapping[str, Any],
    where: str,
    folder: pathlib.Path,
    *,
    image_folders: Sequence[str] = (),
    columns: Mapping[str, str] = {},  # noqa: B006, never changed
    turns: bool = False,
    language: Language = RELEASED_LANGUAGE,
    pictures: bool = True,
    report: ReadReport,
) -> Example:
    """Makes an example of one row, and checks every field and the path of every image.

    Args:
        row: column -> value.
        where: file and number, for messages; also the id of a row that has none.
        folder: the folder to which image paths are relative, and in which images may lie.
        image_folders: other folders in which images may lie (`pixel_jax.data.sources.locate`).
        columns: field -> column.
        turns: whether turns are required.
        language: the language of the calls in `messages`.
        pictures: whether rows need pictures; those for a language model may have none.
        report: notes what was changed.

    Raises:
        ExampleError: the row is no example. The message names `where` and the field.
    """
    row = renamed(row, columns, where)

    def refuse(why: str) -> ExampleError:
        return ExampleError(f"{where}: {why}")

    further = {name: as_json(value, name, refuse) for name, value in row.items() if name not in FIELDS}
    absent = [name for name in FIELDS if name not in row and not (name == "question" and "messages" in row)]
    for name in further:
        if near := difflib.get_close_matches(name, absent, n=1, cutoff=ALIKE):
            raise refuse(
                f"unknown field {brief(name)}; the nearest known one is {near[0]!r} (columns says what data calls it)"
            )
        report.mended[f"the further field {brief(name)} was kept, for rewards"] += 1
    field = functools.partial(take, row, refuse)
    answer = field("answer", lambda x: x is None or type(x) in (str, int) or is_texts(x), "a text or a list of texts")
    video = field("video", lambda x: isinstance(x, bool), "true or false", False)
    seconds = field("seconds", lambda x: x is None or is_seconds(x), "a positive number, at most a million")
    name = field("id", lambda x: x is None or type(x) in (str, int), "a text or a number")
    category = field("category", lambda x: isinstance(x, str), "a text", "")
    images = [picture(x, where) for x in listed(row.get("images"))]
    if row.get("messages") is not None:
        if clash := [name for name in ("question", "turns") if row.get(name) is not None]:
            raise refuse(f"'messages' and {clash[0]!r} are both given: the messages have it already")
        of_model: dict[str, Any] = {"language": language, "needs_pictures": pictures}
        dialogue = read_dialogue(row["messages"], f"{where}: messages", images or None, video=video, **of_model)
        question, assistant_turns = dialogue.first.text.strip(), turns_of(dialogue, language, report)
        images, video, text_first = dialogue.first.images, dialogue.first.video, dialogue.first.text_before
        if answer is None and assistant_turns and (boxed := last_boxed(dialogue.said[-1].text)) is not None:
            answer = boxed
    else:
        question = field("question", lambda x: isinstance(x, str) and bool(x), "a text")
        assistant_turns = written_turns(field("turns", lambda x: isinstance(x, list), "a list of turns", []), refuse)
        text_first = False
        if pictures and not images:
            raise refuse(f"'images' must be a path or a list of at least one, not {brief(row.get('images'))}")
    if turns and not assistant_turns:
        raise refuse("'turns' must be a list of turns, or 'messages' end with the assistant's, to learn from")
    if answer is None and not turns:
        raise refuse("'answer' must be a text or a list of texts, not None")
    return Example(
        id=pathlib.PurePath(where).name if name is None else str(name),
        question=question,
        images=tuple(source(x, folder, image_folders, refuse) for x in images),
        answer=tuple(map(str, () if answer is None else listed(answer))),
        turns=assistant_turns,
        video=video,
        seconds=None if seconds is None else float(seconds),
        category=category,
        text_first=text_first,
        fields=further,
    )


def take(
    row: Mapping[str, Any],
    refuse: Callable[[str], Exception],
    name: str,
    check: Callable[[Any], bool],
    wanted: str,
    default: Any = None,
) -> Any:
    """Returns the field `name`. Raises `refuse` unless `check` holds for its value."""
    value = row.get(name, default)
    if not check(value):
        raise refuse(f"{name!r} must be {wanted}, not {brief(value)}")
    return value


def is_texts(value: Any) -> bool:
    """Whether this is a list of texts or whole numbers, and not empty."""
    return isinstance(value, list) and bool(value) and all(type(x) in (str, int) for x in value)


def listed(value: Any) -> list[Any]:
    """Returns a list as it is, an empty one for None, and any other value as a list of one."""
    return [] if value is None else value if isinstance(value, list) else [value]


def source(value: Any, folder: pathlib.Path, others: Sequence[str], refuse: Callable[[str], Exception]) -> Source:
    """The source of an image: a file, or bytes in the row, as in Parquet files of the Hugging Face hub."""
    if isinstance(value, Embedded):
        return value
    if isinstance(value, bytes):
        value = {"bytes": value}
    if isinstance(value, Mapping) and value.keys() <= {"bytes", "path"} and isinstance(value.get("bytes"), bytes):
        return Embedded(value["bytes"], str(value.get("path") or refuse("a picture")))
    if isinstance(value, Mapping) and value.keys() == {"bytes", "path"} and value["bytes"] is None:
        value = value["path"]
    return locate(value, folder, others, error=refuse)


def turns_of(said: Dialogue, language: Language, report: ReadReport) -> tuple[Turn, ...]:
    """Returns the turns of the assistant; `report` counts other parts of the conversation that our prompts replace."""
    if said.system is not None and said.system != system_prompt(language.tools, language.format):
        report.mended["a system message other than ours was replaced by ours"] += 1
    if said.first.text_before and said.first.text_after:
        report.mended["text of a question on both sides of its images was put before them"] += 1
    return tuple(Turn(((message.text, message.learned is not False),)) for message in said.said)


def written_turns(items: list[Any], refuse: Callable[[str], Exception]) -> tuple[Turn, ...]:
    """Reads the field `turns`."""
    turns = []
    for item in items:
        match {"text": item} if isinstance(item, str) else item:
            case {"text": str(text), **rest} if text and rest.keys() <= {"learn"}:
                learned = rest.get("learn", True)
                if not isinstance(learned, bool):
                    raise refuse(TURN.format(brief(item)))
                turns.append(Turn(((text, learned),)))
            case _:
                raise refuse(TURN.format(brief(item)))
    return tuple(turns)


def as_json(value: Any, name: str, refuse: Callable[[str], Exception]) -> Any:
    """A further field as a JSON value: dates and decimals of Parquet become texts. Raises `refuse` for bytes and the like."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case datetime.date() | datetime.time() | datetime.timedelta() | decimal.Decimal():
            return str(value)
        case list():
            return [as_json(x, name, refuse) for x in value]
        case Mapping():
            return {str(key): as_json(x, name, refuse) for key, x in value.items()}
    raise refuse(
        f"the further field {brief(name)} holds {type(value).__name__}, which nothing can be done with: leave it out"
    )


Rows = Iterator[tuple[str, Callable[[], Any]]]  # for each row its position, for messages, and a function that reads it


def read_own(
    path: str | pathlib.Path,
    *,
    turns: bool = False,
    report: ReadReport | None = None,
    image_folders: Sequence[str] = (),
    columns: Mapping[str, str] = {},  # noqa: B006, never changed
    language: Language = RELEASED_LANGUAGE,
    pictures: bool = True,
) -> list[Example]:
    """Reads the examples of a file or folder (`read_row`).

    Args:
        path: the path of the file or folder.
        turns: whether turns are required.
        report: notes the rows that are dropped or changed.
        image_folders: other folders in which images may lie (`pixel_jax.data.sources.locate`).
        columns: field -> column.
        language: the language of the calls in `messages`.
        pictures: whether rows need pictures; those for a language model may have none.

    Raises:
        ExampleError: a row is no example, and the report does not drop such rows.
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
    options |= {"pictures": pictures}
    examples: list[Example] = []
    for file in files:
        for where, row in READERS[file.suffix](file):
            report.take(examples, lambda: read_row(row(), where, file.parent, report=report, **options))  # noqa: B023
    return examples


def json_lines(path: pathlib.Path) -> Rows:
    """Iterates over the rows of a file of JSON lines."""

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
