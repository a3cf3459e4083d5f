"""What a form of a question is."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from unlearn_jax.recommendation.ratings import Row
from unlearn_jax.recommendation.speaker import Speaker

Titles = Mapping[str, str]


class PromptForm(Protocol):
    """How a row is asked and answered. Values of it have no state."""

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
        """The scores of a model on test rows, in the order in which it has read them; with `_error`, standard errors."""
        ...
