"""`erase`: computes a new adapter and a report from an edit of the training data."""

import dataclasses
import json
import resource
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from unlearn_jax import tree
from unlearn_jax.arrays import Params
from unlearn_jax.checks import check_differentiable, check_loss, check_params, check_widened
from unlearn_jax.config import ErasureConfig, resolve, to_mapping
from unlearn_jax.dataset import Dataset
from unlearn_jax.edits import Edit, affected, apply
from unlearn_jax.limits import Finish, Limit, NewtonStep
from unlearn_jax.loss import Loss, require_parts
from unlearn_jax.newton import UNFINISHED, Descent, add, newton, norm
from unlearn_jax.objective import on_mesh, widen
from unlearn_jax.problem import Problem, make_problem
from unlearn_jax.solve import product_kind
from unlearn_jax.solvers import Solver

Verdict = Literal["edited", "nothing_to_do", "not_improved"]
ROUNDED = 0.1  # share of the delta that rounding to a 16-bit adapter may change before it is reported


@dataclasses.dataclass(frozen=True)
class Report:
    """The report of an edit. Norms are over all parameters; J is the edited objective, see `newton`."""

    # "edited"; "nothing_to_do": the edits do not change the objective; "not_improved": no step decreases J on all examples.
    # With the last two the adapter is returned unchanged.
    verdict: Verdict
    reason: str
    # Every limit that the edit met, and every step that did not change J as predicted; each is also a warning.
    limits: list[Limit]
    edits: dict[str, int]  # number of examples by kind of edit
    examples: int  # in the dataset before the edit
    edited: int  # those that the edit changes or removes
    sampled: int  # unedited examples drawn for the curvature; `steps` say how many each step used
    config: ErasureConfig
    residual_gradient: float  # |grad R| before the edit: how far training was from converged
    right_side: float  # |b| of the first solve
    # residual_gradient / right_side; far above one, training left a gradient much larger than the edit's.
    unfinished: float
    delta_norm: float
    adapter_norm: float  # before the edit
    rounding: float  # |edited adapter - (original adapter + delta)| / |delta|: the error of rounding to 16 bits
    residual: float  # the solver's relative residual in the last step; 0 without a step
    negative_curvature: bool  # seen in any step
    damping: float  # of the last step
    step_size: float  # of the last step
    predicted: float  # change of J by the quadratic models of the steps and the slopes of L-BFGS
    actual: float  # change of J on all examples, from the original adapter to the returned one
    loss_before: float  # R' at the original adapter, its regulariser included
    loss_after: float  # R' at the returned adapter
    steps: list[NewtonStep]
    finish: Finish | None  # of L-BFGS
    example_gradients: float  # the cost: an example forward and backward is one
    epochs: float  # the cost in epochs of the training: example_gradients / examples
    seconds: float
    memory: int  # bytes: the peak of any device, or of the process where devices do not report theirs

    def to_json(self, **options: Any) -> str:
        """The report as JSON, its config in the form that `erase` reads."""
        return json.dumps({**dataclasses.asdict(self), "config": to_mapping(self.config)}, **options)


class Erasure(NamedTuple):
    """The result of `erase`: the edited adapter in its own dtypes, its change `delta` in float32 or wider, and the report."""

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
    solver: Solver | None = None,
    mesh: Mesh | None = None,
    weights: np.ndarray | None = None,
    held_out: Any = None,
) -> Erasure:
    """Changes an adapter so that it is as if it had been trained on the edited data.

    The aim is a retrain by the same recipe. After training that converged, the adapter goes to the new minimum. After training
    that was stopped early (the normal case with AdamW), the gradient that it left stays and the adapter responds to the edit
    alone. If an edit does not decrease the edited objective on all examples, the adapter is returned unchanged, and
    `report.verdict` says so.

    Args:
        loss: `loss(params, example)` -> a scalar or (sum, weight), or a `Loss`; without dropout. Its parameters are
            float32 or wider, even if the adapter has 16 bits: the edit is rounded once, at the end.
        adapter: a pytree of floating point arrays, trained on `dataset` with the reduction and weight decay of `config`.
        dataset: a dictionary of arrays with a leading example axis, a Grain source, or a `Dataset`.
        edits: a list of `Remove`, `ModifyQuery`, `CorrectResponse`, `MaskTokens`, each example in at most one of them.
        config: an `ErasureConfig`, or a mapping of its fields, with "preset": "best" (default), "paper" or "repo".
        solver: replaces the config's, such as `unlearn_jax.cg(rtol=.01, preconditioner=unlearn_jax.nystrom(rank=50))`.
        mesh: spreads the examples over its axes `data` and `fsdp`.
        weights: [n], how much each example counted in training.
        held_out: examples like those of the dataset, for damping "held_out"; by default those that the curvature does not use.

    Returns:
        The adapter in its dtypes, the delta in float32 or wider, and a report.

    Raises:
        ValueError: the edit cannot be computed: a loss that is not differentiable, not deterministic, or does not depend on
            the adapter; edits or a configuration that are malformed.
        FloatingPointError: losses or gradients that are not finite; the examples are named.

    A later request starts from the edited adapter and the edited data:

        first = erase(loss, adapter, data, [Remove([3])])
        second = erase(loss, first.adapter, apply(Dataset.of(data), [Remove([3])]), [Remove([5])])
    """
    start = time.perf_counter()
    config = resolve(config, solver)
    curvature = config.curvature or ("ggn" if isinstance(loss, Loss) else "hessian")
    config = dataclasses.replace(config, curvature=curvature)
    if curvature in ("ggn", "fisher"):
        require_parts(loss, f"curvature={curvature!r}")
    before = Dataset.of(dataset, weights)
    after = apply(before, edits, loss)
    loss, adapter = on_mesh(loss, mesh), on_mesh(adapter, mesh)
    check_params(adapter)
    wide = widen(adapter)
    check_widened(loss, adapter, wide, before.example(0))
    check_loss(loss, wide, before.example(0))
    problem = make_problem(loss, wide, before, after, config, mesh)
    check_differentiable(problem.curved, wide, product_kind(config))
    unseen = None
    if config.damping == "held_out":
        stand_in = _left_out(before, after, problem) if held_out is None else Dataset.of(held_out)
        unseen = make_problem(loss, wide, before, after, config, mesh, stand_in)
    descent = newton(problem, wide, config, unseen)
    if problem.touched and not descent.depends:
        raise ValueError(
            "the gradient of the loss is zero in every parameter of the adapter, on all examples: the loss does not depend on "
            "the adapter (does it use the params that it is given, or others from an enclosing scope?)"
        )

    delta, J, work = descent.delta, descent.J, descent.work
    steps, finish = descent.steps, descent.finish
    edited = jax.block_until_ready(jax.tree.map(lambda x, p: x.astype(p.dtype), add(wide, delta), adapter))
    moved = tree.sub(widen(edited), wide)
    predicted = sum(step.predicted for step in steps) + (finish.predicted if finish else 0.0)
    actual = sum(step.actual for step in steps) + (finish.actual if finish else 0.0)
    size, rounding, by_rounding = float(norm(delta)), 0.0, 0.0
    if any(p.dtype != w.dtype for p, w in zip(jax.tree.leaves(adapter), jax.tree.leaves(wide), strict=True)) and size:
        rounding = float(norm(tree.sub(moved, delta))) / size
        by_rounding = J.change(moved) - actual  # the change of J by rounding
        work.forwards(problem.edited, 1)
    actual += by_rounding
    verdict, reason = _verdict(descent, size, float(norm(moved)), predicted, actual)
    limits = [*descent.limits, *_limits(descent, config, rounding, actual, work.spent / len(before))]
    if verdict != "edited":
        edited, delta, size, rounding, predicted, actual = adapter, tree.zeros_like(delta), 0.0, 0.0, 0.0, 0.0
    for message in [*([f"not improved: {reason}"] if verdict == "not_improved" else []), *map(str, limits)]:
        warnings.warn(message, stacklevel=2)
    last = steps[-1] if steps else None
    counts: dict[str, int] = {}
    for edit in edits:
        counts[type(edit).__name__] = counts.get(type(edit).__name__, 0) + len(edit.ids)
    report = Report(
        verdict=verdict,
        reason=reason,
        limits=limits,
        edits=counts,
        examples=len(before),
        edited=problem.touched,
        sampled=len(problem.sample),
        config=config,
        residual_gradient=descent.residual_gradient,
        right_side=descent.right_side,
        unfinished=_unfinished(descent),
        delta_norm=size,
        adapter_norm=float(norm(wide)),
        rounding=rounding,
        residual=last.residual if last else 0.0,
        negative_curvature=any(step.negative_curvature for step in steps),
        damping=last.damping if last else 0.0,
        step_size=last.step_size if last else 0.0,
        predicted=predicted,
        actual=actual,
        loss_before=descent.loss[0],
        loss_after=descent.loss[1] + by_rounding if verdict == "edited" else descent.loss[0],
        steps=steps,
        finish=finish,
        example_gradients=work.spent,
        epochs=work.spent / len(before),
        seconds=time.perf_counter() - start,
        memory=_peak_memory(),
    )
    return Erasure(edited, delta, report)


def _verdict(descent: Descent, size: float, moved: float, predicted: float, actual: float) -> tuple[Verdict, str]:
    """The verdict and the reason for it."""
    config = descent.work.config
    if not descent.right_side:
        return "nothing_to_do", "the edits leave the gradient of the objective exactly as it was"
    if not size:
        return "not_improved", "no step that was tried lets the edited objective of all examples fall"
    if not moved:
        return "not_improved", f"the delta, {size:.2g} long, is lost in rounding to the adapter's dtype"
    if not config.line_search:
        return "edited", f"by the step that was asked for, unjudged: the edited objective changed by {actual:+.3g}"
    if abs(actual) <= descent.rounding and abs(predicted) <= descent.rounding:
        return "edited", (
            f"by a step too small to be judged: the predicted change of the edited objective is {predicted:+.2g}, and changes "
            f"below {descent.rounding:.2g} are rounding"
        )
    if not actual < 0:
        return "not_improved", f"the edited objective of all examples would have changed by {actual:+.3g}"
    return "edited", f"the edited objective of all examples fell by {-actual:.3g}"


def _unfinished(descent: Descent) -> float:
    return descent.residual_gradient / descent.right_side if descent.right_side else 0.0


def _limits(descent: Descent, config: ErasureConfig, rounding: float, actual: float, epochs: float) -> Iterator[Limit]:
    """The limits that belong to no step."""
    unfinished = _unfinished(descent)
    if unfinished > UNFINISHED and config.residual == "drop":
        yield Limit(
            "unconverged",
            f"training had not converged: |grad R| is {descent.residual_gradient:.2g} at the adapter, {unfinished:.2g} times "
            f"the right side of the edit ({descent.right_side:.2g}). Of training that was stopped early this is as it "
            f"should be: the edit aims at a retrain by the same recipe, keeps that gradient as it is, and no L-BFGS follows "
            f"the step. Only where retrains would run to the minimum set residual='keep'",
        )
    if config.residual == "keep" and descent.edit and descent.residual_gradient > UNFINISHED * descent.edit:
        before, after = descent.loss
        yield Limit(
            "went_on",
            f"residual='keep' went on training: |grad R| was {descent.residual_gradient:.2g} at the adapter, the part of the "
            f"edits {descent.edit:.2g}, and the loss on the edited data went from {before:.3g} to {after:.3g}. A retrain by a "
            f"recipe that stops early does not come there: residual='drop' aims at that one",
        )
    if rounding > ROUNDED:
        yield Limit(
            "rounding",
            f"rounding to the adapter's dtype changed {rounding:.2g} of the delta: keep the edited adapter in float32",
        )
    if not config.line_search and actual > 0:
        yield Limit("rose", f"the edited objective of all examples rose by {actual:.3g}, and line_search is off")
    if epochs > config.budget:
        yield Limit(
            "budget", f"the edit cost {epochs:.3g} epochs of gradients, more than its budget of {config.budget:g}"
        )
    if config.training_epochs is not None and epochs > config.training_epochs:
        yield Limit(
            "dearer",
            f"the edit cost {epochs:.3g} epochs of gradients, the training {config.training_epochs:g}: a retrain would have "
            f"been cheaper, and exact",
        )


def _left_out(before: Dataset, after: Dataset, problem: Problem) -> Dataset:
    """Unedited examples that the curvature does not use, at most as many as it does use."""
    _, _, others = affected(before, after)
    rest = others[~np.isin(before.ids[others], problem.sample)]
    if not len(rest):
        raise ValueError(
            "damping 'held_out' needs examples that the curvature was not taken of: give held_out, or set "
            f"curvature_examples below the {len(others)} that the edits do not touch"
        )
    return before.select(rest[: len(problem.sample)])


def _peak_memory() -> int:
    """Bytes: the peak of any device, or of the process where devices do not report theirs."""
    peaks = [stats.get("peak_bytes_in_use", 0) for x in jax.local_devices() if (stats := x.memory_stats())]
    return int(max(peaks, default=0)) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
