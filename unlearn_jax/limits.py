"""Records of the steps of an edit, and the limits that they met: what a report shows beside the result."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal

from unlearn_jax.config import ErasureConfig

DOUBTED = 0.25  # ratio of actual to predicted change below which the quadratic model is not trusted


@dataclasses.dataclass(frozen=True)
class NewtonStep:
    """A solve and the step that was taken along its solution."""

    gradient: float  # |grad J| before the step, which is the norm of the right side
    curved: int  # examples that the curvature was taken of
    damping: float
    residual: float  # |(A + damping) x - b| / |b| of the solver
    residuals: list[float]  # relative, before each step of the solver and after the last, see `solvers.Info`
    solver_steps: int
    negative_curvature: bool  # seen by the solver
    size: float  # |x|, before the line search
    step_size: float  # the share of x that is taken; 0: J decreases with none
    predicted: float  # change of J by the quadratic model, without the damping
    actual: float  # change of J on all examples
    tried: int  # number of dampings
    seconds: float  # compiling included


@dataclasses.dataclass(frozen=True)
class Finish:
    """The record of L-BFGS, which goes on towards the minimum of J after the last step."""

    evaluations: int  # of J and its gradient
    gradient: float  # |grad J| where it ended
    predicted: float  # change of J by the trapezoidal rule, from the slopes at start and end
    actual: float  # change of J
    seconds: float  # compiling included


LimitKind = Literal[
    "solver",  # the solver of a step stopped before its tolerance
    "negative_curvature",  # the solver met a direction along which the damped curvature is not positive
    "refused",  # with no damping did the objective decrease as the quadratic model predicted
    "shortened",  # only a share of a step was taken
    "too_small",  # the predicted change of a step is within rounding
    "promise",  # a step changed the objective by much less than predicted
    "finish",  # L-BFGS stopped before its tolerance, or had no epochs left
    "unconverged",  # training had left a gradient that is large relative to the edit's
    "went_on",  # residual="keep" continued the training
    "rounding",  # the adapter's dtype changed the delta
    "rose",  # the edited objective rose, with `line_search` off
    "budget",  # the edit cost more than its budget
    "dearer",  # the edit cost more than the training
]


@dataclasses.dataclass(frozen=True)
class Limit:
    """A limit that an edit met, or a step that did not change the objective as predicted."""

    kind: LimitKind
    text: str  # what happened, with its numbers

    def __str__(self) -> str:
        return self.text


def limits_of_steps(steps: Sequence[NewtonStep], rounding: float, config: ErasureConfig, follows: bool) -> list[Limit]:
    """The limits that the steps met.

    Args:
        steps: of the edit.
        rounding: changes of J below this are rounding.
        config: of the edit.
        follows: whether L-BFGS goes on after the steps, so that an unfinished solve is no limit.
    """
    return [
        limit
        for number, step in enumerate(steps, 1)
        for limit in _of_step(number, step, len(steps), rounding, config, follows)
    ]


def _of_step(
    number: int, step: NewtonStep, count: int, rounding: float, config: ErasureConfig, follows: bool
) -> Iterator[Limit]:
    which = f"step {number}: " if count > 1 else ""
    if not follows and step.residual > config.solver.rtol:
        text = (
            f"{which}solver {config.solver.name!r} stopped after {step.solver_steps} steps at the residual "
            f"{step.residual:.2g} (rtol {config.solver.rtol:g}): "
            + (f"max_steps is {most}, " if (most := getattr(config.solver, "max_steps", None)) else "")
            + f"the budget {config.budget:g} epochs"
        )
        yield Limit("solver", text)
    if step.negative_curvature:
        yield Limit("negative_curvature", f"{which}negative curvature was met")
    if step.step_size == 0:
        text = f"{which}refused: with none of {step.tried} dampings up to {step.damping:.2g} the objective falls as predicted"
        yield Limit("refused", text)
    elif step.step_size < 1:
        text = f"{which}only {step.step_size:.2g} of the step was taken: beyond that the objective rises"
        yield Limit("shortened", text)
    elif number == 1 and max(abs(step.predicted), abs(step.actual)) <= rounding:
        text = (
            f"{which}too small to be judged: the predicted change is {step.predicted:.2g}, and changes of the objective "
            f"below {rounding:.2g} are rounding"
        )
        yield Limit("too_small", text)
    elif abs(step.predicted) > rounding and not step.actual <= DOUBTED * step.predicted:
        yield Limit(
            "promise", f"{which}the objective changed by {step.actual:+.2g}, predicted was {step.predicted:+.2g}"
        )


def limits_of_finish(
    finish: Finish, tolerance: float, first: float, evaluations: float, config: ErasureConfig
) -> list[Limit]:
    """The limit that L-BFGS met, if it did.

    Args:
        finish: the record of L-BFGS.
        tolerance: of the gradient's norm.
        first: norm of the right side of the first solve.
        evaluations: the most evaluations that it was allowed.
        config: of the edit.
    """
    # With a budget, a remaining gradient is reported where it is larger than the solver of a step may leave.
    wanted = max(tolerance, config.solver.rtol * first) if config.budget < math.inf else tolerance
    if finish.gradient <= wanted:
        return []
    which = "the budget of epochs" if evaluations < config.finish_evaluations else "finish_evaluations"
    stopped = f"at its limit of {evaluations:g} evaluations ({which})"
    if finish.evaluations < evaluations - 1:
        stopped = "where every further decrease is within rounding"
    text = (
        f"L-BFGS stopped {stopped}, after {finish.evaluations}: the gradient is {finish.gradient:.2g} there, "
        f"{finish.gradient / first:.2g} of the edit's right side; wanted was {tolerance:.2g}"
    )
    return [Limit("finish", text)]
