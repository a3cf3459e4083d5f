"""Makes `metrics.json` from the results of the seeds."""

from collections.abc import Mapping

import numpy as np

from pixel_jax.evaluation.stats import over_seeds


def summarise(results: Mapping[int, Mapping]) -> dict:
    """The means over seeds, with Student's t intervals over seeds and, for each seed, Wilson intervals over scenes.

    Args:
        results: seed -> the result of `pipeline.run_seed`. Accuracies and rates are sampled at temperature 1.
    """
    every = list(results.values())
    groups = {
        "sft": [result["sft"] for result in every],
        **{arm: [result["rl"][arm] for result in every] for arm in every[0]["rl"]},
    }
    means, intervals = {}, {}
    for group, items in groups.items():
        names = [name for name, value in items[0].items() if isinstance(value, int | float)]
        means[group] = {name: float(np.mean([item[name] for item in items])) for name in names}
        intervals[group] = {name: over_seeds([item[name] for item in items]) for name in names}
    arms = [group for group in groups if group != "sft"]
    first, second = arms
    gaps = [result["rl"][first]["accuracy"] - result["rl"][second]["accuracy"] for result in every]
    return {
        "sft": means["sft"],
        "rl": {
            arm: {**means[arm], **{x: mean_curve([item[x] for item in groups[arm]]) for x in ("curve", "looks")}}
            for arm in arms
        },
        "accuracy_gap": float(np.mean(gaps)),
        "seconds": {name: float(np.mean([r["seconds"][name] for r in every])) for name in every[0]["seconds"]},
        "seeds": list(results),
        "intervals_over_seeds": {**intervals, "accuracy_gap": over_seeds(gaps)} if len(every) > 1 else None,
        "per_seed": {str(seed): result for seed, result in results.items()},
    }


def mean_curve(curves: list[list[dict]]) -> list[dict]:
    """The point-wise mean of curves of equal length; a metric that an iteration of some curve lacks is left out there."""
    averaged = []
    for points in zip(*curves, strict=True):
        known = [name for name in points[0] if all(point[name] is not None for point in points)]
        averaged.append({name: float(np.mean([point[name] for point in points])) for name in known})
    return averaged
