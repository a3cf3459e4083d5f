"""Every method on one seed and one share, at the price of the erasure."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import optax

from unlearn_jax import baselines
from unlearn_jax.baselines import Sisa, Training
from unlearn_jax.dataset import Dataset
from unlearn_jax.erase import erase
from unlearn_jax.experiment.judge import Judge
from unlearn_jax.experiment.world import UNTUNED, Trial, World

SHARDS = 4
UNLIMITED = ("erase, unlimited", "L-BFGS, unlimited")  # on to the minimum, at a price that the others are not given
Row = dict[str, Any]
Rates = Mapping[str, tuple[float, ...]]  # learning rates to try, of every method that has one


def compare(world: World, trial: Trial, share: float, rates: Rates) -> dict[str, Any]:
    """{"seed", "share", "count", "norms", "report", "rows"}: a row for every method and learning rate, all its numbers.

    The last two rows are `UNLIMITED`: the edit without a budget of epochs, and L-BFGS at its price.
    """
    judge = Judge.of(world, trial, share)
    config = {"weight_decay": world.setting.weight_decay, **world.setting.erasure}
    edit = lambda config: erase(world.loss, trial.adapter, trial.facts.examples, judge.edits, config)
    erased, unlimited = edit(config), edit({**config, "epochs": "unlimited"})
    report, price = erased.report, unlimited.report.example_gradients
    rows = [
        {"method": "before", "gradients": 0.0, **judge(trial.adapter)},
        {"method": "cold retrain", **judge(judge.cold)},
        {"method": "erase", "gradients": report.example_gradients, **judge(erased.adapter)},
        *baseline_rows(judge, report.example_gradients, report.damping, rates),
        {"method": UNLIMITED[0], "gradients": price, **judge(unlimited.adapter)},
        {"method": UNLIMITED[1], **_lbfgs(judge, price)},
    ]
    return {
        "seed": trial.seed,
        "share": share,
        "count": judge.count,
        "norms": judge.norms,
        "report": json.loads(report.to_json()),
        "rows": rows,
    }


def baseline_rows(judge: Judge, budget: float, damping: float, rates: Rates) -> Iterator[Row]:
    methods = _methods(judge, damping)
    for name in judge.world.setting.methods:
        for rate in (0.0,) if name in UNTUNED else rates[name]:
            row = {"method": name} if name in UNTUNED else {"method": name, "rate": rate}
            try:
                yield row | methods[name](_training(judge, rate, budget))
            except FloatingPointError:
                yield row | {"diverged": True}


def _methods(judge: Judge, damping: float) -> dict[str, Callable[[Training], Row]]:
    world, trial = judge.world, judge.trial
    data = Dataset.of(trial.facts.examples)

    def descent(method, **options):
        def row(training):
            found = method(world.loss, trial.adapter, data, judge.edits, training, **options)
            return {"gradients": found.gradients, **judge(found.adapter)}

        return row

    def sisa(training):
        found = Sisa.train(world.loss, trial.fresh, data, training, shards=SHARDS).edit(judge.edits)
        return {"gradients": found.gradients, "shards": len(found.retrained), **judge.ensemble(found)}

    return {
        "L-BFGS": lambda training: _lbfgs(judge, training.budget),
        "fine-tune": descent(baselines.retrain),
        "gradient ascent": descent(baselines.gradient_ascent),
        "GradDiff": descent(baselines.grad_diff),
        "GradDiff-KL": descent(baselines.grad_diff, retain="kl"),
        "NPO": descent(baselines.npo),
        "SimNPO": descent(baselines.simnpo),
        "RMU": descent(baselines.rmu, activations=world.activations),
        "PBRF": descent(baselines.pbrf, damping=damping),
        "SISA": sisa,
    }


def _lbfgs(judge: Judge, budget: float) -> Row:
    found, _ = baselines.converge(judge.edited, judge.trial.adapter, tolerance=0.0, budget=budget)
    return {"gradients": found.gradients, **judge(found.adapter)}


def _training(judge: Judge, rate: float, budget: float) -> Training:
    setting = judge.world.setting
    schedule = optax.cosine_decay_schedule(rate, max(1, int(budget / setting.batch)))
    return Training(
        optax.adam(schedule), budget, setting.batch, seed=judge.trial.seed, weight_decay=setting.weight_decay
    )


def best_rates(rows: list[Row]) -> dict[str, tuple[float, ...]]:
    """Each method's learning rate with the least divergence from the warm retrain, on both sets together."""
    total = lambda row: row.get("kl_forget", np.inf) + row.get("kl_retain", np.inf)
    tried: dict[str, list[Row]] = {}
    for row in rows:
        if "rate" in row:
            tried.setdefault(row["method"], []).append(row)
    return {name: (min(mine, key=total)["rate"],) for name, mine in tried.items()}
