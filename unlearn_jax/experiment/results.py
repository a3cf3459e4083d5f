"""Runs the whole experiment, saves every result at once, and formats them as text."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from pixel_jax import terminal
from pixel_jax.evaluation.stats import over_seeds
from pixel_jax.files import read_json
from pixel_jax.state_files import write_json
from unlearn_jax.experiment.evaluator import UNLIMITED, best_rates, compare
from unlearn_jax.experiment.setup import ExperimentConfig, Run, Setup

CONVERGED = 1e-6  # the gradient's norm, relative to that of a fresh adapter
COLUMNS = ("kl_forget", "kl_retain", "objective", "nll_forget", "nll_retain", "auc", "gradients")


def table(runs: Sequence[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    """Means over seeds with the half width of their 95 % interval, for every share and method."""
    tables = []
    for share in sorted({run["share"] for run in runs}):
        of_share = [run for run in runs if run["share"] == share]
        seeds = len({run["seed"] for run in of_share})
        title = f"{share:.1%} removed, {seeds} seed{'s' if seeds > 1 else ''}"
        rows = [row for run in of_share for row in run["rows"]]
        lines = []
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == method]
            diverged = any(row.get("diverged") for row in own)
            lines.append([method, *("diverged" if diverged else _cell([r[x] for r in own if x in r]) for x in columns)])
        tables.append(terminal.table_text(terminal.table((title, *columns), lines)) + "\n")
    return "\n".join(tables)


def beaten(runs: Sequence[dict[str, Any]], name: str) -> list[str]:
    """Sentences about baselines that are nearer to the warm retrain than `erase` in the divergence `name`.

    They are compared by the mean over seeds of the paired difference, which is given with its 95 % interval.
    """
    sentences = []
    for share in sorted({run["share"] for run in runs}):
        by_method = [{row["method"]: row for row in run["rows"]} for run in runs if run["share"] == share]
        for method in by_method[0]:
            if method in ("erase", "cold retrain", *UNLIMITED) or not all(
                name in rows.get(method, {}) for rows in by_method
            ):
                continue  # a method that diverged on one seed is not the nearest
            gap = over_seeds([rows[method][name] - rows["erase"][name] for rows in by_method])
            if not gap["mean"] > 0:
                sentences.append(
                    f"{share:.1%} removed: {method} is nearer in {name}, by {-gap['mean']:.3g} "
                    f"[{-gap['high']:.3g}, {-gap['low']:.3g}]"
                )
    return sentences


def loose(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences about trainings and retrains that stopped before they converged, so that distances mean little."""
    return [
        f"seed {run['seed']}, {run['share']:.1%} removed: {name} stopped at a gradient of {norm:.1e} of a fresh adapter's"
        for run in runs
        for name, norm in run["norms"].items()
        if not norm <= CONVERGED
    ]


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    statistics = over_seeds(values)
    return f"{statistics['mean']:.3g}" + (
        f" ± {statistics['high'] - statistics['mean']:.1g}" if statistics["n"] > 1 else ""
    )


TUNING = 1_000_000  # the seed on which learning rates are chosen, and whose results do not count


def run_experiment(setting: ExperimentConfig, path: pathlib.Path, log: Callable[[str], None] = print) -> dict:
    """Runs the experiment; returns {"setting", "tuning", "runs", "exceptions"} and writes it to the JSON file `path`.

    Results that the file has already are kept, and missing seeds are added.
    """
    wanted = json.loads(json.dumps(dataclasses.asdict(setting)))
    result = {"setting": wanted, "tuning": [], "runs": []}
    if path.exists():
        result = read_json(path)
        if {**result["setting"], "seeds": setting.seeds} != wanted:
            raise ValueError(f"{path} has results of the setting {result['setting']}, not of {wanted}")
        result["setting"] = wanted
    setup = Setup.of(setting)
    for seed in (TUNING, *range(setting.seeds)):
        finished = result["tuning" if seed == TUNING else "runs"]
        missing = [
            share for share in setting.shares if (seed, share) not in {(x["seed"], x["share"]) for x in finished}
        ]
        if not missing:
            continue
        run = Run.of(setup, seed)
        log(f"seed {seed}: trained until the gradient was {run.norm:.1e}")
        for share in missing:
            rates = dict.fromkeys(setting.methods, setting.rates)
            if seed != TUNING:
                rates = best_rates(next(x["rows"] for x in result["tuning"] if x["share"] == share))
            finished.append(compare(setup, run, share, rates))
            log(table(finished[-1:]) if seed != TUNING else f"{share:.1%}: {best_rates(finished[-1]['rows'])}")
            runs = result["runs"]
            result["exceptions"] = [*loose(runs), *beaten(runs, "kl_forget"), *beaten(runs, "kl_retain")]
            write_json(path, result)
    return result
