"""Newton steps from the parameters that minimised the objective before an edit to those that minimise the one after it.

R is the objective before the edit and R' the one after it. From the trained parameters params_0 the steps minimise

    J(params) = R'(params) - tilt . (params - params_0),    tilt = grad R(params_0)  (residual "drop")  or 0  ("keep").

Training that stopped early leaves a gradient grad R(params_0) that is not zero. With the tilt params_0 is a stationary point of J
for an edit that changes nothing, so that the steps respond to the edit alone. Each step solves

    (J'' + damping) step = -grad J,

and is evaluated by J on all examples, whichever examples it was solved on. With a damping from the spectrum the solver builds a
Krylov space of the right side, which holds the solutions for all dampings: a step that improves J by less than predicted costs no
second solve, but only a forward pass. With a budget of few epochs the space is small, and its solutions are those of conjugate
gradients stopped early: they grow in length from zero, descend on the quadratic model of all examples and barely move along flat
directions.

If the configuration does not set the number of steps, there is one. L-BFGS, which is given the products of that step, then goes
on towards the minimum of J, for one gradient an iteration.
"""

import dataclasses
import math
import operator
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from unlearn_jax import tree
from unlearn_jax.arrays import Params
from unlearn_jax.checks import all_finite, check_finite, check_gradient
from unlearn_jax.config import ErasureConfig
from unlearn_jax.cost import Cost
from unlearn_jax.curvature import linearized, product
from unlearn_jax.lbfgs import Known, lbfgs
from unlearn_jax.limits import DOUBTED, Finish, Limit, NewtonStep, limits_of_finish, limits_of_steps
from unlearn_jax.objective import FORWARD, Objective, widen
from unlearn_jax.problem import Problem
from unlearn_jax.solve import SPECTRUM_STEPS, curved, product_kind, solve, spectrum_damping
from unlearn_jax.solvers import Info, Krylov, cg, minres

ARMIJO = 1e-4  # share of the decrease predicted by the slope that a step must reach (Nocedal and Wright, 3.1)
DAMPING_STEP = 10.0  # between a damping and the next
TRUSTED = 0.75  # ratio of actual to predicted change above which the damping falls; below `DOUBTED` it rises
EXCEEDED = 1 / TRUSTED  # the ratio above which the decrease of a steep J is due to its tilt
UNFINISHED = 3.0  # times the edit's right side: a larger gradient left by training counts as a limit
GRID = (1e-2, 1e-1, 1.0, 1e1, 1e2)  # dampings tried on held-out data, times that of the spectrum
SHARE = 0.25  # of a budget that is spent on products if L-BFGS follows, which estimates the curvature from gradients


class Descent(NamedTuple):
    """The result of `newton`."""

    delta: Params  # float32 or wider
    steps: list[NewtonStep]
    finish: Finish | None
    residual_gradient: float  # |grad R(params_0)|
    right_side: float  # |b| of the first solve
    edit: float  # |grad R - grad R'|, the part of the right side that the edits cause
    depends: bool  # whether the gradient of the data's part is not exactly zero
    loss: tuple[float, float]  # R' before and after
    limits: list[Limit]  # that the steps and L-BFGS met
    rounding: float  # changes of J below this are rounding
    J: "Tilted"  # around params_0
    work: "Cost"


@dataclasses.dataclass(frozen=True, eq=False)
class Tilted:
    """J, around the parameters of the current step."""

    objective: Objective
    tilt: Params
    params: Params
    sums: jax.Array  # of every example, at params
    steep: bool  # the tilt is larger than the edit's gradient, so that J may decrease because of the tilt, away from any retrain

    def responds(self, attempt: "Attempt") -> bool:
        """Whether the decrease of J is a response to the edit, by the quadratic model."""
        return not self.steep or attempt.ratio <= EXCEEDED

    def change(self, step: Params) -> float:
        """J(params + step) - J(params), summed over the differences of the examples; may be nan or inf."""
        return float(finished(_change(self.objective, self.tilt, self.params, self.sums, step)))

    def value(self) -> float:
        """The edited objective R' at params."""
        return float(_value(self.objective, self.params, self.sums))

    def rounding(self) -> float:
        """The smallest change of J that is more than rounding error."""
        scale = _scale(self.objective, self.sums)
        return 4 * float(jnp.finfo(scale.dtype).eps * scale)


class Solution(NamedTuple):
    """A solution of (A + damping) x = b."""

    damping: float
    x: Params
    info: Info
    slope: float  # of J along x
    bend: float  # x . (A + weight_decay) x


Solve = Callable[[float], Solution]


class Attempt(NamedTuple):
    """A solution, and the change of J along it."""

    solution: Solution
    step_size: float
    predicted: float
    actual: float

    @property
    def damping(self) -> float:
        """The damping of the solution."""
        return self.solution.damping

    @property
    def ratio(self) -> float:
        """The ratio of the actual to the predicted change of J."""
        ratio = self.actual / self.predicted if self.predicted < 0 else 0.0
        return ratio if math.isfinite(ratio) else 0.0

    @property
    def trusted(self) -> bool:
        """Whether the quadratic model is accurate enough for a longer step."""
        return self.step_size == 1 and self.ratio > TRUSTED and not bool(self.solution.info.negative_curvature)


def newton(problem: Problem, params: Params, config: ErasureConfig, held_out: Problem | None = None) -> Descent:
    """Descends from the trained parameters: `config.newton_steps` steps, or one and L-BFGS.

    Args:
        problem: the objectives before and after the edit.
        params: the trained parameters, float32 or wider.
        config: with `curvature` set.
        held_out: the problem on other examples, by which the damping is then chosen.

    Returns:
        The delta, and how it was computed.

    Raises:
        FloatingPointError: a loss, a gradient or a solution is not finite.
    """
    began, steps, work = time.perf_counter(), [], Cost(problem, config)
    work.constants(problem.edited, problem.leaving, problem.curved if problem.curved is not problem.edited else None)
    if held_out is not None:
        work.constants(held_out.edited)
    sums, gradient, change = _first_pass(problem, params, work)
    residual = tree.add(gradient, change)
    residual_gradient = _residual_norm(problem.edited, params, gradient, residual)
    if config.residual == "drop":
        tilt, b = residual, change
    else:
        tilt, b = tree.zeros_like(gradient), tree.scale(-1, gradient)
    if problem.first_order is not None:
        b = finished(problem.first_order.gradient(params))
        work.gradients(problem.first_order)
    first = size = float(norm(b))
    tilted = residual_gradient if config.residual == "drop" else 0.0
    steep = tilted > UNFINISHED * first
    # Below the size of the tilt the gradient is mostly the tilt's; following it where J is flat leads far away.
    follows = config.newton_steps is None and not steep and held_out is None
    start = J = Tilted(problem.edited, tilt, params, sums, steep)
    delta, damping, best, pairs = tree.zeros_like(b), None, None, []
    while size and len(steps) < (config.newton_steps or 1):
        now, key = add(params, delta), jax.random.fold_in(jax.random.key(config.seed), len(steps))
        if steps:
            sums, gradient = finished(problem.edited.sums_and_gradient(now))
            check_gradient(gradient, problem.edited, now, problem.ids)
            work.gradients(problem.edited)
            J, b = Tilted(problem.edited, tilt, now, sums, steep), tree.sub(tilt, gradient)
            size = float(norm(b))
            if not size:
                break
        objective = finished(curved(problem.curved, now, key, config))
        if _by_krylov(config):
            # Where the gradient that training left is nearly as large as the edit's, L-BFGS would stop almost at once.
            shared = follows and work.limited and tilted <= config.solver.rtol * first
            products = work.affordable(objective, config, SHARE if shared else 1.0)
            whole = problem.curved is problem.edited
            if shared and products == 1 and problem.quarter is not None:
                # A single product determines only the length of the step, for which a quarter of the examples suffices.
                objective, whole = finished(curved(problem.quarter(), now, key, config)), False
                work.constants(objective)
            space, initial = _krylov_space(objective, now, b, damping, config, work, products)
            solution = _by_space(space, objective, b)
            pairs = space.pairs() if whole else []  # the curvature of a sample is not that of J
        else:
            initial = _initial_damping(objective, now, damping, key, config, work)
            solution, pairs = _by_solver(objective, now, b, key, config, work), []
        if held_out is not None and damping is None:
            best, tried = _choose(solution, initial, J, held_out, now, config, work), len(GRID)
        else:
            best, tried = _descend(solution, initial, J, config, work)
        info = best.solution.info
        damping = best.damping if isinstance(config.damping, float | int) else _adapted(best)
        delta = tree.add_scale(delta, best.step_size, best.solution.x)
        ended = time.perf_counter()
        steps.append(
            NewtonStep(
                gradient=size,
                curved=objective.count,
                damping=best.damping,
                residual=float(info.residual),
                residuals=[x for x in np.asarray(info.residuals, float).tolist() if math.isfinite(x)],
                solver_steps=int(info.steps),
                negative_curvature=bool(info.negative_curvature),
                size=float(norm(best.solution.x)),
                step_size=best.step_size,
                predicted=best.predicted,
                actual=best.actual,
                tried=tried,
                seconds=ended - began,
            )
        )
        began = ended
        # Stop if nothing is left to gain, or if J decreases with no damping. J is quadratic in the error that `rtol` limits.
        # With residual "keep" there is no such scale.
        enough = config.solver.rtol**2 * abs(sum(step.actual for step in steps)) if config.residual == "drop" else 0.0
        stuck = best.step_size == 0 and damping > best.damping
        if abs(best.actual) <= max(J.rounding(), enough) and not stuck:
            break
    limits = limits_of_steps(steps, J.rounding(), config, follows)
    finish = None
    if steps and follows and best is not None:
        tolerance = max(config.solver.rtol**2 * first, tilted)
        evaluations = min(config.finish_evaluations, int(work.left / work.epoch) if work.limited else math.inf)
        if evaluations > 1:
            known = None
            if best.step_size:
                known = Known(tree.zeros_like(b), tree.scale(-1, b), _regularised(pairs, problem))
            delta, finish = _finish(start, delta, tolerance, evaluations, known, work)
            limits += limits_of_finish(finish, tolerance, first, evaluations, config)
        else:
            limits.append(
                Limit("finish", f"the budget of {config.budget:g} epochs left none for L-BFGS after the first step")
            )
    loss = start.value()
    change_of_J = sum(step.actual for step in steps) + (finish.actual if finish else 0.0)
    after = loss + change_of_J + float(inner(tilt, delta))
    return Descent(
        delta=delta,
        steps=steps,
        finish=finish,
        residual_gradient=residual_gradient,
        right_side=first,
        edit=float(norm(change)),
        depends=any(not idle for idle in jax.tree.leaves(_idle(problem.edited, params, gradient))),
        loss=(loss, after),
        limits=limits,
        rounding=start.rounding(),
        J=start,
        work=work,
    )


def _first_pass(problem: Problem, params: Params, work: Cost) -> tuple[jax.Array, Params, Params]:
    """(sums of the edited data's examples, grad R', grad R - grad R') at params."""
    sums, gradient = finished(problem.edited.sums_and_gradient(params))
    work.gradients(problem.edited)
    check_gradient(gradient, problem.edited, params, problem.ids)
    change = finished(problem.change(params, gradient))
    if problem.leaving is not None:
        check_gradient(change, problem.leaving, params, problem.touched_ids)
        check_finite(finished(problem.leaving.per_example(params)), problem.touched_ids)
    check_finite(sums, problem.ids)
    work.gradients(problem.leaving, 1 if problem.shrink == 1 else 2)
    return sums, gradient, change


def _idle(objective: Objective, params: Params, gradient: Params) -> Params:
    """For each array, whether the data has no gradient in it, so that all of its gradient is weight decay's."""
    decay = float(objective.weight_decay)

    def idle(g, p):
        return bool(jnp.abs(g - decay * p.astype(g.dtype)).max() <= 1e-6 * decay * jnp.abs(p).max())

    return jax.tree.map(idle, gradient, params)


def _residual_norm(objective: Objective, params: Params, gradient: Params, residual: Params) -> float:
    """|grad R| over the arrays in which the data has a gradient; weight decay alone has not shrunk the others yet."""
    idle = _idle(objective, params, gradient)
    return float(norm(jax.tree.map(lambda idle, r: jnp.zeros_like(r) if idle else r, idle, residual)))


def _by_krylov(config: ErasureConfig) -> bool:
    """Whether the solver is conjugate gradients with a damping that is chosen after the solve."""
    solver = config.solver
    return isinstance(solver, cg) and solver.preconditioner is None and isinstance(config.damping, str)


def _krylov_space(
    objective: Objective,
    params: Params,
    b: Params,
    damping: float | None,
    config: ErasureConfig,
    work: Cost,
    products: int,
) -> tuple[Krylov, float]:
    """The Krylov space of b, extended until its solution reaches `rtol` or the products are used up, and the damping."""
    kind, decay = product_kind(config), float(objective.weight_decay)
    if config.linearize:
        matvec = linearized(objective, params, kind)
    else:
        matvec = lambda v: product(objective, params, v, kind)
    space = Krylov.of(b)
    while True:
        space.extend(lambda v: finished(matvec(v)))
        work.products(objective, 1, config)
        values = [float(x) for x in space.values()]
        if damping is None:
            mu = config.damping_fraction * max(values[-1], 0.0) + 2 * max(-values[0], 0.0)
        else:
            mu = max(damping, -2 * (values[0] + decay))
        if not mu + decay > 0:
            mu = float(jnp.finfo(jnp.float32).eps) * max(*map(abs, values), space.size)
        if space.residual(mu + decay) <= config.solver.rtol or space.exhausted or space.steps >= products:
            return space, mu


def _by_space(space: Krylov, objective: Objective, b: Params) -> Solve:
    decay = float(objective.weight_decay)

    def solution(damping):
        x, info = space.solve(damping + decay)
        x = tree.cast_like(x, b)
        return Solution(damping, x, info, -float(inner(b, x)), space.bend(damping + decay) + decay * float(inner(x, x)))

    return solution


def _initial_damping(
    objective: Objective, params: Params, damping: float | None, key: jax.Array, config: ErasureConfig, work: Cost
) -> float:
    """The first damping, for a solver that solves for one damping at a time."""
    if damping is not None:
        return damping
    if not isinstance(config.damping, str):
        return float(config.damping)
    work.products(objective, SPECTRUM_STEPS, config)
    return float(spectrum_damping(objective, params, key, config))


def _by_solver(
    objective: Objective, params: Params, b: Params, key: jax.Array, config: ErasureConfig, work: Cost
) -> Solve:
    if work.limited and isinstance(config.solver, cg | minres):
        solver = dataclasses.replace(config.solver, max_steps=work.affordable(objective, config, 1.0))
        config = dataclasses.replace(config, solver=solver)

    def solution(damping):
        x, info = finished(solve(objective, params, b, jnp.asarray(damping), key, config))
        if not bool(all_finite(x)):
            raise FloatingPointError(
                f"solver {config.solver.name!r} diverged with damping {damping:g}: raise the damping, or lower the "
                f"learning_rate of a stochastic solver"
            )
        work.preconditioner(objective, config)
        work.products(objective, 1 + (1 if config.solver.takes == "gradients" else int(info.steps)), config)
        slope = -float(inner(b, x))
        if isinstance(config.solver, cg) and int(info.steps):
            # The residual is orthogonal to the solution, so the curvature along the solution needs no product.
            return Solution(damping, x, info, slope, -slope - damping * float(inner(x, x)))
        Ax = finished(product(objective, params, x, product_kind(config)))
        work.products(objective, 1, config)
        bend = float(inner(x, Ax) + objective.weight_decay * inner(x, x))
        return Solution(damping, x, info, slope, bend)

    return solution


def _descend(solution: Solve, damping: float, J: Tilted, config: ErasureConfig, work: Cost) -> tuple[Attempt, int]:
    """The attempt with the largest decrease of J, and the number of attempts: damping is added until J decreases by less again.

    Where the tilt is steep, only decreases as predicted count; if no attempt has one, the step is not taken.
    """
    # A damping that the user set is not changed: the step is only halved.
    free = config.line_search and isinstance(config.damping, str)
    best, tried = _attempt(solution(damping), J, config, work), 1

    def reaches(share: float) -> bool:
        """Whether the best attempt decreases J by this share of the prediction."""
        return best.ratio >= share and J.responds(best)

    def affordable() -> bool:
        """The budget is exceeded only until a step reaches the required share of its prediction: safety goes before cost."""
        return not reaches(DOUBTED) or work.left >= J.objective.count * FORWARD

    while free and not reaches(TRUSTED) and tried <= config.retries and affordable() and not _below(best, J):
        damping *= DAMPING_STEP
        attempt, tried = _attempt(solution(damping), J, config, work), tried + 1
        if (J.responds(attempt), -attempt.actual) > (J.responds(best), -best.actual):
            best = attempt
        elif reaches(DOUBTED):
            break
    if free and not J.responds(best):
        best = best._replace(step_size=0.0, predicted=0.0, actual=0.0)
    return best, tried


def _below(attempt: Attempt, J: Tilted) -> bool:
    """Whether both the predicted and the actual change are within rounding."""
    predicted = attempt.solution.slope + 0.5 * attempt.solution.bend
    return max(abs(predicted), abs(attempt.actual)) <= J.rounding()


def _attempt(solution: Solution, J: Tilted, config: ErasureConfig, work: Cost) -> Attempt:
    slope, bend = solution.slope, solution.bend
    most = 0 if isinstance(config.damping, str) else config.halvings  # more damping is better than a share of a step
    share, halvings, actual = 1.0, 0, J.change(solution.x)
    while config.line_search and not actual <= ARMIJO * share * min(slope, 0.0) + J.rounding():
        halvings, share = halvings + 1, share / 2
        if halvings > most:
            share, actual = 0.0, 0.0
            break
        actual = J.change(tree.scale(share, solution.x))
    work.forwards(J.objective, 1 + halvings)
    return Attempt(solution, share, share * slope + 0.5 * share**2 * bend, actual)


def _adapted(attempt: Attempt) -> float:
    """The damping of the next step, by the ratio of actual to predicted change of this one (Levenberg 1944, Marquardt 1963)."""
    if attempt.step_size < 1 or attempt.ratio < DOUBTED:
        return attempt.damping * DAMPING_STEP
    return attempt.damping / DAMPING_STEP if attempt.trusted else attempt.damping


def _choose(
    solution: Solve, initial: float, J: Tilted, held_out: Problem, params: Params, config: ErasureConfig, work: Cost
) -> Attempt:
    """The attempt with the largest decrease of J on held-out examples; of size 0 if none decreases it."""
    sums, gradient = finished(held_out.edited.sums_and_gradient(params))
    change = finished(held_out.change(params, gradient))
    tilt = tree.add(gradient, change) if config.residual == "drop" else tree.zeros_like(gradient)
    unseen = Tilted(held_out.edited, tilt, params, sums, J.steep)
    attempts = [_attempt(solution(initial * factor), J, config, work) for factor in GRID]
    scores = [unseen.change(tree.scale(attempt.step_size, attempt.solution.x)) for attempt in attempts]
    work.gradients(held_out.edited)
    work.forwards(held_out.edited, len(attempts))
    finite = [score if math.isfinite(score) else math.inf for score in scores]
    score, best = min(zip(finite, attempts, strict=True), key=operator.itemgetter(0))
    if score < 0:
        return best
    return best._replace(step_size=0.0, predicted=0.0, actual=0.0)


def _regularised(pairs, problem: Problem) -> list[tuple[Params, Params]]:
    """The pairs (v, A v) as (v, J'' v)."""
    decay = float(problem.edited.weight_decay)
    return [(v, tree.add_scale(Av, decay, v)) for v, Av in pairs]


def _finish(
    J: Tilted, delta: Params, tolerance: float, evaluations: float, known: Known | None, work: Cost
) -> tuple[Params, Finish]:
    """Runs L-BFGS from params + delta until |grad J| is at most the tolerance."""
    began = time.perf_counter()
    value = Partial(_change, J.objective, J.tilt, J.params, J.sums)
    options = {"max_evaluations": evaluations, "known": known, "resolution": J.rounding()}
    minimum = lbfgs(value, delta, tolerance=tolerance, **options)
    work.gradients(J.objective, minimum.evaluations)
    actual = minimum.value - float(minimum.values[0])
    if not actual <= 0:
        return delta, Finish(minimum.evaluations, minimum.gradient, 0.0, 0.0, time.perf_counter() - began)
    moved = tree.sub(minimum.params, delta)
    predicted = 0.5 * float(inner(tree.add(*minimum.ends), moved))
    return minimum.params, Finish(minimum.evaluations, minimum.gradient, predicted, actual, time.perf_counter() - began)


@jax.jit
def _scale(objective: Objective, sums: jax.Array) -> jax.Array:
    return objective.whole(objective.coefficients) @ jnp.abs(sums)


@jax.jit
def _value(objective: Objective, params: Params, sums: jax.Array) -> jax.Array:
    wide = widen(params)
    return objective.whole(objective.coefficients) @ sums + 0.5 * objective.weight_decay * tree.vdot(wide, wide)


@jax.jit
def _change(objective: Objective, tilt: Params, params: Params, sums: jax.Array, step: Params) -> jax.Array:
    moved = objective.per_example(add(params, step))
    data = objective.whole(objective.coefficients) @ (moved - sums)
    along = tree.vdot(widen(params), step) + 0.5 * tree.vdot(step, step)
    return data + objective.weight_decay * along - tree.vdot(tilt, step)


@jax.jit
def add(params: Params, step: Params) -> Params:
    """params + step in the dtypes of params."""
    return jax.tree.map(lambda p, s: (p.astype(s.dtype) + s).astype(p.dtype), params, step)


# On CPUs, two programs with collectives that run at the same time can deadlock, waiting for each other's threads.
finished = jax.block_until_ready
norm = jax.jit(tree.norm)
inner = jax.jit(tree.vdot)
