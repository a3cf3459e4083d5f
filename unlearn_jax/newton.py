"""Damped Newton steps on the objective after an edit, from the parameters that minimised the one before it.

With R before the edit and R' after it, and both gradients at the trained parameters params_0, what is minimised is

    J(params) = R'(params) - tilt . (params - params_0),    tilt = grad R(params_0)  (residual "drop")  or 0  ("keep").

Training that stopped early leaves grad R(params_0) at some value other than zero. The tilt makes params_0 the stationary
point of J for an edit that changes nothing: J moves by the response to the edit alone. Each step solves

    (J'' + damping) step = -grad J,

and is halved until J falls by a share of what its slope promises. Where the number of steps is left to us there is one of
them, and L-BFGS goes on from there to the minimum of J: damped steps of a curvature that is right at a minimum, or right
nowhere but close, spend more products on the way than it spends gradients.
"""

import dataclasses
import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from unlearn_jax.checks import all_finite, check_gradient
from unlearn_jax.config import ROWS, ErasureConfig
from unlearn_jax.curvature import product
from unlearn_jax.lbfgs import lbfgs
from unlearn_jax.loss import Params
from unlearn_jax.objective import FORWARD, Objective, widen
from unlearn_jax.problem import Problem
from unlearn_jax.solve import SPECTRUM_STEPS, curved, product_kind, solve, spectrum_damping
from unlearn_jax.solvers import Info

HALVINGS = 10
ARMIJO = 1e-4  # share of the slope's promise that a step must keep (Nocedal and Wright, 3.1)
DAMPING_STEP = 10.0  # between the dampings of two steps, where the first is the spectrum's
TRUSTED, DOUBTED = 0.75, 0.25  # share of the predicted change that came true, beyond which the damping falls or rises
UNFINISHED = 3.0  # times the edit's right side, above which what training left undone stands in the way
FINISH = 1000  # evaluations of J and its gradient, at most, on the way to its minimum
GRID = (1e-2, 1e-1, 1.0, 1e1, 1e2)  # dampings tried on held-out data, times that of the spectrum


@dataclasses.dataclass(frozen=True)
class NewtonStep:
    """One solve and what became of it."""

    gradient: float  # |grad J| before the step, which is the norm of the right side
    damping: float
    residual: float  # |(A + damping) x - b| / |b| of the solver
    solver_steps: int
    negative_curvature: bool  # seen by the solver
    size: float  # |x|, before the line search
    step_size: float  # the share of x that is taken; 0: no share of it lets J fall
    predicted: float  # change of J by the quadratic model, damping left out
    actual: float  # change of J
    seconds: float  # compiling included


@dataclasses.dataclass(frozen=True)
class Finish:
    """The way from the last step to the minimum of J, by L-BFGS."""

    evaluations: int  # of J and its gradient
    gradient: float  # |grad J| where it ended
    actual: float  # change of J
    seconds: float  # compiling included


class Descent(NamedTuple):
    """What `newton` returns."""

    delta: Params  # float32 or wider
    steps: list[NewtonStep]
    finish: Finish | None
    residual_gradient: float  # |grad R(params_0)|, as far as the examples looked at tell
    right_side: float  # |b| of the first solve
    example_gradients: float  # work


class Work:
    """Counts example-gradients: one is an example forward and backward. Products count as measured."""

    PRODUCT = {"hessian": 2.1, "ggn": 1.6, "fisher": 1.0, "empirical_fisher": 1.0}

    def __init__(self):
        self.spent = 0.0

    def gradients(self, objective: Objective, times: int = 1) -> None:
        self.spent += times * objective.count

    def forwards(self, objective: Objective, times: int) -> None:
        self.spent += times * objective.count * FORWARD

    def preconditioner(self, objective: Objective, config: ErasureConfig) -> None:
        drawn = FORWARD if config.curvature != "empirical_fisher" else 0  # the labels
        rows = 1 + drawn
        probes = (config.rank or 0) * self.PRODUCT[config.curvature]
        kinds = {None: 0, "diagonal": rows, "ekfac": rows, "nystrom": probes}
        self.spent += objective.count * kinds[config.preconditioner]

    def products(self, objective: Objective, times: int, config: ErasureConfig) -> None:
        self.spent += times * objective.count * self.PRODUCT[config.curvature]


@dataclasses.dataclass(frozen=True, eq=False)
class Tilted:
    """J, around the parameters of the current step."""

    objective: Objective
    tilt: Params
    params: Params
    sums: jax.Array  # of every example, at params
    scale: jax.Array  # the sum of their magnitudes

    @classmethod
    def at(cls, objective: Objective, tilt: Params, params: Params) -> "Tilted":
        return cls(objective, tilt, params, *finished(_sums(objective, params)))

    def change(self, step: Params) -> float:
        """J(params + step) - J(params), from the differences of every example; nan or inf are possible."""
        return float(_change(self.objective, self.tilt, self.params, self.sums, step))

    def rounding(self) -> float:
        """What `change` cannot resolve."""
        return 4 * float(jnp.finfo(self.scale.dtype).eps * self.scale)


class Attempt(NamedTuple):
    """A solve with one damping, and how far along its solution J falls."""

    damping: float
    x: Params
    info: Info
    step_size: float
    predicted: float
    actual: float


def newton(
    problem: Problem,
    params: Params,
    config: ErasureConfig,
    full_gradient: Params | None = None,
    held_out: Problem | None = None,
) -> Descent:
    """The delta that `config.newton_steps` steps make, or one and L-BFGS. `config.curvature` must be set.

    full_gradient: grad R'(params) of all examples, where the residual is kept and `problem` has only some
    held_out:      the problem on examples that are not in `problem`; the one that chooses among dampings
    """
    began, steps, work = time.perf_counter(), [], Work()
    gradient = problem.after.gradient(params)
    check_gradient(gradient, problem.after, params, problem.ids)
    change = problem.change.gradient(params)
    check_gradient(change, problem.change, params, problem.ids)
    work.gradients(problem.after, 2)
    residual = optax.tree.add(gradient, change)
    if config.residual == "drop":
        tilt, b = residual, change
    elif full_gradient is None:
        tilt, b = optax.tree.zeros_like(gradient), optax.tree.scale(-1, gradient)
    else:
        tilt, b = optax.tree.sub(gradient, full_gradient), optax.tree.scale(-1, full_gradient)
    if problem.first_order is not None:
        b = finished(problem.first_order.gradient(params))
        work.gradients(problem.after)

    first, size = float(norm(b)), float(norm(b))
    delta, damping = optax.tree.zeros_like(b), None
    while size and len(steps) < (config.newton_steps or 1):
        now, key = add(params, delta), jax.random.fold_in(jax.random.key(config.seed), len(steps))
        if steps:
            gradient = problem.after.gradient(now)
            check_gradient(gradient, problem.after, now, problem.ids)
            work.gradients(problem.after)
            b = optax.tree.sub(tilt, gradient)
            size = float(norm(b))
        J, objective = Tilted.at(problem.edited, tilt, now), finished(curved(problem.curved, now, key, config))
        work.forwards(problem.edited, 1)
        dampings = _dampings(objective, now, key, config, work) if damping is None else [damping]
        attempts = [_attempt(J, objective, b, damping, key, config, work) for damping in dampings]
        best = attempts[0] if len(attempts) == 1 else _choose(attempts, held_out, now, config, work)
        damping = _adapted(best) if config.damping == "spectrum" else best.damping
        delta = optax.tree.add_scale(delta, best.step_size, best.x)
        ended = time.perf_counter()
        steps.append(
            NewtonStep(
                gradient=size,
                damping=best.damping,
                residual=float(best.info.residual),
                solver_steps=int(best.info.steps),
                negative_curvature=bool(best.info.negative_curvature),
                size=float(norm(best.x)),
                step_size=best.step_size,
                predicted=best.predicted,
                actual=best.actual,
                seconds=ended - began,
            )
        )
        began = ended
        # Nothing left to gain, or no way down with any damping; J is quadratic in the error that `rtol` is of. Training
        # that is finished here as well has no such scale.
        enough = config.rtol**2 * abs(sum(step.actual for step in steps)) if config.residual == "drop" else 0.0
        stuck = best.step_size == 0 and damping > best.damping
        if abs(best.actual) <= max(J.rounding(), enough) and not stuck:
            break
    finish, undone = None, float(norm(residual))
    # A sample's own minimum is not the one that is wanted, and far from one there is none near. A gradient smaller than the
    # tilt would tell of the tilt: where J is flat that leads far away.
    tilted = undone if config.residual == "drop" else 0.0
    if steps and config.newton_steps is None and problem.whole and tilted <= UNFINISHED * first:
        tolerance = max(config.rtol**2 * first, tilted)
        delta, finish = _finish(problem.edited, tilt, params, delta, tolerance, work)
    return Descent(delta, steps, finish, undone, first, work.spent)


def _finish(
    objective: Objective, tilt: Params, params: Params, delta: Params, tolerance: float, work: Work
) -> tuple[Params, Finish]:
    """From params + delta to where |grad J| is the tolerance."""
    began = time.perf_counter()
    J = Tilted.at(objective, tilt, params)
    found = lbfgs(Partial(_change, objective, tilt, params, J.sums), delta, tolerance=tolerance, max_evaluations=FINISH)
    work.forwards(objective, 2)
    work.gradients(objective, found.evaluations)
    actual = J.change(found.params) - float(found.values[0])
    return found.params, Finish(found.evaluations, found.gradient, actual, time.perf_counter() - began)


def _attempt(
    J: Tilted,
    objective: Objective,
    b: Params,
    damping: float,
    key: jax.Array,
    config: ErasureConfig,
    work: Work,
) -> Attempt:
    x, info = solve(objective, J.params, b, jnp.asarray(damping), key, config)
    if not bool(all_finite(x)):
        raise FloatingPointError(
            f"solver {config.solver!r} diverged with damping {damping:g}: raise the damping, or lower the learning_rate "
            f"of a stochastic solver"
        )
    work.preconditioner(objective, config)
    work.products(objective, 1 + (1 if config.solver in ROWS else int(info.steps)), config)
    slope = -float(inner(b, x))
    if config.solver == "cg" and int(info.steps):
        # Its residual is orthogonal to its solution, so the curvature along that needs no product of its own.
        bend = -slope - damping * float(inner(x, x))
    else:
        Ax = finished(product(objective, J.params, x, product_kind(config)))
        work.products(objective, 1, config)
        bend = float(inner(x, Ax) + objective.weight_decay * inner(x, x))
    share, halvings, enough = 1.0, 0, lambda share: ARMIJO * share * min(slope, 0.0) + J.rounding()
    actual = J.change(x)
    while config.line_search and not actual <= enough(share):
        halvings, share = halvings + 1, share / 2
        if halvings > HALVINGS:
            share, actual = 0.0, 0.0
            break
        actual = J.change(optax.tree.scale(share, x))
    work.forwards(J.objective, 1 + halvings)
    return Attempt(float(damping), x, info, share, share * slope + 0.5 * share**2 * bend, actual)


def _dampings(objective: Objective, params: Params, key: jax.Array, config: ErasureConfig, work: Work) -> list[float]:
    """The dampings to try."""
    if not isinstance(config.damping, str):
        return [config.damping]
    middle = float(spectrum_damping(objective, params, key, config))
    work.products(objective, SPECTRUM_STEPS, config)
    return [middle] if config.damping == "spectrum" else [middle * factor for factor in GRID]


def _adapted(attempt: Attempt) -> float:
    """The damping of the next step, by how well the quadratic model foretold this one (Levenberg 1944, Marquardt 1963)."""
    if attempt.step_size < 1 or came_true(attempt) < DOUBTED:
        return attempt.damping * DAMPING_STEP
    return attempt.damping / DAMPING_STEP if trusted(attempt) else attempt.damping


def came_true(attempt: Attempt) -> float:
    """The share of the predicted fall of J that came true."""
    return attempt.actual / attempt.predicted if attempt.predicted < 0 else 0.0


def trusted(attempt: Attempt) -> bool:
    """Whether the quadratic model is to be trusted with a longer step."""
    return attempt.step_size == 1 and came_true(attempt) > TRUSTED and not bool(attempt.info.negative_curvature)


def _choose(attempts: list[Attempt], held_out: Problem, params: Params, config: ErasureConfig, work: Work) -> Attempt:
    """The attempt that lets J of the held-out examples fall the most."""
    gradient = finished(held_out.after.gradient(params))
    change = finished(held_out.change.gradient(params))
    tilt = optax.tree.add(gradient, change) if config.residual == "drop" else optax.tree.zeros_like(gradient)
    J = Tilted.at(held_out.edited, tilt, params)
    scores = [J.change(optax.tree.scale(attempt.step_size, attempt.x)) for attempt in attempts]
    work.gradients(held_out.after, 2)
    work.forwards(held_out.edited, 1 + len(attempts))
    return min(zip(scores, attempts, strict=True), key=lambda pair: pair[0] if math.isfinite(pair[0]) else math.inf)[1]


@jax.jit
def _sums(objective: Objective, params: Params) -> tuple[jax.Array, jax.Array]:
    sums = objective.per_example(params)
    return sums, objective.whole(objective.coefficients) @ jnp.abs(sums)


@jax.jit
def _change(objective: Objective, tilt: Params, params: Params, sums: jax.Array, step: Params) -> jax.Array:
    moved = objective.per_example(add(params, step))
    data = objective.whole(objective.coefficients) @ (moved - sums)
    along = optax.tree.vdot(widen(params), step) + 0.5 * optax.tree.vdot(step, step)
    return data + objective.weight_decay * along - optax.tree.vdot(tilt, step)


@jax.jit
def add(params: Params, step: Params) -> Params:
    """params + step in the dtypes of params."""
    return jax.tree.map(lambda p, s: (p.astype(s.dtype) + s).astype(p.dtype), params, step)


# On CPUs, two programs with collectives under way at once can wait for each other's threads for ever.
finished = jax.block_until_ready
norm = jax.jit(optax.tree.norm)
inner = jax.jit(optax.tree.vdot)
