"""R-Bench (ICML 2024, arXiv:2406.16449; github.com/mrwu-mac/R-Bench): relations between objects, yes or no.

The authors' repository shows the files (`README.md`) and their fields (`eval.py`, `utils.py`, `demos/eval_rbench.py`):
`image-level_filterd.json` and `instance-level_filterd.json` are arrays of objects with `question_id`, `image` (a file of Open
Images' validation set), `text` and `label`; a label with "no" in it is No. Rows of the second file also have `subject`,
`object`, `sub_box` and `obj_box` (left, top, right, bottom, as shares of the picture); the authors draw the boxes in red and
green, and name their colours in the question. `nocaps_image-level_rel_ids_1.json` to `5` and `instance-level_ids_1.json` to `5`
are arrays of ids. Loaders of others read `qtype` ("positive", "opposite", "random"), and labels like "Yes." and "No (...)".

Not verified: whether `question_id` is always a whole number, and which labels begin with neither word: such a row is refused,
where the authors' code counts it as Yes. Masks (`instance_mask`) are not read.
"""

import pathlib
import re
from collections.abc import Sequence

from pixel_jax.data.example import Example, ExampleError, ReadReport
from pixel_jax.data.sources import locate
from pixel_jax.files import read_json
from pixel_jax.terminal import brief
from unlearn_jax.noisy_responses.questions import WORD, ChoiceQuestion
from unlearn_jax.noisy_responses.readers.rows import FileRow, rows_of

CHOICES = ("Yes", "No")
LIMIT = 2**28  # bytes of a file
LABEL = re.compile(r"\s*(yes|no)\b", re.IGNORECASE)


def read_r_bench(
    path: pathlib.Path,
    report: ReadReport,
    *,
    images: pathlib.Path | None = None,
    image_folders: Sequence[str] = (),
    subset: pathlib.Path | None = None,
) -> list[ChoiceQuestion]:
    """Reads the questions of a file; a row with boxes is asked as the authors ask it, with both boxes drawn.

    Args:
        path: `image-level_filterd.json` or `instance-level_filterd.json`.
        report: what happens to rows that cannot be used.
        images: folder of the pictures; None: `images` beside the file.
        image_folders: other folders in which pictures may lie.
        subset: a file of ids, of the questions to read; None: all.

    Raises:
        ExampleError: a file is missing or of another form; an id occurs twice, or `subset` names one that is not there; or
            (without `report.drop`) a row or its picture cannot be used. It names file, row and value.
    """
    folder = path.parent / "images" if images is None else images
    wanted = None if subset is None else _ids(subset)
    questions: list[ChoiceQuestion] = []
    seen: set[str] = set()
    for row in rows_of(path, read_json(path, limit=LIMIT, error=ExampleError)):
        name = str(row.value("question_id", int | str, "a number"))
        if name in seen:
            raise row.error(f"'question_id' {brief(name)} occurs twice")
        seen.add(name)
        if wanted is None or name in wanted:
            row.read_into(questions, report, lambda row=row, name=name: _question(row, name, folder, image_folders))
    if wanted is not None and (missing := wanted - seen):
        raise ExampleError(f"{subset}: the question {brief(min(missing))} is not in {path}")
    return questions


def _ids(path: pathlib.Path) -> set[str]:
    values = read_json(path, limit=LIMIT, error=ExampleError)
    if not isinstance(values, list) or not all(isinstance(x, int | str) and not isinstance(x, bool) for x in values):
        raise ExampleError(f"{path} holds {brief(values)}, not a list of ids")
    return set(map(str, values))


def _question(row: FileRow, name: str, folder: pathlib.Path, others: Sequence[str]) -> ChoiceQuestion:
    label = LABEL.match(row.text("label"))
    if label is None:
        raise row.error(f"'label' is {brief(row.text('label'))}, which begins with neither Yes nor No")
    picture, text = row.text("image"), row.text("text").strip()
    source = locate(picture, folder, others, error=lambda why: row.error(why))
    boxes = {}
    if "sub_box" in row.values:
        boxes = {colour: row.box(field) for colour, field in (("red", "sub_box"), ("green", "obj_box"))}
        for colour, field in (("red", "subject"), ("green", "object")):
            noun = row.text(field).lower()
            text = text.replace(noun, f"{noun} in {colour} bounding box")
    kind = row.text("qtype") if "qtype" in row.values else ""
    example = Example(name, f"{text}\n{WORD}", (source,), (label[1].capitalize(),), category=kind)
    return ChoiceQuestion(example, CHOICES, picture, boxes)
