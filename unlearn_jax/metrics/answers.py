"""Probability of an answer, and the share of it that a model reproduces, from the log-probabilities of its tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from unlearn_jax.arrays import HostArray

TINY = 1e-10  # added to denominators, as in the released evaluation of TOFU


def mean_nll(logprob: HostArray, mask: HostArray) -> HostArray:
    """Mean negative log-likelihood of each answer: the sum over its tokens, the end token among them, by their number.

    Args:
        logprob: [..., T], log-probabilities of the target tokens.
        mask: [..., T], which of them count.

    Returns:
        [...].

    Raises:
        ValueError: a row has no target tokens.
    """
    mask = np.asarray(mask) != 0
    count = mask.sum(-1)
    if not count.all():
        raise ValueError(f"rows without target tokens: {np.argwhere(count == 0).tolist()}")
    return -np.where(mask, logprob, 0.0).sum(-1) / count


def truth_ratio(correct: HostArray, wrong: HostArray) -> HostArray:
    """P(wrong) / P(correct) of each question, small where the model knows the answer (TOFU: Maini et al. 2024, arXiv:2401.06121).

    There are two definitions. This one is that of open-unlearning and of TOFU's `aggregate_eval_stat.py`, by which the
    published tables were made: geometric means, exp(-mean nll), also over the wrong answers. The paper's formula takes the
    arithmetic mean of these, which is never smaller.

    Args:
        correct: `mean_nll` [n] of the paraphrased answers.
        wrong: [n, choices], of wrong answers.

    Returns:
        [n].
    """
    return np.exp(-np.asarray(wrong, float).mean(-1)) / (np.exp(-np.asarray(correct, float)) + TINY)


def normalized_probability(correct: HostArray, wrong: HostArray) -> HostArray:
    """Probability of the correct answer, normalised over the given answers of a multiple-choice question (TOFU).

    Args:
        correct: `mean_nll` [n] of the correct answers.
        wrong: [n, choices], of wrong answers.

    Returns:
        [n].
    """
    p = np.exp(-np.asarray(correct, float))
    return p / (p + np.exp(-np.asarray(wrong, float)).sum(-1) + TINY)


def knowledge(ratios: HostArray) -> float:
    """Mean of max(0, 1 - truth ratio) over n questions that the model should know, as in TOFU's utility."""
    return float(np.maximum(0.0, 1.0 - np.asarray(ratios, float)).mean())


def model_utility(scores: Sequence[float]) -> float:
    """Harmonic mean of scores in [0, 1] (TOFU: probability, ROUGE-L recall and `knowledge` on three sets); 0 if one is 0."""
    values = np.asarray(scores, float)
    if not values.size or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"scores lie between 0 and 1: {values.tolist()}")
    return float(values.size / (1 / values).sum()) if values.all() else 0.0


def forget_quality(unlearned: HostArray, retrained: HostArray) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test between truth ratios [n] of the unlearned and the retrained model.

    It is 1 if they are the same; for two disjoint sets of n ratios each it is 2 / C(2n, n), 1.86e-23 for n = 40.
    """
    from scipy.stats import ks_2samp

    test: Any = ks_2samp(1 / (np.asarray(unlearned, float) + TINY), 1 / (np.asarray(retrained, float) + TINY))
    return float(test.pvalue)


def exact_memorization(correct: HostArray, mask: HostArray) -> HostArray:
    """Fraction of tokens that are the most likely ones, teacher-forced.

    Args:
        correct: bool [n, T], as in `TokenStatistics`.
        mask: [n, T], without the end token (`tokens.without_last`), as open-unlearning does.

    Returns:
        [n]; NaN for a row without tokens.
    """
    mask = np.asarray(mask) != 0
    count = mask.sum(-1)
    memorized = (np.asarray(correct, bool) & mask).sum(-1)
    return np.where(count > 0, memorized / np.maximum(count, 1), np.nan)


def extraction_strength(correct: HostArray, mask: HostArray) -> HostArray:
    """1 - k/N, where k is the shortest prefix after which greedy decoding gives the rest of the N tokens.

    As in the released code a last token that is wrong counts as k = N - 1, so the least value is 1/N.

    Args:
        correct: bool [n, T], as in `TokenStatistics`.
        mask: [n, T], without the end token (`tokens.without_last`), as open-unlearning does.

    Returns:
        [n]; zero for a row without tokens.
    """
    strengths = []
    for row, keep in zip(np.asarray(correct, bool), np.asarray(mask) != 0, strict=True):
        tokens = row[keep]
        wrong = np.flatnonzero(~tokens)
        suffix = tokens.size - (wrong[-1] + 1 if wrong.size else 0)
        strengths.append(max(suffix, 1) / tokens.size if tokens.size else 0.0)
    return np.array(strengths)
