"""Intervals: a number without one is an anecdote."""

from collections.abc import Sequence

import numpy as np


def proportion(hits: Sequence[bool] | np.ndarray, confidence: float = 0.95) -> dict[str, float]:
    """Share of `hits` with its Wilson score interval: {"mean", "low", "high", "n"}. Without any, the mean is NaN."""
    from scipy.stats import binomtest

    hits = np.asarray(hits, bool)
    if not hits.size:
        return {"mean": float("nan"), "low": 0.0, "high": 1.0, "n": 0}
    interval = binomtest(int(hits.sum()), hits.size).proportion_ci(confidence, method="wilson")
    return {"mean": float(hits.mean()), "low": float(interval.low), "high": float(interval.high), "n": int(hits.size)}


def over_seeds(values: Sequence[float], confidence: float = 0.95) -> dict[str, float]:
    """Mean over seeds with Student's t interval: {"mean", "low", "high", "n"}; one seed alone has an infinite one."""
    from scipy.stats import t

    values = np.asarray(values, float)
    mean, n = float(values.mean()), values.size
    half = float("inf") if n < 2 else float(t.ppf((1 + confidence) / 2, n - 1) * values.std(ddof=1) / np.sqrt(n))
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": int(n)}
