"""What was wrong with some of the training rows, by the name of the edit that is to undo it.

A removal has nothing wrong: the rows are to be forgotten. The others were trained on in the wrong form, as in LLMEraser's
released code, and are to be as they had been.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pixel_jax.config import ConfigError
from unlearn_jax.recommendation.forms import PromptForm
from unlearn_jax.recommendation.ratings import SHORTEST, Rated, Ratings, Row

REMOVE = "remove"


class Corruption:
    """How rows are spoilt: `spoil(row)` is the row that was trained on, None where such a row cannot be spoilt."""

    def __init__(self, ratings: Ratings, form: PromptForm, history: int, random: np.random.Generator):
        self.ratings, self.form, self.history, self.random = ratings, form, history, random

    def remove(self, row: Row) -> Row | None:
        """The row itself."""
        return row

    def query_removal(self, row: Row) -> Row | None:
        """Without the last film of the history; rows of the shortest history are left as they are."""
        return row._replace(history=row.history[:-1]) if len(row.history) > SHORTEST else None

    def query_replacement(self, row: Row) -> Row | None:
        """With a film that the user has not rated behind the history, in place of the last one where that is full."""
        seen = [x.item for x in self.ratings.users[row.user]]
        unseen = np.setdiff1d(np.array(sorted(self.ratings.titles)), [*seen, *row.candidates])
        kept = row.history[: self.history - 1]
        return row._replace(history=(*kept, Rated(str(self.random.choice(unseen)), row.history[-1].rating)))

    def response(self, row: Row) -> Row | None:
        """With another answer."""
        return self.form.wrong(row, self.random)


EDITS: Mapping[str, Callable[[Corruption, Row], Row | None]] = {
    REMOVE: Corruption.remove,
    "query_removal": Corruption.query_removal,
    "query_replacement": Corruption.query_replacement,
    "response": Corruption.response,
}


def corrupt(
    edit: str, rows: Sequence[Row], share: float, ratings: Ratings, form: PromptForm, *, history: int, seed: int
) -> tuple[list[Row], np.ndarray]:
    """(the rows that were trained on, positions of those that the edit is about), `share` of all rows, drawn by the seed.

    Raises:
        ConfigError: too few rows can be spoilt in this way.
    """
    random = np.random.default_rng((seed, 2))
    corruption, spoilt = Corruption(ratings, form, history, random), list(rows)
    chosen, count = [], max(1, round(share * len(rows)))
    for i in random.permutation(len(rows)):
        if len(chosen) < count and (found := EDITS[edit](corruption, rows[i])) is not None:
            spoilt[i] = found
            chosen.append(int(i))
    if len(chosen) < count:
        raise ConfigError(f"{edit}: only {len(chosen)} of {len(rows)} rows can be spoilt, {count} were asked for")
    return spoilt, np.array(sorted(chosen))
