"""The form of LLaRA (arXiv:2312.02445) in words: which of 20 films comes next? Scored by the title in the model's answer.

The text is the first of its three prompts, without the placeholders for embeddings. It names the right number of titles (the
released one says 10 and shows 20).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from unlearn_jax.metrics.recommendation import hit_ratio
from unlearn_jax.recommendation.forms.form import Speaker, Titles
from unlearn_jax.recommendation.ratings import Rated, Row

PROMPT = (
    "This user has watched {history} in the previous. Please predict the next movie this user will watch. "
    "Choose the answer from the following {count} movie titles: {candidates}. Answer: "
)


@dataclasses.dataclass(frozen=True)
class LLaRA:
    """The prompt form of LLaRA, see the module."""

    metrics: tuple[str, ...] = ("hit_ratio", "hit_ratio_of_all", "valid_ratio")

    def prompt(self, row: Row, titles: Titles) -> str:
        """See `PromptForm.prompt`."""
        history = ", ".join(titles[x.item] for x in row.history)
        shown = ", ".join(titles[x] for x in row.candidates)
        return PROMPT.format(history=history, count=len(row.candidates), candidates=shown)

    def answer(self, row: Row, titles: Titles) -> str:
        """See `PromptForm.answer`."""
        return titles[row.target.item] + "\n"

    def wrong(self, row: Row, random: np.random.Generator) -> Row:
        """See `PromptForm.wrong`: another candidate, which the user has not rated."""
        candidates = [x for x in row.candidates if x != row.target.item]
        return row._replace(target=Rated(candidates[random.integers(len(candidates))], row.target.rating))

    def score(self, speaker: Speaker, rows: Sequence[Row], titles: Titles) -> dict[str, float]:
        """Hit ratio over valid answers (as LLaRA's code counts) and over all, and the share of valid ones; binomial errors."""
        shown = [[titles[x] for x in row.candidates] for row in rows]
        hits = hit_ratio(speaker.answers(), shown, [titles[row.target.item] for row in rows])
        valid = int(hits.valid.sum())
        return {
            "hit_ratio": hits.hit_ratio,
            "hit_ratio_of_all": hits.hit_ratio_of_all,
            "valid_ratio": hits.valid_ratio,
            "hit_ratio_error": share_error(hits.hit_ratio, valid),
            "hit_ratio_of_all_error": share_error(hits.hit_ratio_of_all, len(rows)),
            "valid_ratio_error": share_error(hits.valid_ratio, len(rows)),
        }


def share_error(share: float, count: int) -> float:
    """Binomial standard error of a share of `count`."""
    return float(np.sqrt(share * (1 - share) / count)) if count else float("nan")
