"""The protocol of a prompt form."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from unlearn_jax.recommendation.ratings import Row
from unlearn_jax.recommendation.speaker import Speaker

Titles = Mapping[str, str]


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
