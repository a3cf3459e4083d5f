"""Results as text: means over seeds, and the half width of their 95 % interval."""

from collections.abc import Sequence
from typing import Any

from pixel_jax.evaluation.stats import over_seeds
from unlearn_jax.experiment.compare import UNLIMITED

CONVERGED = 1e-6  # the gradient's norm, relative to that of a fresh adapter
COLUMNS = ("kl_forget", "kl_retain", "objective", "nll_forget", "nll_retain", "auc", "gradients")


def table(trials: Sequence[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    lines = []
    for share in sorted({trial["share"] for trial in trials}):
        mine = [trial for trial in trials if trial["share"] == share]
        seeds = len({trial["seed"] for trial in mine})
        lines.append(f"{share:.1%} removed, {seeds} seed{'s' if seeds > 1 else ''}")
        lines.append(f"{'':20}" + "".join(f"{name:>18}" for name in columns))
        rows = [row for trial in mine for row in trial["rows"]]
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == method]
            diverged = any(row.get("diverged") for row in own)
            cells = ["diverged" if diverged else _cell([row[x] for row in own if x in row]) for x in columns]
            lines.append(f"{method:20}" + "".join(f"{cell:>18}" for cell in cells))
        lines.append("")
    return "\n".join(lines)


def beaten(trials: Sequence[dict[str, Any]], name: str) -> list[str]:
    """Where erasing is not the nearest to the warm retrain in `name` (a divergence), as sentences.

    By the mean over seeds of the paired difference to each baseline, with its 95 % interval.
    """
    sentences = []
    for share in sorted({trial["share"] for trial in trials}):
        mine = [{row["method"]: row for row in trial["rows"]} for trial in trials if trial["share"] == share]
        for method in mine[0]:
            if method in ("erase", "cold retrain", *UNLIMITED) or not all(
                name in rows.get(method, {}) for rows in mine
            ):
                continue  # a method that diverged on one seed is not the nearest
            gap = over_seeds([rows[method][name] - rows["erase"][name] for rows in mine])
            if not gap["mean"] > 0:
                sentences.append(
                    f"{share:.1%} removed: {method} is nearer in {name}, by {-gap['mean']:.3g} "
                    f"[{-gap['high']:.3g}, {-gap['low']:.3g}]"
                )
    return sentences


def loose(trials: Sequence[dict[str, Any]]) -> list[str]:
    """Where training or a reference stopped before it had converged, as sentences: distances from there mean little."""
    return [
        f"seed {trial['seed']}, {trial['share']:.1%} removed: {name} stopped at a gradient of {norm:.1e} of a fresh adapter's"
        for trial in trials
        for name, norm in trial["norms"].items()
        if not norm <= CONVERGED
    ]


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    found = over_seeds(values)
    return f"{found['mean']:.3g}" + (f" ± {found['high'] - found['mean']:.1g}" if found["n"] > 1 else "")
