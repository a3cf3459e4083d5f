"""`erase`: an edit of the training data in, a new adapter and a report on it out."""

import dataclasses
import json
import resource
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from unlearn_jax.checks import check_deterministic, check_differentiable, check_params
from unlearn_jax.config import ErasureConfig, resolve
from unlearn_jax.dataset import Dataset
from unlearn_jax.edits import Edit, affected, apply
from unlearn_jax.loss import Loss, Params, require_parts
from unlearn_jax.newton import UNFINISHED, Finish, NewtonStep, add, newton, norm
from unlearn_jax.objective import dataset_objective, on_mesh
from unlearn_jax.problem import Problem, make_problem
from unlearn_jax.solve import product_kind


@dataclasses.dataclass(frozen=True)
class Report:
    """How an edit went. Norms are over all parameters; J is the edited objective, see `newton`."""

    edits: dict[str, int]  # how many examples each kind of edit names
    examples: int  # in the dataset before the edit
    edited: int  # of them touched by the edit
    sampled: int  # others that were looked at
    config: ErasureConfig
    residual_gradient: float  # |grad R| before the edit: how far training was from converged
    right_side: float  # |b| of the first solve
    unfinished: float  # their ratio: far above one, the edit is small beside what training left undone
    delta_norm: float
    adapter_norm: float  # before the edit
    residual: float  # the solver's, relative, in the last step; 0 without a step
    negative_curvature: bool  # seen in any step
    damping: float  # of the last step
    step_size: float  # of the last step
    predicted: float  # change of J by the steps' quadratic models
    actual: float  # change of J by the steps
    steps: list[NewtonStep]
    finish: Finish | None  # what L-BFGS has added
    example_gradients: float  # work: as many examples forward and backward
    seconds: float
    memory: int  # bytes: the most the device held, or where it does not tell, the process

    def to_json(self, **options: Any) -> str:
        return json.dumps(dataclasses.asdict(self), **options)


class Erasure(NamedTuple):
    """adapter = the adapter given + delta, in its dtypes; delta is float32 or wider."""

    adapter: Params
    delta: Params
    report: Report


def erase(
    loss: Callable,
    adapter: Params,
    dataset: Any,
    edits: Sequence[Edit],
    config: ErasureConfig | Mapping[str, Any] | None = None,
    *,
    mesh: Mesh | None = None,
    weights: np.ndarray | None = None,
    held_out: Any = None,
) -> Erasure:
    """Changes `adapter` so that it is as if it had been trained on the edited data.

    loss:     `loss(params, example)` -> scalar or (sum, weight), or a `Loss`; without dropout
    adapter:  a pytree of floating point arrays, trained on `dataset` with the reduction and weight decay of `config`
    dataset:  a dictionary of arrays with a leading example axis, a Grain source, or a `Dataset`
    edits:    a list of `Remove`, `ModifyQuery`, `CorrectResponse`, `MaskTokens`, each example in at most one of them
    config:   an `ErasureConfig`, or a mapping of its fields, with "preset": "best" (default), "paper" or "repo"
    mesh:     spreads the examples over its axes `data` and `fsdp`
    weights:  [n], how much each example counted in training
    held_out: examples like those of the dataset, for damping "held_out"; by default those that the solve leaves out

    A later request starts from the edited adapter and the edited data:

        first = erase(loss, adapter, data, [Remove([3])])
        second = erase(loss, first.adapter, unlearn_jax.apply(data, [Remove([3])]), [Remove([5])])
    """
    start = time.perf_counter()
    config = resolve(config)
    curvature = config.curvature or ("ggn" if isinstance(loss, Loss) else "hessian")
    config = dataclasses.replace(config, curvature=curvature)
    if curvature in ("ggn", "fisher"):
        require_parts(loss, f"curvature={curvature!r}")
    before = Dataset.of(dataset, weights)
    after = apply(before, edits, loss)
    loss, adapter = on_mesh(loss, mesh), on_mesh(adapter, mesh)
    check_params(adapter)
    check_deterministic(loss, adapter, before.example(0))
    problem = make_problem(loss, adapter, before, after, config, mesh)
    check_differentiable(problem.curved, adapter, product_kind(config))

    options = {"reduction": config.reduction, "weight_decay": config.weight_decay, "micro_batch": config.micro_batch}
    full = None
    if config.residual == "keep" and not problem.whole:
        full = jax.block_until_ready(dataset_objective(loss, adapter, after, **options, mesh=mesh).gradient(adapter))
    unseen = None
    if config.damping == "held_out":
        stand_in = _left_out(before, after, problem) if held_out is None else Dataset.of(held_out)
        unseen = make_problem(loss, adapter, before, after, config, mesh, stand_in)
    descent = newton(problem, adapter, config, full, unseen)
    unfinished = descent.residual_gradient / descent.right_side if descent.right_side else 0.0
    # The gradient on a sample is not small at a minimum of the whole: it tells nothing.
    if problem.whole and unfinished > UNFINISHED and config.residual == "drop":
        warnings.warn(
            f"training had not converged: |grad R| is {descent.residual_gradient:.2g} at the adapter, {unfinished:.2g} times "
            f"the right side of the edit ({descent.right_side:.2g}). The edit keeps that gradient as it is, its curvature is "
            f"not that of a minimum, and no L-BFGS follows the steps; a retrain would go on from here. Train further, or set "
            f"residual='keep'",
            stacklevel=2,
        )
    delta, steps = descent.delta, descent.steps
    edited = add(adapter, delta)
    jax.block_until_ready(edited)
    last = steps[-1] if steps else None
    counts: dict[str, int] = {}
    for edit in edits:
        counts[type(edit).__name__] = counts.get(type(edit).__name__, 0) + len(edit.ids)
    report = Report(
        edits=counts,
        examples=len(before),
        edited=problem.touched,
        sampled=problem.sampled,
        config=config,
        residual_gradient=descent.residual_gradient,
        right_side=descent.right_side,
        unfinished=unfinished,
        delta_norm=float(norm(delta)),
        adapter_norm=float(norm(adapter)),
        residual=last.residual if last else 0.0,
        negative_curvature=any(step.negative_curvature for step in steps),
        damping=last.damping if last else 0.0,
        step_size=last.step_size if last else 0.0,
        predicted=sum(step.predicted for step in steps),
        actual=sum(step.actual for step in steps),
        steps=steps,
        finish=descent.finish,
        example_gradients=descent.example_gradients,
        seconds=time.perf_counter() - start,
        memory=_peak_memory(),
    )
    return Erasure(edited, delta, report)


def _left_out(before: Dataset, after: Dataset, problem: Problem) -> Dataset:
    _, _, others = affected(before, after)
    rest = others[~np.isin(before.ids[others], problem.ids)]
    if not len(rest):
        raise ValueError(
            "damping 'held_out' needs examples that the solve has not seen: give held_out, or set curvature_examples "
            f"below the {len(others)} that the edits do not touch"
        )
    return before.select(rest[: problem.sampled])


def _peak_memory() -> int:
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
