"""Solves (curvature of the objective + weight_decay + damping) x = b with a solver, as one compiled program."""

import dataclasses
import functools

import jax

from unlearn_jax import solvers
from unlearn_jax.arrays import Array, Key, Params, Product, Scalar
from unlearn_jax.config import ErasureConfig
from unlearn_jax.curvature import (
    Curvature,
    linearized,
    micro_batch_product,
    per_example_gradients,
    product,
    sample_labels,
    squared_gradients,
)
from unlearn_jax.loss import Loss
from unlearn_jax.objective import Objective, zeros

SPECTRUM_STEPS = 8  # products that find the largest eigenvalue, to a few per cent


@functools.partial(jax.jit, static_argnames="config")
def solve(
    objective: Objective, params: Params, b: Params, damping: Array, key: Key, config: ErasureConfig
) -> solvers.Solution:
    """Solves with `config.solver`.

    Args:
        objective: whose curvature is taken; for curvature "fisher" its labels must have been drawn already.
        params: the point of the curvature, float32 or wider.
        b: the right side.
        damping: [], in addition to the weight decay.
        key: of random vectors and drawn labels.
        config: with `curvature` set.

    Returns:
        x, float32 or wider, and an `Info`.
    """
    solver, kind = config.solver, product_kind(config)
    shift = damping + objective.weight_decay
    if solver.takes == "gradients":
        weights = objective.whole(objective.coefficients)
        return solver.solve(per_example_gradients(objective, params), b, damping=shift, weights=weights)
    matvec = linearized(objective, params, kind) if config.linearize else product_of(objective, params, kind)
    if solver.takes == "micro_batches":
        solver = _with_rate(solver, matvec, b, shift, key)
        micro_batch = lambda v, index: micro_batch_product(objective, params, v, index, kind)
        return solver.solve(micro_batch, b, damping=shift)
    if isinstance(solver, solvers.lanczos):
        return solver.solve(matvec, b, damping=shift, key=key)
    if isinstance(solver, solvers.cg) and solver.preconditioner is not None:
        preconditioner = _preconditioner(solver.preconditioner, objective, params, matvec, shift, key, config)
        return solver.solve(matvec, b, damping=shift, preconditioner=preconditioner)
    return solver.solve(matvec, b, damping=shift)


@functools.partial(jax.jit, static_argnames="config")
def spectrum_damping(objective: Objective, params: Params, key: Key, config: ErasureConfig) -> Array:
    """`damping_fraction` times the largest eigenvalue, []; more where the curvature is negative."""
    matvec = product_of(objective, params, product_kind(config))
    fraction = config.damping_fraction
    return solvers.fraction_of_largest(matvec, zeros(params), key=key, fraction=fraction, steps=SPECTRUM_STEPS)


def curved(objective: Objective, params: Params, key: Key, config: ErasureConfig) -> Objective:
    """The objective whose curvature products `solve` takes: for the Fisher matrix, with labels drawn at `params`."""
    return sample_labels(objective, params, key) if config.curvature == "fisher" else objective


def product_kind(config: ErasureConfig) -> Curvature:
    """The kind of product for `config.curvature`, after labels have been drawn."""
    assert config.curvature is not None  # `erase` has set it
    return "empirical_fisher" if config.curvature == "fisher" else config.curvature


def product_of(objective: Objective, params: Params, kind: Curvature) -> Product:
    """v -> curvature of the objective's data term times v."""
    return lambda v: product(objective, params, v, kind)


def _with_rate(solver: solvers.Solver, matvec: Product, b: Params, shift: Scalar, key: Key) -> solvers.Solver:
    """A stochastic solver without a learning rate gets half of the inverse of the largest eigenvalue."""
    name = "scale" if isinstance(solver, solvers.lissa) else "learning_rate"
    if getattr(solver, name) is not None:
        return solver
    rate = 0.5 / (solvers.extremes(matvec, b, key=key, steps=SPECTRUM_STEPS)[1] + shift)
    return dataclasses.replace(solver, **{name: 1 / rate if name == "scale" else rate})


def _preconditioner(
    kind: solvers.nystrom | solvers.diagonal | solvers.ekfac,
    objective: Objective,
    params: Params,
    matvec: Product,
    shift: Scalar,
    key: Key,
    config: ErasureConfig,
) -> Product:
    if isinstance(kind, solvers.nystrom):
        return kind.build(matvec, zeros(params), key=key, damping=shift)
    can_draw = isinstance(objective.loss, Loss) and hasattr(objective.loss.criterion, "sample")
    if can_draw and config.curvature != "empirical_fisher":
        objective = sample_labels(objective, params, key)
    if isinstance(kind, solvers.ekfac):
        weights = objective.whole(objective.coefficients)
        return kind.build(per_example_gradients(objective, params), damping=shift, weights=weights)
    return kind.build(squared_gradients(objective, params), damping=shift)
