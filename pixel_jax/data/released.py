r"""The released Pixel Reasoner data, as it is: `release.json` of the traces and `release.parquet` of the questions.

Beside either lie `images.zip` and `videos.zip`, which are read as archives or, if they have been unpacked, as folders.

- **Traces** (TIGER-Lab/PixelReasoner-SFT-Data): `{"qid", "message_list": [{"role", "content": [{"text" | "image" | "video"}]}]}`,
  where the fields of a part that it does not have are null and a video is a list of frames. As in the released trainer the
  last two turns of the assistant are learned, which leaves out the mistakes before them; results of calls are not
  read but computed again from the images. A question stands before its images where its row has it so, as the released
  rows do and no other prompt does. The system message is always ours; rows with another are counted.
- **Questions** (TIGER-Lab/PixelReasoner-RL-Data, and the evaluation files): columns `question`, `answer` (a list with one
  `\boxed{...}`, of several answers if it holds a list), `image` (a list, the frames of a video), `is_video` (or null), `qid`.
"""

import codecs
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pixel_jax.data.example import Example, ExampleError, ReadReport
from pixel_jax.data.messages import fields, read_dialogue
from pixel_jax.data.parquet import parquet_rows
from pixel_jax.data.sources import Embedded, Folder, Source, SourceError
from pixel_jax.data.traces import Turn
from pixel_jax.dialog.grammar import RELEASED_LANGUAGE, Language
from pixel_jax.dialog.template import GUIDELINES, system_prompt
from pixel_jax.files import open_regular, parse_json, read_json, read_lines
from pixel_jax.terminal import brief
from pixel_jax.training.answers import last_boxed

LEARNED = 2  # number of last turns of the assistant that are learned (`create_assistant_response_mask` of the released trainer)
QUESTION_COLUMNS = ("question", "answer", "image", "is_video", "qid")


def read_traces(
    path: str | pathlib.Path,
    report: ReadReport,
    image_folders: Sequence[str] = (),
    language: Language = RELEASED_LANGUAGE,
) -> list[Example]:
    """Reads the examples of a `release.json`: an array of rows, or a row a line. Their calls are in the `language`.

    Images lie in its folder or in one of `image_folders` (`pixel_jax.data.sources.locate`).
    """
    path = pathlib.Path(path)
    folder = Folder(path.parent, image_folders)
    examples: list[Example] = []
    for where, row in _json_rows(path):
        report.take(examples, lambda: trace_example(row(), where, folder, report, language))  # noqa: B023
    return examples


def _json_rows(path: pathlib.Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Iterates over the rows: the position of each, for messages, and a function that reads it."""
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


def trace_example(
    row: Any, where: str, folder: Folder, report: ReadReport, language: Language = RELEASED_LANGUAGE
) -> Example:
    """Makes an example of one row of the traces; `report` counts what had to be mended.

    Raises:
        ExampleError: the row is no trace.
    """
    row = fields(row, ("qid", "message_list"), where)
    name = row["qid"]
    if not isinstance(name, str | int) or name == "":
        raise ExampleError(f"{where}: 'qid' must be a text or a number, not {brief(name)}")
    where = f"{where} ({name})"
    system, first, answers = read_dialogue(row["message_list"], f"{where}: 'message_list'", language=language)
    if not answers:
        raise ExampleError(f"{where}: user and assistant must take turns and the assistant end")
    turns = [Turn(((message.text, i >= len(answers) - LEARNED),)) for i, message in enumerate(answers)]
    answer = last_boxed(turns[-1].parts[0][0])
    if answer is None:
        report.mended["an answer without \\boxed{} was kept"] += 1
    if system != system_prompt(language.tools, language.format):
        report.mended["a system message other than ours, or none, was replaced by ours"] += 1
    if first.text_before and first.text_after:
        report.mended["text of a question on both sides of its images was put before them"] += 1
    return Example(
        id=str(name),
        question=_without_guidelines(first.text, report),
        images=tuple(image if isinstance(image, Embedded) else _found(image, folder, where) for image in first.images),
        answer=() if answer is None else (answer,),
        turns=tuple(turns),
        video=first.video,
        text_first=first.text_before,
    )


def _found(name: Any, folder: Folder, where: str) -> Source:
    """Finds the image that a row calls `name`."""
    try:
        return folder.find(name)
    except SourceError as error:
        raise SourceError(f"{where}: {error}") from None


def _without_guidelines(text: str, report: ReadReport) -> str:
    """Removes the guidelines from a question; they are added again when it becomes a prompt."""
    text = text.rstrip()
    for kind, guidelines in GUIDELINES.items():
        if text.endswith(guidelines.strip()):
            if kind != "vcot":
                report.mended[f"the {kind!r} guidelines were replaced"] += 1
            return text.removesuffix(guidelines.strip()).rstrip("\n")
    report.mended["a question without known guidelines was kept as it is"] += 1
    return text


def read_questions(
    path: str | pathlib.Path,
    report: ReadReport,
    image_folders: Sequence[str] = (),
    folder: pathlib.Path | None = None,
) -> list[Example]:
    """Reads the examples of a `release.parquet`.

    Their images lie in `folder` (by default that of the file) or in one of `image_folders`.
    """
    path = pathlib.Path(path)
    images = Folder(folder or path.parent, image_folders)
    examples: list[Example] = []
    for where, row in parquet_rows(path, QUESTION_COLUMNS, ExampleError):
        report.take(examples, lambda: question_example(row(), where, images))  # noqa: B023
    return examples


def question_example(row: Mapping[str, Any], where: str, folder: Folder) -> Example:
    """Makes an example of one row of the questions.

    Raises:
        ExampleError: the row is no question.
    """
    name, question, answer, images, is_video = (row[x] for x in ("qid", "question", "answer", "image", "is_video"))
    where = f"{where} ({name})"
    answer = [answer] if isinstance(answer, str) else answer
    images = [images] if isinstance(images, str) else images

    def is_texts(value: Any) -> bool:
        return isinstance(value, Sequence) and bool(value) and all(isinstance(x, str) and x for x in value)

    for field, value, good in (
        ("qid", name, isinstance(name, str | int) and name != ""),
        ("question", question, isinstance(question, str) and bool(question)),
        ("answer", answer, is_texts(answer)),
        ("image", images, is_texts(images)),
        ("is_video", is_video, is_video is None or isinstance(is_video, bool)),
    ):
        if not good:
            raise ExampleError(f"{where}: {field!r} cannot be {brief(value)}")
    return Example(
        id=str(name),
        question=question,
        images=tuple(_found(image, folder, where) for image in images),
        answer=tuple(answer),
        video=bool(is_video),
    )
