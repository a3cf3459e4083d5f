"""Floating-point operations of a program, counted in its jaxpr.

XLA's `cost_analysis` counts the body of a loop once; here a scan counts as often as it turns. Only products count
(matrix products and convolutions): they are what a matrix ceiling is about.
"""

import math
from collections.abc import Callable

import jax


def count_flops(function: Callable, *args, trips: int = 1, **kwargs) -> int:
    """FLOPs of `function(*args)`. A `while` loop, whose turns nobody knows beforehand, counts `trips` times; of the
    branches of a `cond` the dearest counts.
    """
    return _count(jax.make_jaxpr(lambda *a: function(*a, **kwargs))(*args).jaxpr, trips)


def array_bytes(*trees) -> int:
    """Bytes of all arrays."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trees))


def _count(jaxpr, trips: int) -> int:
    return sum(_equation(equation, trips) for equation in jaxpr.eqns)


def _equation(equation, trips: int) -> int:
    name = equation.primitive.name
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel, layout = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
        return 2 * equation.outvars[0].aval.size * math.prod(kernel) // kernel[layout.rhs_spec[0]]
    if name == "cond":
        return max(_count(branch.jaxpr, trips) for branch in equation.params["branches"])
    inside = sum(_count(jaxpr, trips) for jaxpr in _jaxprs(equation.params.values()))
    return inside * {"scan": equation.params.get("length", 1), "while": trips}.get(name, 1)


def _jaxprs(values):
    for value in values:
        if hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr") and hasattr(value.jaxpr, "eqns"):
            yield value.jaxpr
        elif isinstance(value, tuple | list):
            yield from _jaxprs(value)
