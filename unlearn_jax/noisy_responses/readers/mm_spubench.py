"""MM-SpuBench (arXiv:2406.17126; Hugging Face `mmbench/MM-SpuBench`): spurious cues in photographs, 2,400 questions.

The data card shows the files: `annotation.json` beside `data/images/000000.jpg` to `002399.jpg`. A public loader prints a row of
`annotation.json` (`core_attributes`, `spurious_attributes` and `spurious_correlation_type`: lists of texts; `question`;
`choices`: texts like "A. The branding on it"; `answer`: a letter) and pairs rows with pictures in the order of both.

Not verified: whether a row has other fields, such as the picture's name, so that the order is what counts; whether all pictures
end in .jpg (the loader prints a PNG), so that any ending is read; whether every question has four choices, so that 2 to 8 are
read.
"""

import pathlib
import re

from pixel_jax.data.example import Example, ExampleError, ReadReport
from pixel_jax.files import read_json
from pixel_jax.terminal import brief
from unlearn_jax.noisy_responses.questions import LETTERS, ChoiceQuestion, with_options
from unlearn_jax.noisy_responses.readers.rows import FileRow, rows_of

FILE, PICTURES = "annotation.json", pathlib.PurePath("data/images")
LIMIT = 2**28  # bytes of the annotations, which have 1.5 MB
OPTION = re.compile(r"\s*\(?([A-H])[.:)]\s*(\S.*)", re.DOTALL)


def read_mm_spubench(directory: pathlib.Path, report: ReadReport) -> list[ChoiceQuestion]:
    """Reads the questions; their category is the type of their spurious correlation ("Shape + Background").

    Raises:
        ExampleError: a file is missing, or (without `report.drop`) a row or its picture cannot be used. It names file, row and
            value.
    """
    path = directory / FILE
    pictures = {x.stem: x for x in sorted((directory / PICTURES).glob("*.*"))}
    questions: list[ChoiceQuestion] = []
    for number, row in enumerate(rows_of(path, read_json(path, limit=LIMIT, error=ExampleError))):
        row.read_into(questions, report, lambda row=row, number=number: _question(row, number, pictures, directory))
    return questions


def _question(row: FileRow, number: int, pictures: dict[str, pathlib.Path], directory: pathlib.Path) -> ChoiceQuestion:
    options, letters = row.texts("choices"), LETTERS
    if not 2 <= len(options) <= len(letters):
        raise row.error(f"'choices' has {len(options)} texts, not 2 to {len(letters)}")
    said = []
    for letter, option in zip(letters, options, strict=False):
        found = OPTION.fullmatch(option)
        if found is not None and found[1] != letter:
            raise row.error(f"the choice {brief(option)} stands in the place of {letter}")
        said.append(option.strip() if found is None else found[2].strip())
    choices = tuple(letters[: len(options)])
    answer = row.text("answer").strip().strip("().:").upper()
    if answer not in choices:
        raise row.error(f"'answer' is {brief(row.text('answer'))}, not one of {', '.join(choices)}")
    name = f"{number:06d}"
    if name not in pictures:
        raise row.error(f"there is no picture {str(directory / PICTURES / name)!r}.jpg")
    kinds = " + ".join(row.texts("spurious_correlation_type"))
    question = with_options(row.text("question").strip(), said)
    example = Example(name, question, (pictures[name],), (answer,), category=kinds)
    return ChoiceQuestion(example, choices, name)
