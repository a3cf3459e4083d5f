"""The rows of a released JSON file, whose values are read with errors that name file, row and value."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from pixel_jax.data.example import ExampleError, ReadReport
from pixel_jax.data.images import ImageError
from pixel_jax.data.sources import SourceError, frame_sizes
from pixel_jax.terminal import brief
from unlearn_jax.noisy_responses.questions import ChoiceQuestion


class FileRow(NamedTuple):
    """A row of a list in a file."""

    where: str  # the file and the number of the row, from 1
    values: Any

    def error(self, what: str) -> ExampleError:
        """An error about the row."""
        return ExampleError(f"{self.where}: {what}")

    def value(self, name: str, kind: Any, words: str) -> Any:
        """A value of the row, which must be of the type `kind`; `words` name it."""
        if not isinstance(self.values, dict):
            raise self.error(f"it is {brief(self.values)}, not an object")
        if name not in self.values:
            raise self.error(f"it has no {name!r}; it has {brief(list(self.values))}")
        value = self.values[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.error(f"{name!r} is {brief(value)}, not {words}")
        return value

    def text(self, name: str) -> str:
        """A text of the row that is not empty."""
        value = self.value(name, str, "a text")
        if not value.strip():
            raise self.error(f"{name!r} is empty")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of texts of the row."""
        values = self.value(name, list, "a list of texts")
        if not values or not all(isinstance(x, str) and x.strip() for x in values):
            raise self.error(f"{name!r} is {brief(values)}, not a list of texts")
        return values

    def box(self, name: str) -> tuple[float, ...]:
        """Four shares of a picture, left, top, right and bottom."""
        values = self.value(name, list, "a box")
        numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in values)
        if len(values) != 4 or not numbers or not all(0 <= values[i] < values[i + 2] <= 1 for i in (0, 1)):
            raise self.error(f"{name!r} is {brief(values)}, not left, top, right and bottom as shares of the picture")
        return tuple(map(float, values))

    def read_into(
        self, questions: list[ChoiceQuestion], report: ReadReport, make: Callable[[], ChoiceQuestion]
    ) -> None:
        """Appends the question that `make` makes of the row if its picture can be opened; `report` decides about errors."""

        def checked() -> Any:
            question = make()
            try:
                frame_sizes(question.example.images, video=False)
            except (SourceError, ImageError) as error:
                raise self.error(str(error)) from None
            return question

        report.take(questions, checked)


def rows_of(path: pathlib.Path, values: Any) -> list[FileRow]:
    """The rows of a file's list; ExampleError if it holds none."""
    if not isinstance(values, list) or not values:
        raise ExampleError(f"{path} holds {brief(values)}, not a list of questions")
    return [FileRow(f"{path}, row {number}", value) for number, value in enumerate(values, 1)]
