"""What is done about an edit, by name. A method is a value: what it makes of a case, and what it costs."""

import dataclasses
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
from unlearn_jax.recommendation.study import Case, alone

SHARDS = 4  # of SISA, as in LLMEraser's comparison
Cost = Literal["nothing", "training", "edit"]


class Attempt(NamedTuple):
    """What a method made."""

    adapters: Params  # [adapters, ...], one but for SISA
    gradients: float  # example-gradients
    seconds: float
    remarks: dict[str, Any]  # for the cell


class Allowance(NamedTuple):
    """What a baseline may spend, and its learning rate."""

    gradients: float
    rate: float


@dataclasses.dataclass(frozen=True)
class Method:
    """See the module."""

    make: Callable[[Case, Allowance], tuple[Params, float, dict[str, Any]]]
    cost: Cost  # "edit": as much as the edit by `erase` has cost
    tuned: bool = False  # has a learning rate, which is chosen

    def __call__(self, case: Case, allowance: Allowance) -> Attempt:
        """Raises FloatingPointError where it diverges."""
        begun = time.perf_counter()
        adapters, gradients, remarks = self.make(case, allowance)
        # From the host, all adapters are alike to compiled programs: those of other methods are not compiled again.
        return Attempt(jax.tree.map(np.asarray, adapters), gradients, time.perf_counter() - begun, remarks)


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
        warnings.simplefilter("ignore", UserWarning)  # the limits, which the cell has
        found = erase(case.study.recommender.loss, case.trained, case.dataset, case.edits, erasure)
    report = found.report
    said = {
        "verdict": report.verdict,
        "limits": [limit.kind for limit in report.limits],
        **{name: getattr(report, name) for name in ("epochs", "unfinished", "predicted", "actual", "delta_norm")},
    }
    return alone(found.adapter), report.example_gradients, {"report": said}


def _lbfgs(case: Case, allowance: Allowance) -> tuple[Params, float, dict[str, Any]]:
    loss, erasure = case.study.recommender.loss, case.study.config.erasure
    after = apply(Dataset.of(case.dataset), case.edits, loss)
    objective = dataset_objective(
        loss, case.trained, after, weight_decay=erasure.weight_decay, micro_batch=erasure.micro_batch
    )
    found, norm = baselines.converge(objective, case.trained, tolerance=0.0, budget=allowance.gradients)
    return alone(found.adapter), found.gradients, {"gradient_norm": norm}


def _training(case: Case, allowance: Allowance) -> Training:
    config = case.study.config
    return Training(
        optax.adam(allowance.rate), allowance.gradients, config.batch, seed=case.seed,
        weight_decay=config.erasure.weight_decay,
    )  # fmt: skip


def _descent(method: Callable[..., Trained]) -> Callable[[Case, Allowance], tuple[Params, float, dict[str, Any]]]:
    def make(case, allowance):
        loss, training = case.study.recommender.loss, _training(case, allowance)
        found = method(loss, case.trained, case.dataset, case.edits, training)
        return alone(found.adapter), found.gradients, {}

    return make


def _sisa(case: Case, allowance: Allowance) -> tuple[Params, float, dict[str, Any]]:
    loss, start = case.study.recommender.loss, case.study.recommender.fresh(case.seed)
    found = Sisa.train(loss, start, case.dataset, _training(case, allowance), shards=SHARDS).edit(case.edits)
    return found.stacked(), found.gradients, {"shards": len(found.retrained)}


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
