"""The methods that are compared, by name: each computes adapters for a case, at a known cost."""

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax

from unlearn_jax import baselines
from unlearn_jax.arrays import Params
from unlearn_jax.baselines import Sisa, Trained, Training
from unlearn_jax.dataset import Dataset
from unlearn_jax.edits import apply
from unlearn_jax.erase import erase
from unlearn_jax.objective import dataset_objective
from unlearn_jax.studies.study import Case, alone

SHARDS = 4  # of SISA, as in LLMEraser's comparison
Cost = Literal["nothing", "training", "edit"]


class MethodResult(NamedTuple):
    """The result of a method on a case."""

    adapters: Params  # [adapters, ...]: one adapter, or those of SISA's shards
    gradients: float  # example-gradients
    seconds: float
    remarks: dict[str, Any]  # further fields of the cell


class Allowance(NamedTuple):
    """The budget of a baseline in example-gradients, and its learning rate."""

    gradients: float
    rate: float


@dataclasses.dataclass(frozen=True)
class Method:
    """A method: how it computes adapters for a case, and what that costs."""

    make: Callable[[Case, Allowance], tuple[Params, float, dict[str, Any]]]
    cost: Cost  # "edit": as much as the edit by `erase` has cost
    tuned: bool = False  # whether its learning rate is chosen on the tuning seed

    def __call__(self, case: Case, allowance: Allowance) -> MethodResult:
        """Computes adapters; raises FloatingPointError if the method diverges."""
        begun = time.perf_counter()
        adapters, gradients, remarks = self.make(case, allowance)
        # On the host, so that the programs that score adapters are compiled once for all methods.
        return MethodResult(jax.tree.map(np.asarray, adapters), gradients, time.perf_counter() - begun, remarks)


def _corrupted(case: Case, allowance: Allowance) -> tuple[Params, float, dict[str, Any]]:
    return alone(case.trained), 0.0, {}


def _retrained(**options: Any) -> Callable[[Case, Allowance], tuple[Params, float, dict[str, Any]]]:
    def make(case, allowance):
        adapter, spent = case.retrained(**options)
        return alone(adapter), spent, {}

    return make


def _erase(case: Case, allowance: Allowance) -> tuple[Params, float, dict[str, Any]]:
    config = case.study.config
    erasure = dataclasses.replace(config.erasure, training_epochs=float(config.training.epochs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # limits, which are fields of the cell
        erasure_result = erase(case.study.loss, case.trained, case.dataset, case.edits, erasure)
    report = erasure_result.report
    summary = {
        "verdict": report.verdict,
        "limits": [limit.kind for limit in report.limits],
        **{name: getattr(report, name) for name in ("epochs", "unfinished", "predicted", "actual", "delta_norm")},
    }
    return alone(erasure_result.adapter), report.example_gradients, {"report": summary}


def _lbfgs(case: Case, allowance: Allowance) -> tuple[Params, float, dict[str, Any]]:
    loss, erasure = case.study.loss, case.study.config.erasure
    after = apply(Dataset.of(case.dataset), case.edits, loss)
    objective = dataset_objective(
        loss, case.trained, after, weight_decay=erasure.weight_decay, micro_batch=erasure.micro_batch
    )
    minimum, norm = baselines.converge(objective, case.trained, tolerance=0.0, budget=allowance.gradients)
    return alone(minimum.adapter), minimum.gradients, {"gradient_norm": norm}


_adam = functools.cache(optax.adam)  # one value for each learning rate, so that its step is compiled once


def _training(case: Case, allowance: Allowance) -> Training:
    config = case.study.config
    return Training(
        _adam(allowance.rate), allowance.gradients, config.batch, seed=case.seed,
        weight_decay=config.erasure.weight_decay,
    )  # fmt: skip


def _descent(method: Callable[..., Trained]) -> Callable[[Case, Allowance], tuple[Params, float, dict[str, Any]]]:
    def make(case, allowance):
        loss, training = case.study.loss, _training(case, allowance)
        trained = method(loss, case.trained, case.dataset, case.edits, training)
        return alone(trained.adapter), trained.gradients, {}

    return make


def _sisa(case: Case, allowance: Allowance) -> tuple[Params, float, dict[str, Any]]:
    loss, start = case.study.loss, case.study.fresh(case.seed)
    sisa = Sisa.train(loss, start, case.dataset, _training(case, allowance), shards=SHARDS).edit(case.edits)
    return sisa.stacked(), sisa.gradients, {"shards": len(sisa.retrained)}


METHODS: Mapping[str, Method] = {
    "corrupted": Method(_corrupted, "nothing"),
    "retrain, cold": Method(_retrained(), "training"),
    "retrain, other order": Method(_retrained(order=1), "training"),
    "retrain, warm": Method(_retrained(warm=True), "training"),
    "erase": Method(_erase, "edit"),
    "L-BFGS": Method(_lbfgs, "edit"),
    "SISA": Method(_sisa, "edit", tuned=True),
    "gradient ascent": Method(_descent(baselines.gradient_ascent), "edit", tuned=True),
    "GradDiff": Method(_descent(baselines.grad_diff), "edit", tuned=True),
    "NPO": Method(_descent(baselines.npo), "edit", tuned=True),
    "SimNPO": Method(_descent(baselines.simnpo), "edit", tuned=True),
    "E2URec": Method(_descent(baselines.e2urec), "edit", tuned=True),
}
REFERENCES = tuple(name for name, method in METHODS.items() if method.cost != "edit")  # of `unlearn-jax train`
