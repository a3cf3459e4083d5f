"""Readers of benchmarks: the files that their authors release, the prepared Parquet files, and data of the user's own.

Every reader takes the data's path, the folder of its images (None: beside the data) and further folders in which images may
lie (`pixel_jax.data.sources.locate`). It returns the questions and the split that the files name ("val", "test", "train", or
None). Of V*, MVBench, HR-Bench, VisualProbe, Video-MME and the prepared Parquet files only test sets are released.
"""

import base64
import functools
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pixel_jax.data import own
from pixel_jax.data.clips import Span
from pixel_jax.data.example import Example, ExampleError, ReadReport
from pixel_jax.data.parquet import parquet_rows
from pixel_jax.data.released import read_questions
from pixel_jax.data.sources import Embedded, SourceError, locate
from pixel_jax.dialog.grammar import RELEASED_LANGUAGE, Language
from pixel_jax.files import parse_json, read_json, read_lines
from pixel_jax.terminal import brief
from pixel_jax.training.answers import references_of

Folders = Sequence[str]
Read = Callable[[pathlib.Path, pathlib.Path | None, Folders], tuple[list[Example], str | None]]
MOST_SECONDS = 1e6  # longest video: eleven days
USUAL_SECONDS = 1.0  # time that two frames cover: the released code states it for every video


class BenchmarkError(ValueError):
    """A file in another format than expected; the message names file, row and field."""


def read_vstar(
    data: pathlib.Path, images: pathlib.Path | None = None, others: Folders = ()
) -> tuple[list[Example], str]:
    """Reads V* (`craigwu/vstar_bench`): `test_questions.jsonl` with image, text (options included), label, category.

    Where a JSON file lies beside a picture, as released, its boxes are the field `box`: where the evidence lies.
    """
    path = data / "test_questions.jsonl" if data.is_dir() else data
    examples = []
    for where, row in _json_lines(path):
        get = _fields(where, row)
        category, label = get("category", str), get("label", str)
        image = _image(where, get("image", str), images or path.parent, others)
        examples.append(
            Example(
                id=f"{category}-{get('question_id', str | int)}",
                question=get("text", str),
                answer=(label,),
                images=(image,),
                category=category,
                fields=_vstar_boxes(image.with_suffix(".json")),
            )
        )
    return examples, "test"


def _vstar_boxes(path: pathlib.Path) -> dict[str, Any]:
    """The field `box` from the file beside a picture of V*, whose `bbox` has x, y, width and height of each thing."""
    if not path.is_file():
        return {}
    row = read_json(path, error=BenchmarkError)
    boxes = _fields(str(path), row if isinstance(row, dict) else {})("bbox", list)
    if not all(isinstance(box, list) and len(box) == 4 and all(type(x) in (int, float) for x in box) for box in boxes):
        raise BenchmarkError(f"{path}: 'bbox' is {brief(boxes)}, not a list of x, y, width and height")
    return {"box": [[x, y, x + width, y + height] for x, y, width, height in boxes]}


def read_tallyqa(
    data: pathlib.Path, images: pathlib.Path | None = None, others: Folders = ()
) -> tuple[list[Example], str]:
    """Reads TallyQA-Complex: the rows of `test.json` (or `train.json`) whose `issimple` is false."""
    path = data / "test.json" if data.is_dir() else data
    examples = []
    for where, row in _json_list(path, read_json(path, error=BenchmarkError)):
        get = _fields(where, row)
        if get("issimple", bool):
            continue
        examples.append(
            Example(
                id=str(get("question_id", int | str)),
                question=get("question", str),
                answer=(str(get("answer", int | str)),),
                images=(_image(where, get("image", str), images or path.parent, others),),
                category=get("data_source", str),
            )
        )
    return examples, "train" if path.stem.startswith("train") else "test"


def read_infovqa(
    data: pathlib.Path, images: pathlib.Path | None = None, others: Folders = ()
) -> tuple[list[Example], str]:
    """Reads InfographicVQA (`infographicsVQA_val_v1.0_withQT.json` and its like): the released test split has no answers."""
    document = read_json(data, error=BenchmarkError)
    get = _fields(str(data), document if isinstance(document, dict) else {})
    split, examples = get("dataset_split", str), []
    for where, row in _json_list(data, get("data", list)):
        get = _fields(where, row)
        if "answers" not in row:
            raise BenchmarkError(f"{where} has no answers (split {split!r}): only the benchmark's server can score it")
        kinds = row.get("answer_type") or []
        kinds = _texts(where, "answer_type", [kinds] if isinstance(kinds, str) else kinds)
        examples.append(
            Example(
                id=str(get("questionId", int | str)),
                question=get("question", str),
                answer=_texts(where, "answers", get("answers", list)),
                images=(_image(where, get("image_local_name", str), images or data.parent, others),),
                category=" + ".join(kinds),
            )
        )
    return examples, split


# By task: the folder under video/, and whether questions are about a part of the video only.
MVBENCH = {
    "Action Sequence": ("star/Charades_v1_480", True),
    "Action Prediction": ("star/Charades_v1_480", True),
    "Action Antonym": ("ssv2_video", False),
    "Fine-grained Action": ("Moments_in_Time_Raw/videos", False),
    "Unexpected Action": ("FunQA_test/test", False),
    "Object Existence": ("clevrer/video_validation", False),
    "Object Interaction": ("star/Charades_v1_480", True),
    "Object Shuffle": ("perception/videos", False),
    "Moving Direction": ("clevrer/video_validation", False),
    "Action Localization": ("sta/sta_video", True),
    "Scene Transition": ("scene_qa/video", False),
    "Action Count": ("perception/videos", False),
    "Moving Count": ("clevrer/video_validation", False),
    "Moving Attribute": ("clevrer/video_validation", False),
    "State Change": ("perception/videos", False),
    "Fine-grained Pose": ("nturgbd", False),
    "Character Order": ("perception/videos", False),
    "Egocentric Navigation": ("vlnqa", False),
    "Episodic Reasoning": ("tvqa/frames_fps3_hq", True),
    "Counterfactual Inference": ("clevrer/video_validation", False),
}


def read_mvbench(
    data: pathlib.Path, images: pathlib.Path | None = None, others: Folders = ()
) -> tuple[list[Example], str]:
    """Reads MVBench (`OpenGVLab/MVBench`), a folder with `json/` (a file a task) and `video/`: the tasks that are there.

    Options are lettered below the question, and the letter is the answer, as in the prepared data.
    """
    folder, videos, examples = data / "json", images or data / "video", []
    for task, (subfolder, bounded) in MVBENCH.items():
        path = folder / f"{task.lower().replace(' ', '_').replace('-', '_')}.json"
        if not path.is_file():
            continue
        for number, (where, row) in enumerate(_json_list(path, read_json(path, error=BenchmarkError))):
            get = _fields(where, row)
            options = _texts(where, "candidates", get("candidates", list))
            answer = str(get("answer", str | int))
            if answer not in options:
                raise BenchmarkError(f"{where}: the answer {brief(answer)} is none of the candidates {brief(options)}")
            letters = [f"({chr(ord('A') + i)}) {option}" for i, option in enumerate(options)]
            bound = (float(get("start", int | float)), float(get("end", int | float))) if bounded else None
            if bound and not all(abs(x) <= MOST_SECONDS for x in bound):
                raise BenchmarkError(f"{where}: 'start' and 'end' are seconds of a video, not {bound}")
            examples.append(
                Example(
                    id=f"{path.stem}-{number}",
                    question="\n".join([get("question", str), *letters]),
                    answer=(chr(ord("A") + options.index(answer)),),
                    images=(
                        _image(where, get("video", str), videos / subfolder, (str(videos), *others), directory=True),
                    ),
                    category=task,
                    video=True,
                    seconds=USUAL_SECONDS,
                    span=Span(bound),
                )
            )
    if not examples:
        raise BenchmarkError(f"{folder} holds none of MVBench's files, such as action_sequence.json")
    return examples, "test"


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def read_hrbench(
    data: pathlib.Path, images: pathlib.Path | None = None, others: Folders = ()
) -> tuple[list[Example], str]:
    """Reads HR-Bench (`DreamMr/HR-Bench`): `hr_bench_4k.parquet` or `hr_bench_8k.parquet`, or the folder with one of them.

    Every picture stands in its row, encoded and in base64. A question is asked four times, with its options in another order
    (`cycle_category`); its category is `category` ("single" or "cross").
    """
    if images is not None:
        raise BenchmarkError(f"{data}: the pictures of HR-Bench are in its rows; `images` is not needed")
    path, examples = _only(data, "hr_bench_*.parquet"), []
    pictures: dict[bytes, bytes] = {}  # by digest: the four rows of a question share one in memory
    for where, read_row in parquet_rows(path, None, BenchmarkError):
        row = read_row()
        get = _fields(where, row)
        cycle, letter = str(get("cycle_category", str | int)), get("answer", str).strip()
        options = {x: str(row[x]) for x in LETTERS if row.get(x) is not None and str(row[x]).strip()}
        if letter not in options:
            raise BenchmarkError(f"{where}: the answer {brief(letter)} is none of the options {brief(list(options))}")
        try:
            encoded = get("image", str)
            digest = hashlib.sha256(encoded.encode()).digest()
            picture = pictures.get(digest) or pictures.setdefault(digest, base64.b64decode(encoded, validate=True))
        except ValueError as error:
            raise BenchmarkError(f"{where}: 'image' is no base64: {error}") from None
        examples.append(
            Example(
                id=f"{path.stem}-{get('index', int | str)}",
                question="\n".join([get("question", str).strip(), *(f"({x}) {text}" for x, text in options.items())]),
                answer=(letter,),
                images=(Embedded(picture, f"the picture of {where}"),),
                category=get("category", str),
                fields={"cycle_category": cycle},
            )
        )
    return examples, "test"


def read_visualprobe(
    data: pathlib.Path, images: pathlib.Path | None = None, others: Folders = ()
) -> tuple[list[Example], str]:
    """Reads VisualProbe (`Mini-o3/VisualProbe_Easy`, `_Medium`, `_Hard`): `val.json`, a list: `problem`, `images`, `solution`.

    File names are relative to the folder in which the folder of the benchmark lies, as Mini-o3 reads them, or to that folder. It
    is a test set, although its file is called `val.json`. The category is the name of the folder.
    """
    path, examples = data / "val.json" if data.is_dir() else data, []
    folder = path.resolve().parent
    for number, (where, row) in enumerate(_json_list(path, read_json(path, error=BenchmarkError))):
        get = _fields(where, row)
        names = _texts(where, "images", get("images", list))
        if not names:
            raise BenchmarkError(f"{where} has no images")
        base = images or (folder.parent if (folder.parent / names[0]).exists() else folder)
        solution = row.get("solution")
        examples.append(
            Example(
                id=str(row.get("doc_id", number)),
                question=get("problem", str).replace("<image>", "").strip(),
                answer=_texts(
                    where, "solution", solution if isinstance(solution, list) else [get("solution", str | int)]
                ),
                images=tuple(_image(where, name, base, others) for name in names),
                category=folder.name,
            )
        )
    return [x._replace(answer=tuple(references_of(x.answer))) for x in examples], "test"


VIDEO_SUFFIXES = (".mp4", ".MP4", ".mkv")  # those that lmms-eval looks for
VIDEO_FOLDERS = ("data", "video", "videos")  # where the archives unpack to; lmms-eval and VLMEvalKit use the first two


def read_videomme(
    data: pathlib.Path, images: pathlib.Path | None = None, others: Folders = ()
) -> tuple[list[Example], str]:
    """Reads Video-MME (`lmms-lab/Video-MME`) without subtitles: `videomme/test-00000-of-00001.parquet`, and the unpacked videos.

    Options are written below the question as released ("A. ..."). The category is the length of the video: short, medium, long.
    """
    path = _only(data / "videomme" if (data / "videomme").is_dir() else data, "test-*.parquet")
    above = path.resolve().parent.parent if path.resolve().parent.name == "videomme" else path.resolve().parent
    folders = [images] if images is not None else [above / name for name in VIDEO_FOLDERS]
    examples = []
    for where, read_row in parquet_rows(path, None, BenchmarkError):
        row = read_row()
        get = _fields(where, row)
        options = _texts(where, "options", get("options", list))
        letter, name = get("answer", str).strip(), get("videoID", str)
        letters = [option.strip()[:1] for option in options]
        if "".join(letters) != LETTERS[: len(options)] or letter not in letters:
            raise BenchmarkError(f"{where}: the answer {brief(letter)} is none of the options {brief(list(options))}")
        candidates = [(folder, f"{name}{suffix}") for folder in folders for suffix in VIDEO_SUFFIXES]
        folder, file = next(((x, file) for x, file in candidates if (x / file).is_file()), candidates[0])
        examples.append(
            Example(
                id=get("question_id", str),
                question="\n".join([get("question", str), *options]),
                answer=(letter,),
                images=(_image(where, file, folder, others),),
                category=get("duration", str),
                video=True,
                seconds=USUAL_SECONDS,
                span=Span(None),
                fields={x: row[x] for x in ("domain", "sub_category", "task_type") if isinstance(row.get(x), str)},
            )
        )
    return examples, "test"


def _only(data: pathlib.Path, pattern: str) -> pathlib.Path:
    """The file, or the only one in the folder with a name of this pattern."""
    if not data.is_dir():
        return data
    found = sorted(data.glob(pattern))
    if len(found) != 1:
        raise BenchmarkError(f"{data} holds {len(found)} files {pattern}, not one: name the file")
    return found[0]


def read_prepared(
    data: pathlib.Path, images: pathlib.Path | None = None, others: Folders = ()
) -> tuple[list[Example], str]:
    """Reads the Parquet that Pixel Reasoner's authors prepared of the four: question, answer, image, is_video, qid.

    Their `images.zip` may lie in the folder of the images as it is. The category is the `qid` up to its first "-", as in the
    released evaluation.
    """
    try:
        examples = read_questions(data, ReadReport(str(data)), others, images)
    except (ExampleError, SourceError) as error:
        raise BenchmarkError(str(error)) from None
    relabelled = [
        x._replace(answer=tuple(references_of(x.answer)), category=x.id.partition("-")[0], seconds=USUAL_SECONDS)
        for x in examples
    ]
    return relabelled, "test"


def read_own(
    data: pathlib.Path,
    images: pathlib.Path | None = None,
    others: Folders = (),
    columns: Mapping[str, str] = {},  # noqa: B006, never changed
    language: Language = RELEASED_LANGUAGE,
    pictures: bool = True,
) -> tuple[list[Example], None]:
    """Reads data of the user's own (`pixel_jax.data.own`); its videos are shown as in training."""
    if images is not None:
        raise BenchmarkError("images of one's own lie where the JSON lines say: `images` is not needed")
    examples = own.read_own(data, image_folders=others, columns=columns, language=language, pictures=pictures)
    questions = [x._replace(answer=tuple(references_of(x.answer)), turns=()) for x in examples]
    return questions, None


READERS: Mapping[str, Read] = {
    "vstar": read_vstar,
    "tallyqa": read_tallyqa,
    "infovqa": read_infovqa,
    "mvbench": read_mvbench,
    "hrbench": read_hrbench,
    "visualprobe": read_visualprobe,
    "videomme": read_videomme,
    "prepared": read_prepared,
    "jsonl": read_own,
}


def read(
    kind: str,
    data: str | pathlib.Path,
    images: str | pathlib.Path | None = None,
    *,
    image_folders: Folders = (),
    columns: Mapping[str, str] = {},  # noqa: B006, never changed
    split: str | None = None,
    sample: int | None = None,
    seed: int = 0,
    language: Language = RELEASED_LANGUAGE,
    pictures: bool = True,
) -> tuple[list[Example], str]:
    """Reads the questions of a benchmark, in their order, and their split.

    Args:
      kind: a key of `READERS`.
      data: file or folder of the benchmark.
      images: folder of its images; None: beside the data.
      image_folders: other folders in which images may lie (`pixel_jax.data.sources.locate`).
      columns: names of our fields in data of the user's own.
      split: the split, where the files do not name it; by default a test set.
      sample: the number of questions to draw (the authors' TallyQA has 3,200 of 15,598); None: all.
      seed: the seed of the sample.
      language: the language of the calls in conversations of the user's own data.
      pictures: whether questions of the user's own need them; those for a language model may have none.

    Raises:
      BenchmarkError: the files are not there or not as expected, or name another split.
    """
    data, images = pathlib.Path(data), None if images is None else pathlib.Path(images)
    if not data.exists():
        raise BenchmarkError(f"there is no {data}")
    if columns and kind != "jsonl":
        raise BenchmarkError(f"columns are of data of one's own (the format 'jsonl'); {kind!r} has fields of its own")
    reader = READERS[kind]
    if kind == "jsonl":
        reader = functools.partial(read_own, columns=columns, language=language, pictures=pictures)
    questions, stated_split = reader(data, images, image_folders)
    if stated_split is not None and split is not None and stated_split != split:
        raise BenchmarkError(f"{data} is the split {stated_split!r}, the config says {split!r}")
    ids: set[str] = set()
    for question in questions:
        if question.id in ids:
            raise BenchmarkError(f"{data} has two questions of the id {brief(question.id)}")
        ids.add(question.id)
        if not question.answer:
            raise BenchmarkError(f"{data}: question {brief(question.id)} has no answer")
    if not questions:
        raise BenchmarkError(f"{data} has no questions")
    if sample is not None and sample < len(questions):
        chosen = np.random.default_rng(seed).choice(len(questions), sample, replace=False)
        questions = [questions[i] for i in sorted(chosen)]
    return questions, stated_split or split or "test"


def _image(where: str, name: str, folder: pathlib.Path, others: Folders, *, directory: bool = False) -> pathlib.Path:
    return locate(name, folder, others, directory=directory, error=lambda why: BenchmarkError(f"{where}: {why}"))


def _texts(where: str, name: str, values: Any) -> tuple[str, ...]:
    """Returns the texts and numbers of a list as texts."""
    if not isinstance(values, list) or not all(isinstance(x, str | int | float) for x in values):
        raise BenchmarkError(f"{where}: {name!r} is {brief(values)}, not a list of texts")
    return tuple(map(str, values))


def _json_list(path: pathlib.Path, rows: Any) -> Iterable[tuple[str, dict[str, Any]]]:
    if not isinstance(rows, list):
        raise BenchmarkError(f"{path} holds {type(rows).__name__}, not a list of questions")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise BenchmarkError(f"{path}, row {number} is {type(row).__name__}, not an object")
        yield f"{path}, row {number}", row


def _json_lines(path: pathlib.Path) -> Iterable[tuple[str, dict[str, Any]]]:
    for where, line in read_lines(path, error=BenchmarkError):
        row = parse_json(line, where, BenchmarkError)
        if not isinstance(row, dict):
            raise BenchmarkError(f"{where} is {type(row).__name__}, not an object")
        yield where, row


def _fields(where: str, row: Mapping[str, Any]) -> Callable[[str, Any], Any]:
    """Reads a field of `row` that has to be there and of the given type (or types)."""

    def get(name: str, kind: Any) -> Any:
        if name not in row:
            raise BenchmarkError(f"{where} has no field {name!r}; it has {brief(list(row))}")
        value = row[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise BenchmarkError(f"{where}: {name!r} is {brief(value)}, of the type {type(value).__name__}")
        return value

    return get
