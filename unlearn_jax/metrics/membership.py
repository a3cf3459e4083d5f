"""Membership inference: how well an attacker can tell unlearned examples from examples that were never seen.

Scores are higher the less an example looks like a member. `auc` takes forgotten examples as class 0 and holdout ones as class 1:
1 means that all forgotten examples look like members (nothing was unlearned), 1/2 that the two cannot be told apart.
"""

import zlib
from collections.abc import Sequence

import numpy as np

from unlearn_jax.arrays import HostArray
from unlearn_jax.metrics.answers import TINY


def min_k(logprob: HostArray, mask: HostArray, *, k: float = 0.4) -> HostArray:
    """Minus the mean of the lowest share k of the tokens' log-probabilities, at least one (Shi et al. 2024).

    Args:
        logprob: [n, T], of the target tokens.
        mask: [n, T], without the end token (`tokens.without_last`).
        k: share, in (0, 1].

    Returns:
        [n], higher for an example that looks less like a member.

    Raises:
        ValueError: k is no share, or a row has no tokens.
    """
    if not 0 < k <= 1:
        raise ValueError(f"k is a share of the tokens, in (0, 1], got {k}")
    means = []
    for number, (row, keep) in enumerate(zip(np.asarray(logprob), np.asarray(mask) != 0, strict=True)):
        tokens = np.sort(row[keep])
        if not tokens.size:
            raise ValueError(f"row {number} has no target tokens besides its last: leave the example out")
        means.append(-tokens[: max(1, int(tokens.size * k))].mean())
    return np.array(means)


def zlib_ratio(nll: HostArray, texts: Sequence[str]) -> HostArray:
    """Mean negative log-likelihood by the length of the compressed text (Carlini et al. 2021).

    Args:
        nll: `answers.mean_nll` [n].
        texts: [n], the target texts.

    Returns:
        [n], higher for an example that looks less like a member.
    """
    sizes = np.array([len(zlib.compress(text.encode())) for text in texts], float)
    return np.asarray(nll, float) / sizes


def auc(forget: HostArray, holdout: HostArray) -> float:
    """P(holdout score > forget score), ties counting half: the area under the curve with holdout as the positive class.

    Args:
        forget: scores of any shape.
        holdout: scores of any shape.

    Raises:
        ValueError: a class is empty, or a score is not a number.
    """
    from scipy.stats import rankdata

    forget, holdout = np.ravel(forget), np.ravel(holdout)
    if not forget.size or not holdout.size:
        raise ValueError(f"both classes need examples, got {forget.size} forgotten and {holdout.size} holdout")
    scores = np.concatenate([forget, holdout]).astype(float)
    if np.isnan(scores).any():
        raise ValueError(f"scores {np.flatnonzero(np.isnan(scores)).tolist()} (forgotten first) are not numbers")
    ranks = rankdata(scores)[forget.size :]
    return float((ranks.sum() - holdout.size * (holdout.size + 1) / 2) / (forget.size * holdout.size))


def privleak(unlearned: float, retrained: float = 0.5) -> float:
    """Difference in per cent between two AUCs of min-40 % scores: 0 is ideal, negative under-, positive over-unlearned.

    Both arguments are results of `auc`; MUSE prints 1 - AUC (retrained: .4772 on News, .5393 on Books).
    """
    return 100 * ((1 - unlearned) - (1 - retrained)) / ((1 - retrained) + TINY)
