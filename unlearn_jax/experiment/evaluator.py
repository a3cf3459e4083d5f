"""Compares all methods with retraining on one seed and one share, at the cost of the edit."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from unlearn_jax import baselines
from unlearn_jax.arrays import Params
from unlearn_jax.baselines import Sisa, Training, ensemble
from unlearn_jax.dataset import Dataset
from unlearn_jax.edits import Edit, Remove, apply
from unlearn_jax.erase import erase
from unlearn_jax.experiment.setup import UNTUNED, Run, Setup
from unlearn_jax.loss import Loss
from unlearn_jax.metrics import answers, distance, membership, tokens
from unlearn_jax.objective import Objective


class Evaluator(NamedTuple):
    """Compares adapters with retraining, warm and cold, on one seed and share."""

    setup: Setup
    run: Run
    forgotten: int  # number of facts to be forgotten, which are the first ones
    retain: dict[str, np.ndarray]
    edited: Objective
    warm: Params
    cold: Params
    truth: np.ndarray  # truth ratios [count] of the cold retrain on the forgotten facts
    norms: dict[str, float]  # gradient norms where training and the retrains stopped, relative to a fresh adapter's

    @classmethod
    def of(cls, setup: Setup, run: Run, share: float) -> "Evaluator":
        """Removes a share of the facts, and retrains on the others."""
        data = Dataset.of(run.facts.examples)
        count = max(1, round(share * len(data)))
        after = apply(data, [Remove(np.arange(count))])
        warm, cold = setup.converge(run.adapter, after), setup.converge(run.fresh, after)
        truth = truth_ratio(setup.loss, cold.params, run, count)
        norms = {"trained": run.norm, "warm": warm.norm / cold.start, "cold": cold.norm / cold.start}
        edited = setup.objective(warm.params, after)
        return cls(setup, run, count, after.take(), edited, warm.params, cold.params, truth, norms)

    @property
    def edits(self) -> list[Edit]:
        """The removal of the forgotten facts."""
        return [Remove(np.arange(self.forgotten))]

    def __call__(self, adapter: Params) -> dict[str, float]:
        """Computes all metrics of an adapter.

        "objective" is the edited objective less that of the warm retrain; "distance" is between the changes of the weights.
        """
        loss = self.setup.loss
        metrics = {
            **self._divergences(loss, adapter, self.warm),
            **self._answers(loss, adapter),
            "objective": float(self.edited.value(adapter) - self.edited.value(self.warm)),
            "distance": distance.delta_w_distance(adapter, self.warm),
        }
        cosine = distance.delta_w_cosine(adapter, self.warm, self.run.adapter)
        return metrics if np.isnan(cosine) else {**metrics, "cosine": cosine}

    def ensemble(self, sisa: Sisa) -> dict[str, float]:
        """Computes the metrics of SISA's ensemble, which is not a single adapter and has no distance."""
        loss, alone = ensemble(self.setup.loss), jax.tree.map(lambda x: x[None], self.warm)
        return {**self._divergences(loss, sisa.stacked(), alone), **self._answers(loss, sisa.stacked())}

    def _sets(self) -> dict[str, dict[str, np.ndarray]]:
        forget = _first(self.run.facts.examples, self.forgotten)
        return {"forget": forget, "retain": self.retain, "holdout": self.run.holdout.examples}

    def _divergences(self, loss: Loss, params: Any, warm: Any) -> dict[str, float]:
        kl = lambda examples: float(tokens.kl_to(loss, params, warm, examples, micro_batch=None).mean())
        return {f"kl_{name}": kl(examples) for name, examples in self._sets().items()}

    def _answers(self, loss: Loss, params: Any) -> dict[str, float]:
        statistics = {name: tokens.score(loss, params, x, micro_batch=None) for name, x in self._sets().items()}
        lowest = {name: membership.min_k(x.logprob, tokens.without_last(x.mask)) for name, x in statistics.items()}
        ratio = truth_ratio(loss, params, self.run, self.forgotten)
        nll = {f"nll_{name}": float(answers.mean_nll(x.logprob, x.mask).mean()) for name, x in statistics.items()}
        return {
            **nll,
            "auc": membership.auc(lowest["forget"], lowest["holdout"]),
            "forget_quality": answers.forget_quality(ratio, self.truth),
        }


def truth_ratio(loss: Loss, params: Any, run: Run, count: int) -> np.ndarray:
    """Truth ratios [count] of the first facts, asked and answered in other words."""

    def nll(examples):
        statistics = tokens.score(loss, params, examples, micro_batch=None)
        return answers.mean_nll(statistics.logprob, statistics.mask)

    wrong = {name: x.reshape(-1, *x.shape[2:]) for name, x in _first(run.facts.wrong, count).items()}
    return answers.truth_ratio(nll(_first(run.facts.paraphrased, count)), nll(wrong).reshape(count, -1))


def _first(rows: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    return {name: x[:count] for name, x in rows.items()}


SHARDS = 4
UNLIMITED = ("erase, unlimited", "L-BFGS, unlimited")  # run until the minimum, at more than the others' budget
Row = dict[str, Any]
Rates = Mapping[str, tuple[float, ...]]  # {method: learning rates to try}


def compare(setup: Setup, run: Run, share: float, rates: Rates) -> dict[str, Any]:
    """Runs all methods; returns {"seed", "share", "count", "norms", "report", "rows"}, a row for every method and rate.

    The last two rows are `UNLIMITED`: the edit without a budget of epochs, and L-BFGS at the cost of that edit.
    """
    evaluator = Evaluator.of(setup, run, share)
    config = {"weight_decay": setup.setting.weight_decay, **setup.setting.erasure}
    edit = lambda config: erase(setup.loss, run.adapter, run.facts.examples, evaluator.edits, config)
    erased, unlimited = edit(config), edit({**config, "epochs": "unlimited"})
    report, price = erased.report, unlimited.report.example_gradients
    rows = [
        {"method": "before", "gradients": 0.0, **evaluator(run.adapter)},
        {"method": "cold retrain", **evaluator(evaluator.cold)},
        {"method": "erase", "gradients": report.example_gradients, **evaluator(erased.adapter)},
        *baseline_rows(evaluator, report.example_gradients, report.damping, rates),
        {"method": UNLIMITED[0], "gradients": price, **evaluator(unlimited.adapter)},
        {"method": UNLIMITED[1], **_lbfgs(evaluator, price)},
    ]
    return {
        "seed": run.seed,
        "share": share,
        "count": evaluator.forgotten,
        "norms": evaluator.norms,
        "report": json.loads(report.to_json()),
        "rows": rows,
    }


def baseline_rows(evaluator: Evaluator, budget: float, damping: float, rates: Rates) -> Iterator[Row]:
    """Yields a row for every baseline and learning rate."""
    methods = _methods(evaluator, damping)
    for name in evaluator.setup.setting.methods:
        for rate in (0.0,) if name in UNTUNED else rates[name]:
            row = {"method": name} if name in UNTUNED else {"method": name, "rate": rate}
            try:
                yield row | methods[name](_training(evaluator, rate, budget))
            except FloatingPointError:
                yield row | {"diverged": True}


def _methods(evaluator: Evaluator, damping: float) -> dict[str, Callable[[Training], Row]]:
    setup, run = evaluator.setup, evaluator.run
    data = Dataset.of(run.facts.examples)

    def descent(method, **options):
        def row(training):
            found = method(setup.loss, run.adapter, data, evaluator.edits, training, **options)
            return {"gradients": found.gradients, **evaluator(found.adapter)}

        return row

    def sisa(training):
        found = Sisa.train(setup.loss, run.fresh, data, training, shards=SHARDS).edit(evaluator.edits)
        return {"gradients": found.gradients, "shards": len(found.retrained), **evaluator.ensemble(found)}

    return {
        "L-BFGS": lambda training: _lbfgs(evaluator, training.budget),
        "fine-tune": descent(baselines.retrain),
        "gradient ascent": descent(baselines.gradient_ascent),
        "GradDiff": descent(baselines.grad_diff),
        "GradDiff-KL": descent(baselines.grad_diff, retain="kl"),
        "NPO": descent(baselines.npo),
        "SimNPO": descent(baselines.simnpo),
        "RMU": descent(baselines.rmu, activations=setup.activations),
        "PBRF": descent(baselines.pbrf, damping=damping),
        "SISA": sisa,
    }


def _lbfgs(evaluator: Evaluator, budget: float) -> Row:
    minimum, _ = baselines.converge(evaluator.edited, evaluator.run.adapter, tolerance=0.0, budget=budget)
    return {"gradients": minimum.gradients, **evaluator(minimum.adapter)}


def _training(evaluator: Evaluator, rate: float, budget: float) -> Training:
    setting = evaluator.setup.setting
    schedule = optax.cosine_decay_schedule(rate, max(1, int(budget / setting.batch)))
    return Training(
        optax.adam(schedule), budget, setting.batch, seed=evaluator.run.seed, weight_decay=setting.weight_decay
    )


def best_rates(rows: list[Row]) -> dict[str, tuple[float, ...]]:
    """Each method's learning rate with the least sum of the divergences from the warm retrain on both sets."""

    def total(row: Row) -> float:
        return row.get("kl_forget", np.inf) + row.get("kl_retain", np.inf)

    tried: dict[str, list[Row]] = {}
    for row in rows:
        if "rate" in row:
            tried.setdefault(row["method"], []).append(row)
    return {name: (min(rows_of_method, key=total)["rate"],) for name, rows_of_method in tried.items()}
