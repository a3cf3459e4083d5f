"""Scores of language models as recommenders.

Those of TALLRec (arXiv:2305.00447) as its released code computes them, those of LLaRA (arXiv:2312.02445), and the probability
of Yes against No without TALLRec's detour.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unlearn_jax.metrics.membership import auc


def like_probability(logits: np.ndarray, *, no: int, yes: int) -> np.ndarray:
    """Probability of Yes against No at the answer's position.

    Args:
        logits: [n, V].
        no: token of "No".
        yes: token of "Yes".

    Returns:
        [n].
    """
    logits = np.asarray(logits, np.float64)
    return 1 / (1 + np.exp(logits[:, no] - logits[:, yes]))


def like_auc(logits: np.ndarray, liked: np.ndarray, *, no: int, yes: int) -> float:
    """Area under the curve of `like_probability`; `liked` bool [n] are the labels."""
    return _area(like_probability(logits, no=no, yes=yes), liked)


def tallrec_probability(logits: np.ndarray, *, no: int, yes: int) -> np.ndarray:
    """TALLRec's score (`evaluate.py`, `finetune_rec.py`): two softmaxes, one upon the other.

    The first is over the vocabulary, the second over the probabilities of No and Yes that the first gives. The score is not a
    monotone function of `like_probability`: where the model would say something else, both are near zero and the score is .5.

    Args:
        logits: [n, V], at the answer's position.
        no: token of "No".
        yes: token of "Yes".

    Returns:
        [n].
    """
    logits = np.asarray(logits, np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return 1 / (1 + np.exp(p[:, no] - p[:, yes]))


def tallrec_auc(logits: np.ndarray, liked: np.ndarray, *, no: int, yes: int) -> float:
    """Area under the curve of `tallrec_probability`; `liked` bool [n] are the labels.

    TALLRec, and papers that use its code, report this AUC.
    """
    return _area(tallrec_probability(logits, no=no, yes=yes), liked)


def _area(scores: np.ndarray, liked: np.ndarray) -> float:
    liked = np.asarray(liked, bool)
    return auc(scores[~liked], scores[liked])


class Hits(NamedTuple):
    """The ratios of valid and correct generations; one is valid if it contains exactly one candidate's title."""

    valid_ratio: float  # valid / total
    hit_ratio: float  # correct / valid, what LLaRA's code prints; zero if none is valid
    hit_ratio_of_all: float  # correct / total, what its page reports: the product of the two above
    valid: np.ndarray  # bool [n]
    correct: np.ndarray  # bool [n]


def hit_ratio(generated: Sequence[str], candidates: Sequence[Sequence[str]], targets: Sequence[str]) -> Hits:
    """Hit ratio at one, from the first line of each generation, its candidates' titles, and the right title.

    Case is ignored. If one candidate's title is part of another's, a generation with the latter contains two titles and is
    invalid, as in LLaRA.
    """
    if not len(generated) == len(candidates) == len(targets) > 0:
        raise ValueError(f"got {len(generated)} generations, {len(candidates)} candidate lists, {len(targets)} targets")
    valid, correct = [], []
    for text, titles, target in zip(generated, candidates, targets, strict=True):
        line = text.strip().split("\n")[0].lower()
        contained = [title for title in (t.strip().lower() for t in titles) if title in line]
        valid.append(len(contained) == 1)
        correct.append(contained == [target.strip().lower()])
    valid, correct = np.array(valid), np.array(correct)
    of_valid = correct.sum() / valid.sum() if valid.any() else 0.0
    return Hits(float(valid.mean()), float(of_valid), float(correct.mean()), valid, correct)
