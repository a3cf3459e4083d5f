"""The released Pixel Reasoner data, as it is: `release.json` of the traces and `release.parquet` of the questions.

Beside either lie `images.zip` and `videos.zip`; they are read without being unpacked, or unpacked if somebody did that.

- **Traces** (TIGER-Lab/PixelReasoner-SFT-Data): `{"qid", "message_list": [{"role", "content": [{"text" | "image" | "video"}]}]}`,
  where the fields of a part that it does not have are null and a video is a list of frames. As in the released trainer the
  last two turns of the assistant are learned, which leaves out the mistakes before them; what the calls returned is worked
  out again, from the images, and not read. A question stands before its images where its row has it so, as the released
  rows do and no other prompt does. The system message is always ours; rows with another are counted.
- **Questions** (TIGER-Lab/PixelReasoner-RL-Data, and the evaluation files): columns `question`, `answer` (a list with one
  `\\boxed{...}`, of several answers if it holds a list), `image` (a list, the frames of a video), `is_video` (or null), `qid`.
"""

import codecs
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pixel_jax.data.example import Example, ExampleError, Report
from pixel_jax.data.sources import Folder
from pixel_jax.data.traces import Turn
from pixel_jax.dialog import grammar
from pixel_jax.dialog.template import GUIDELINES, system_prompt
from pixel_jax.files import open_regular, parse_json, read_json, read_lines
from pixel_jax.terminal import brief
from pixel_jax.training.answers import last_boxed

LEARNED = 2  # last turns of the assistant (`create_assistant_response_mask` of the released trainer)
QUESTION_COLUMNS = ("question", "answer", "image", "is_video", "qid")


def read_traces(path: str | pathlib.Path, report: Report, image_folders: Sequence[str] = ()) -> list[Example]:
    """The examples of a `release.json`: an array of rows, or a row a line.

    Images lie in its folder or in one of `image_folders` (`pixel_jax.data.sources.locate`).
    """
    path = pathlib.Path(path)
    folder = Folder(path.parent, image_folders)
    examples: list[Example] = []
    for where, row in _json_rows(path):
        report.take(examples, lambda: trace_example(row(), where, folder, report))  # noqa: B023
    return examples


def _json_rows(path: pathlib.Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Where every row stands, and how it is read."""
    with open_regular(path, ExampleError) as file:
        whole = file.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
    if not whole:
        for where, line in read_lines(path, error=ExampleError):
            yield where, lambda line=line, where=where: parse_json(line, where, ExampleError)
        return
    rows = read_json(path, error=ExampleError)
    if not isinstance(rows, list):
        raise ExampleError(f"{path} is {type(rows).__name__}, not a list of rows")
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", lambda row=row: row


def trace_example(row: Any, where: str, folder: Folder, report: Report) -> Example:
    """One row of the traces. ExampleError: it is none; `report` counts what had to be mended."""
    row = _fields(row, ("qid", "message_list"), where)
    name = row["qid"]
    if not isinstance(name, str | int) or name == "":
        raise ExampleError(f"{where}: 'qid' must be a text or a number, not {brief(name)}")
    where = f"{where} ({name})"
    messages = row["message_list"]
    if not isinstance(messages, list):
        raise ExampleError(f"{where}: 'message_list' must be a list, not {type(messages).__name__}")
    messages = [_message(message, f"{where}, message {i}") for i, message in enumerate(messages, 1)]
    system = messages.pop(0).text if messages and messages[0].role == "system" else None
    roles = [message.role for message in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ExampleError(f"{where}: user and assistant must take turns and the assistant end, not {brief(roles)}")
    first = messages[0]
    if not first.text or not first.images:
        raise ExampleError(f"{where}: the first message needs a question and an image or a video")
    said, returned = messages[1::2], messages[2::2]
    turns = []
    for i, message in enumerate(said, 1):
        if message.images or not message.text:
            raise ExampleError(f"{where}: turn {i} of the assistant must be a text and nothing else")
        text = _tidy(message.text)
        asked = grammar.parse_turn(text)
        if asked.required != (i < len(said)):
            what = "ends with a call" if asked.required else "is followed by another and has no call"
            raise ExampleError(f"{where}: turn {i} of the assistant {what}")
        if asked.required and asked.call is None and returned[i - 1].images:
            raise ExampleError(f"{where}: the call of turn {i} cannot be read, but images came back: {text[-200:]!r}")
        turns.append(Turn(((text, i > len(said) - LEARNED),)))
    answer = last_boxed(turns[-1].parts[0][0])
    if answer is None:
        report.mended["an answer without \\boxed{} was kept"] += 1
    if system != system_prompt():
        report.mended["a system message other than ours, or none, was replaced by ours"] += 1
    if first.text_before and first.text_after:
        report.mended["text of a question on both sides of its images was put before them"] += 1
    return Example(
        id=str(name),
        question=_without_guidelines(first.text, report),
        images=tuple(folder.find(image) for image in first.images),
        answer=() if answer is None else (answer,),
        turns=tuple(turns),
        video=first.video,
        text_first=first.text_before,
    )


class Message(NamedTuple):
    role: str
    text: str
    images: list[Any]  # or the frames of a video
    video: bool
    text_before: bool  # some of the text comes before an image
    text_after: bool


def _message(message: Any, where: str) -> Message:
    message = _fields(message, ("role", "content"), where)
    role, content = message["role"], message["content"]
    if isinstance(content, str):
        content = [{"text": content}]
    if not isinstance(role, str) or not isinstance(content, list):
        raise ExampleError(f"{where}: a message has a role and a list of parts, not {brief(role)} and {brief(content)}")
    texts, images, videos, text_before, text_after = [], [], [], False, False
    for part in content:
        if not isinstance(part, Mapping):
            raise ExampleError(f"{where}: a part of a message is an object, not {brief(part)}")
        given = {kind: value for kind, value in part.items() if value is not None and kind != "type"}
        if len(given) != 1 or not given.keys() <= {"text", "image", "video"}:
            raise ExampleError(
                f"{where}: a part of a message is one of text, image and video, not {brief(sorted(given))}"
            )
        ((kind, value),) = given.items()
        if kind == "text":
            if not isinstance(value, str):
                raise ExampleError(f"{where}: a text is no text: {brief(value)}")
            texts.append(value)
            text_after = text_after or bool(value and (images or videos))
            continue
        text_before = text_before or any(texts)
        if kind == "image":
            images.append(value)
        else:
            videos.append(value if isinstance(value, list) else [value])
    if len(videos) > 1 or (videos and images):
        raise ExampleError(f"{where} shows {len(videos)} videos and {len(images)} images: one video or images")
    return Message(role, "".join(texts), videos[0] if videos else images, bool(videos), text_before, text_after)


def _without_guidelines(text: str, report: Report) -> str:
    """The question alone: the guidelines are added where it becomes a prompt."""
    text = text.rstrip()
    for kind, guidelines in GUIDELINES.items():
        if text.endswith(guidelines.strip()):
            if kind != "vcot":
                report.mended[f"the {kind!r} guidelines were replaced"] += 1
            return text.removesuffix(guidelines.strip()).rstrip("\n")
    report.mended["a question without known guidelines was kept as it is"] += 1
    return text


def _tidy(text: str) -> str:
    """A turn as the policy would write it: no end marker, and nothing after a call."""
    bare = text.replace(grammar.END.decode(), "")
    return bare.rstrip() if bare.rstrip().endswith(grammar.CLOSE.decode()) else bare


def read_questions(path: str | pathlib.Path, report: Report, image_folders: Sequence[str] = ()) -> list[Example]:
    """The examples of a `release.parquet`; its images lie where those of `read_traces` do."""
    path = pathlib.Path(path)
    folder = Folder(path.parent, image_folders)
    examples: list[Example] = []
    for where, row in parquet_rows(path, QUESTION_COLUMNS, ExampleError):
        report.take(examples, lambda: question_example(row(), where, folder))  # noqa: B023
    return examples


def parquet_rows(
    path: pathlib.Path, columns: Sequence[str], error: Callable[[str], Exception]
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Where every row of a Parquet file stands, and how its `columns` are read. `error`: it cannot be, or has no such."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise error(f"{path} is a Parquet file: `pip install pyarrow` to read it") from None

    def read(batch, index: int, where: str) -> dict[str, Any]:
        row = {}
        for name in columns:
            try:
                row[name] = batch.column(name)[index].as_py()
            except (ValueError, pyarrow.ArrowException) as reason:  # a text that is no UTF-8
                raise error(f"{where}: {name!r} cannot be read: {reason}") from None
        return row

    number = 0
    try:
        with open_regular(path, error) as opened, parquet.ParquetFile(opened) as file:
            if missing := [name for name in columns if name not in file.schema_arrow.names]:
                raise error(f"{path} has no column {missing[0]!r}, only {brief(file.schema_arrow.names)}")
            for batch in file.iter_batches(columns=list(columns)):
                for index in range(batch.num_rows):
                    number += 1
                    where = f"{path}, row {number}"
                    yield where, lambda batch=batch, index=index, where=where: read(batch, index, where)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as reason:  # the last: a column's name
        raise error(f"{path} cannot be read: {reason}") from None


def question_example(row: Mapping[str, Any], where: str, folder: Folder) -> Example:
    """One row of the questions. ExampleError: it is none."""
    name, question, answer, images, is_video = (row[x] for x in ("qid", "question", "answer", "image", "is_video"))
    where = f"{where} ({name})"
    answer = [answer] if isinstance(answer, str) else answer
    images = [images] if isinstance(images, str) else images
    texts = lambda x: isinstance(x, Sequence) and bool(x) and all(isinstance(item, str) and item for item in x)
    for field, value, good in (
        ("qid", name, isinstance(name, str | int) and name != ""),
        ("question", question, isinstance(question, str) and bool(question)),
        ("answer", answer, texts(answer)),
        ("image", images, texts(images)),
        ("is_video", is_video, is_video is None or isinstance(is_video, bool)),
    ):
        if not good:
            raise ExampleError(f"{where}: {field!r} cannot be {brief(value)}")
    return Example(
        id=str(name),
        question=question,
        images=tuple(folder.find(image) for image in images),
        answer=tuple(answer),
        video=bool(is_video),
    )


def _fields(value: Any, names: Sequence[str], where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ExampleError(f"{where} is {type(value).__name__}, not an object")
    if missing := [name for name in names if name not in value]:
        raise ExampleError(f"{where} has no {missing[0]!r}, only {brief(list(value))}")
    return value
