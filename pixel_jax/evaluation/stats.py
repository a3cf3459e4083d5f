"""Confidence intervals, and paired tests of two runs."""

from collections.abc import Sequence

import numpy as np


def proportion(hits: Sequence[bool] | np.ndarray, confidence: float = 0.95) -> dict[str, float]:
    """The share of `hits` with its Wilson score interval: {"mean", "low", "high", "n"}; the mean of none is NaN."""
    from scipy.stats import binomtest

    hits = np.asarray(hits, bool)
    if not hits.size:
        return {"mean": float("nan"), "low": 0.0, "high": 1.0, "n": 0}
    interval = binomtest(int(hits.sum()), hits.size).proportion_ci(confidence, method="wilson")
    return {"mean": float(hits.mean()), "low": float(interval.low), "high": float(interval.high), "n": int(hits.size)}


def over_seeds(values: Sequence[float], confidence: float = 0.95) -> dict[str, float]:
    """The mean over seeds with Student's t interval: {"mean", "low", "high", "n"}; that of one seed is infinite."""
    from scipy.stats import t

    array = np.asarray(values, float)
    mean, n = float(array.mean()), array.size
    half = float("inf") if n < 2 else float(t.ppf((1 + confidence) / 2, n - 1) * array.std(ddof=1) / np.sqrt(n))
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": int(n)}


RESAMPLES = 9999
CHUNK = 512  # resamples drawn at a time


def bootstrap(
    values: Sequence[float] | np.ndarray,
    weights: Sequence[float] | np.ndarray | None = None,
    *,
    bounds: tuple[float, float] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, float]:
    """The ratio sum(values) / sum(weights) over questions, with the percentile interval of resampled questions.

    Without `weights` this is the mean. With them it is a rate: operations that failed over operations, of each question.
    A question is drawn with all of its answers, so Avg@k over many answers to few questions stays as uncertain as it is.

    Where all questions have the same value, resampling gives no interval. With `bounds` on the values there is one all the
    same: a share of questions at either bound, as large as Wilson's upper limit for 0 of n, cannot be excluded. For right or
    wrong answers that is Wilson's interval. Without bounds the interval has no width.

    Args:
      values: [n], of the questions.
      weights: [n]; None: all 1.
      bounds: the least and the largest possible value.
      confidence: the confidence of the interval.
      seed: the seed of the resampling; equal seeds draw the same questions.

    Returns:
      {"mean", "low", "high", "n"}; the mean is NaN where the weights sum to 0.
    """
    values = np.asarray(values, float)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, float)
    n = len(values)
    if n == 0 or weights.sum() == 0:
        return {"mean": float("nan"), "low": float("nan"), "high": float("nan"), "n": n}
    ratios = values[weights > 0] / weights[weights > 0]
    if bounds is not None and np.all(ratios == ratios[0]):
        return _alike(float(ratios[0]), n, len(ratios), bounds, confidence)
    rng, means = np.random.default_rng(seed), []
    for start in range(0, RESAMPLES, CHUNK):
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=min(CHUNK, RESAMPLES - start))
        above, below = drawn @ values, drawn @ weights
        means.append(above[below > 0] / below[below > 0])
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return {"mean": float(values.sum() / weights.sum()), "low": float(low), "high": float(high), "n": n}


def _alike(value: float, n: int, counted: int, bounds: tuple[float, float], confidence: float) -> dict[str, float]:
    """The interval of `counted` questions that all have this value."""
    unseen = proportion(np.zeros(counted, bool), confidence)["high"]
    low, high = (value + unseen * (bound - value) for bound in bounds)
    return {"mean": value, "low": low, "high": high, "n": n}


def paired(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> dict[str, float]:
    """The paired test of two runs by their scores (or averages of k answers) [n] on the same questions.

    The test flips the sign of each question's difference at random: under the null hypothesis the two runs' answers to a
    question are exchangeable. It serves right or wrong, averages and ANLS alike, where McNemar's test needs right or
    wrong; where all differences are of one size it is McNemar's exact test, and is computed as such.

    Returns:
      {"first", "second", "difference" (second - first), "low", "high" (bootstrap over questions), "p" (two-sided), "better",
      "worse" (questions), "n"}.

    Raises:
      ValueError: the runs have different numbers of questions, or none.
    """
    from scipy.stats import binomtest, permutation_test

    one, other = np.asarray(first, float), np.asarray(second, float)
    if one.shape != other.shape or one.ndim != 1 or not one.size:
        raise ValueError(f"a paired test needs the same questions twice, not scores of {one.shape} and {other.shape}")
    difference = other - one
    moved = difference[~np.isclose(difference, 0)]
    better, worse = int(np.sum(moved > 0)), int(np.sum(moved < 0))
    if not moved.size:
        p = 1.0
    elif np.allclose(np.abs(moved), np.abs(moved[0])):
        p = float(binomtest(better, better + worse).pvalue)
    else:
        test = permutation_test(
            (moved,),
            lambda x, axis: np.mean(x, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=CHUNK,
            rng=np.random.default_rng(seed),
        )
        p = float(test.pvalue)
    interval = bootstrap(difference, bounds=(-1, 1), seed=seed)
    return {
        "first": float(one.mean()),
        "second": float(other.mean()),
        "difference": interval["mean"],
        "low": interval["low"],
        "high": interval["high"],
        "p": p,
        "better": better,
        "worse": worse,
        "n": int(one.size),
    }
