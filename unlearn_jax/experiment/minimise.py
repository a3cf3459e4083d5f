"""Minima tight enough to be held against: an edit's distance from one must not be the reference's own error.

SciPy's L-BFGS-B goes most of the way, and its trust-region Newton method, on exact Hessian products, the rest, past what
saddles there are; Newton steps by its conjugate gradients end it. None of it is code that is judged here but the gradients
and products themselves.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from scipy.optimize import minimize
from scipy.sparse.linalg import LinearOperator, cg

from unlearn_jax.curvature import product
from unlearn_jax.loss import Params
from unlearn_jax.objective import Objective

MEMORY = 30  # pairs of L-BFGS
NEWTON_STEPS = 60


class Minimum(NamedTuple):
    params: Params
    norm: float  # of the gradient there
    start: float  # of the gradient at the start


def minimise(objective: Objective, start: Params, *, tolerance: float, max_steps: int) -> Minimum:
    """From `start` through at most `max_steps` of L-BFGS and then Newton steps.

    Until the gradient's norm is `tolerance`, or as far as rounding lets it: for float64 parameters.
    """
    flat, unravel = ravel_pytree(start)
    unravel = Partial(unravel)

    def value_and_gradient(x):
        value, gradient = _value_and_gradient(objective, unravel, x)
        return float(value), np.asarray(gradient, np.float64)

    def hessian_product(x, v):
        return np.asarray(_hessian_product(objective, unravel, x, v), np.float64)

    options = {"maxiter": max_steps, "maxfun": 2 * max_steps, "maxcor": MEMORY, "ftol": 0.0, "gtol": 0.1 * tolerance}
    first = np.asarray(flat, np.float64)
    begun = float(np.linalg.norm(value_and_gradient(first)[1]))
    found = minimize(value_and_gradient, first, jac=True, method="L-BFGS-B", options=options)
    options = {"maxiter": NEWTON_STEPS, "gtol": tolerance}
    found = minimize(value_and_gradient, found.x, jac=True, hessp=hessian_product, method="trust-ncg", options=options)
    x, gradient = found.x, found.jac
    # The trust region compares values, and their rounding ends it early: the gradient's norm still tells steps apart.
    while np.linalg.norm(gradient) > tolerance:
        hessian = LinearOperator((x.size, x.size), functools.partial(hessian_product, x), dtype=np.float64)
        step, _ = cg(hessian, -gradient, rtol=1e-6)
        there = value_and_gradient(x + step)[1]
        if not np.linalg.norm(there) < 0.5 * np.linalg.norm(gradient):
            break
        x, gradient = x + step, there
    return Minimum(unravel(x), float(np.linalg.norm(gradient)), begun)


@jax.jit
def _value_and_gradient(objective, unravel, x):
    value, gradient = objective.value_and_gradient(unravel(x))
    return value, ravel_pytree(gradient)[0]


@jax.jit
def _hessian_product(objective, unravel, x, v):
    params = unravel(x)
    return ravel_pytree(product(objective, params, unravel(v), "hessian"))[0] + objective.weight_decay * v
