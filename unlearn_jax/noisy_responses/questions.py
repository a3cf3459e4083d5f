"""Questions about a picture with a few possible answers."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from pixel_jax.config import ConfigError
from pixel_jax.data.example import Example
from pixel_jax.data.sources import load_frames

LETTERS = "ABCDEFGH"
# How LLaVA-1.5 is asked for a letter, and for a word (its evaluation of ScienceQA and of POPE).
LETTER = "Answer with the option's letter from the given choices directly."
WORD = "Answer the question using a single word or phrase."
LINE = 4  # pixels of a box's outline
Box = tuple[float, ...]  # left, top, right, bottom, as shares of a picture


class ChoiceQuestion(NamedTuple):
    """A question about a picture, and the answers among which a model chooses."""

    example: Example  # its question names the options; its answer is one of `choices`
    choices: tuple[str, ...]
    picture: str  # questions about a picture of the same name are all trained on or all held out
    boxes: Mapping[str, Box] = {}  # drawn on the picture, by their colour

    @property
    def name(self) -> str:
        """The question's id."""
        return self.example.id

    @property
    def answer(self) -> str:
        """The answer."""
        return self.example.answer[0]

    def pixels(self) -> np.ndarray:
        """The picture as the model is shown it, uint8 [h, w, 3]."""
        (image,), _ = load_frames(self.example.images, video=False)
        if not self.boxes:
            return image
        drawn = Image.fromarray(image)
        pen, sides = ImageDraw.Draw(drawn), (drawn.width, drawn.height) * 2
        for colour, box in self.boxes.items():
            pen.rectangle([x * side for x, side in zip(box, sides, strict=True)], outline=colour, width=LINE)
        return np.array(drawn)

    def answered(self, answer: str) -> "ChoiceQuestion":
        """The question with another answer."""
        return self._replace(example=self.example._replace(answer=(answer,)))

    def wrong(self, random: np.random.Generator) -> "ChoiceQuestion":
        """The question with one of its wrong answers."""
        others = [x for x in self.choices if x != self.answer]
        return self.answered(others[random.integers(len(others))])


def with_options(question: str, options: Sequence[str]) -> str:
    """The text of a question whose options have letters."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, LETTER])


def split_pictures(
    questions: Sequence[ChoiceQuestion], share: float, seed: int
) -> tuple[list[ChoiceQuestion], list[ChoiceQuestion]]:
    """Splits questions by their pictures, drawn at random, into those to train on and those to test on.

    Args:
        questions: in any order, which both parts keep.
        share: of the pictures, to test on.
        seed: of the draw.

    Raises:
        ConfigError: there are less than two pictures.
    """
    pictures = sorted({x.picture for x in questions})
    if len(pictures) < 2:
        raise ConfigError(f"the data have {len(pictures)} picture: none is left to hold out")
    order = np.random.default_rng(seed).permutation(len(pictures))
    count = min(max(1, round(share * len(pictures))), len(pictures) - 1)
    held = {pictures[i] for i in order[:count]}
    return [x for x in questions if x.picture not in held], [x for x in questions if x.picture in held]


def draw(questions: Sequence[ChoiceQuestion], count: int, seed: int, what: str) -> list[ChoiceQuestion]:
    """Draws questions without replacement; ConfigError if there are too few. `what` is the setting of their number."""
    if count > len(questions):
        raise ConfigError(f"{what} is {count}, the data have {len(questions)} such questions")
    return [questions[i] for i in np.random.default_rng((seed, 1)).permutation(len(questions))[:count]]
