"""The protocol of a prompt form, and the one by which a form asks a model about test rows."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from unlearn_jax.recommendation.ratings import Row

Titles = Mapping[str, str]


class Speaker(Protocol):
    """A model that has read the questions of n test rows."""

    def token(self, text: str) -> int:
        """The first token id of an answer `text`."""
        ...

    def first_logits(self) -> np.ndarray:
        """Logits of the first token of each answer, [n, vocabulary]."""
        ...

    def answers(self) -> list[str]:
        """The greedy answer to each question: its first line, at most `config.data.answer` tokens."""
        ...


class PromptForm(Protocol):
    """The form in which a row is asked and answered. It has no state."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the scores, the most important first."""
        ...

    def prompt(self, row: Row, titles: Titles) -> str:
        """The question."""
        ...

    def answer(self, row: Row, titles: Titles) -> str:
        """The right answer."""
        ...

    def wrong(self, row: Row, random: np.random.Generator) -> Row:
        """The row with another answer and the same question."""
        ...

    def score(self, speaker: Speaker, rows: Sequence[Row], titles: Titles) -> dict[str, float]:
        """Scores a model on test rows, given in the order in which it has read them; names in `_error` are standard errors."""
        ...
