"""Corruptions of training rows, by the name of the edit that is to undo them.

Rows to be removed are not changed. Rows of the other edits are trained on in a wrong form, as in LLMEraser's released code, and
the edit is to restore the right one.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pixel_jax.config import ConfigError
from unlearn_jax.recommendation.forms import PromptForm
from unlearn_jax.recommendation.ratings import SHORTEST, Rated, Ratings, Row
from unlearn_jax.studies.study import REMOVE, RESPONSE


class Corruption:
    """The corruptions of a study. Each method returns the row that is trained on, or None if the row cannot be corrupted."""

    def __init__(self, ratings: Ratings, form: PromptForm, history: int, random: np.random.Generator):
        self.ratings, self.form, self.history, self.random = ratings, form, history, random

    def remove(self, row: Row) -> Row | None:
        """Returns the row itself, which is to be removed."""
        return row

    def query_removal(self, row: Row) -> Row | None:
        """Removes the last film of the history; None for a history of the least length."""
        return row._replace(history=row.history[:-1]) if len(row.history) > SHORTEST else None

    def query_replacement(self, row: Row) -> Row | None:
        """Appends a film that the user has not rated to the history, in place of the last film if the history is full."""
        rated = [x.item for x in self.ratings.users[row.user]]
        unseen = np.setdiff1d(np.array(sorted(self.ratings.titles)), [*rated, *row.candidates])
        earlier = row.history[: self.history - 1]
        return row._replace(history=(*earlier, Rated(str(self.random.choice(unseen)), row.history[-1].rating)))

    def response(self, row: Row) -> Row | None:
        """Replaces the answer by another one."""
        return self.form.wrong(row, self.random)


EDITS: Mapping[str, Callable[[Corruption, Row], Row | None]] = {
    REMOVE: Corruption.remove,
    "query_removal": Corruption.query_removal,
    "query_replacement": Corruption.query_replacement,
    RESPONSE: Corruption.response,
}


def corrupt(
    edit: str, rows: Sequence[Row], share: float, ratings: Ratings, form: PromptForm, *, history: int, seed: int
) -> tuple[list[Row], np.ndarray]:
    """Corrupts a share of the rows, drawn at random.

    Returns:
        The rows to train on, and the positions of those that the edit is about, int [k].

    Raises:
        ConfigError: too few rows can be corrupted in this way.
    """
    random = np.random.default_rng((seed, 2))
    corruption, corrupted = Corruption(ratings, form, history, random), list(rows)
    touched, count = [], max(1, round(share * len(rows)))
    for i in random.permutation(len(rows)):
        if len(touched) < count and (row := EDITS[edit](corruption, rows[i])) is not None:
            corrupted[i] = row
            touched.append(int(i))
    if len(touched) < count:
        raise ConfigError(f"{edit}: only {len(touched)} of {len(rows)} rows can be corrupted, {count} were asked for")
    return corrupted, np.array(sorted(touched))
