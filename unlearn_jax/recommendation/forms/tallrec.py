"""The form of TALLRec (arXiv:2305.00447): will the user like this film? Yes or No, scored by the area under the curve.

The texts are those of its released data, in Alpaca's template. Unlike in its code, only the answer carries loss.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from unlearn_jax.metrics.recommendation import like_auc, tallrec_auc
from unlearn_jax.recommendation.forms.form import Speaker, Titles
from unlearn_jax.recommendation.ratings import Rated, Row

ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
INSTRUCTION = (
    "Given the user's preference and unpreference, identify whether the user will like the target movie by answering "
    '"Yes." or "No.".'
)
YES, NO = "Yes.", "No."


@dataclasses.dataclass(frozen=True)
class TALLRec:
    """The prompt form of TALLRec, see the module."""

    metrics: tuple[str, ...] = ("auc", "auc_tallrec")

    def prompt(self, row: Row, titles: Titles) -> str:
        """See `PromptForm.prompt`."""
        titles_of = lambda liked: ", ".join(f'"{titles[x.item]}"' for x in row.history if x.liked == liked)
        asked = (
            f"User Preference: {titles_of(True)}\nUser Unpreference: {titles_of(False)}\n"
            f'Whether the user will like the target movie "{titles[row.target.item]}"?'
        )
        return ALPACA.format(instruction=INSTRUCTION, input=asked)

    def answer(self, row: Row, titles: Titles) -> str:
        """See `PromptForm.answer`."""
        return YES if row.target.liked else NO

    def wrong(self, row: Row, random: np.random.Generator) -> Row:
        """See `PromptForm.wrong`: Yes becomes No, and No becomes Yes."""
        return row._replace(target=Rated(row.target.item, 1.0 if row.target.liked else 5.0))

    def score(self, speaker: Speaker, rows: Sequence[Row], titles: Titles) -> dict[str, float]:
        """Area under the curve of Yes against No, and as TALLRec computes it; the standard error is Hanley and McNeil's."""
        logits, liked = speaker.first_logits(), np.array([row.target.liked for row in rows])
        tokens = {"no": speaker.token(NO), "yes": speaker.token(YES)}
        area = like_auc(logits, liked, **tokens)
        error = area_error(area, int(liked.sum()), int((~liked).sum()))
        return {"auc": area, "auc_tallrec": tallrec_auc(logits, liked, **tokens), "auc_error": error}


def area_error(area: float, positive: int, negative: int) -> float:
    """Standard error of an area under the curve (Hanley and McNeil 1982)."""
    first, second = area / (2 - area), 2 * area**2 / (1 + area)
    spread = (positive - 1) * (first - area**2) + (negative - 1) * (second - area**2)
    return float(np.sqrt((area * (1 - area) + spread) / (positive * negative)))
