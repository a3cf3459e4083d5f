"""What the solvers of (A + damping) x = b share: the base class, the report, the damped product and the true residual."""

import abc
import dataclasses
import numbers
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from unlearn_jax import tree
from unlearn_jax.arrays import Array, Params, Product, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solver(abc.ABC):
    """A way to solve (A + damping) x = b, as a hashable value. Its method `solve` takes A in the form that `takes` names.

    takes: "products": a function v -> A v
           "micro_batches": a function (v, k) -> A_k v, the product of step k's mini-batch
           "gradients": A = sum_i w_i g_i g_i' as a stack of per-example gradients, each leaf [n, ...]
    divides: whether it divides by the damping, which then must be positive
    """

    takes: ClassVar[Literal["products", "micro_batches", "gradients"]]
    divides: ClassVar[bool] = False
    solve: ClassVar[Callable[..., "Solution"]]

    rtol: float = 0.1  # the aim for |(A + damping) x - b| / |b|: iterations stop there, a larger value is reported

    def __post_init__(self) -> None:
        """Raises ValueError for impossible settings."""
        if not self.rtol >= 0:
            raise ValueError(f"rtol must not be negative: {self.rtol}")
        for name in ("max_steps", "rank", "max_side"):
            value = getattr(self, name, None)
            if value is not None and value < 0:
                raise ValueError(f"{name} must not be negative: {value}")

    @property
    def name(self) -> str:
        """What configurations call it."""
        return type(self).__name__


class Info(NamedTuple):
    """The report of a solve.

    residual: |(A + damping) x - b| / |b| of the solution returned; 0 where b is zero
    steps: iterations taken, of one product each; 1 for a direct solver
    negative_curvature: whether a direction was met along which the damped curvature is not positive
    residuals: float32 [max_steps + 1], the relative residual before each step and after the last, as the solver's own
        recurrence has it; nan beyond the steps taken. Of a solver without a recurrence [2]: before and after
    """

    residual: Array
    steps: Array
    negative_curvature: Array
    residuals: Array


Solution = tuple[Params, Info]  # x, and the report


def working_dtype(b: Params) -> Any:
    """Float32, or wider where a leaf of b is."""
    return jnp.result_type(jnp.float32, *jax.tree.leaves(b))


def system(matvec: Callable[..., Params], b: Params, damping: Scalar) -> tuple[Callable[..., Params], Params]:
    """The damped product and the right side, both in the working dtype.

    `matvec` is handed vectors of b's own dtypes, because `jax.jvp` wants tangents of its parameters' dtypes. Further
    arguments of the product (the index of a mini-batch) go on to `matvec`.
    """
    dtype = working_dtype(b)
    damping = jnp.asarray(damping, dtype)

    def product(v, *index):
        Av = matvec(tree.cast_like(v, b), *index)
        same_shapes(Av, v)
        return jax.tree.map(lambda h, x: h.astype(dtype) + damping * x, Av, v)

    return product, tree.cast(b, dtype)


def same_shapes(Av: Params, v: Params) -> None:
    """Raises ValueError unless a product has the structure and the shapes of its vector."""
    if (got := jax.tree.structure(Av)) != (wanted := jax.tree.structure(v)):
        raise ValueError(f"matvec returned {got} for a vector {wanted}")
    for (path, h), x in zip(jax.tree.leaves_with_path(Av), jax.tree.leaves(v), strict=True):
        if jnp.shape(h) != jnp.shape(x):
            where = jax.tree_util.keystr(path)
            raise ValueError(f"matvec returned shape {jnp.shape(h)} at {where} for a vector of shape {jnp.shape(x)}")


def positive(damping: Scalar, solver: str) -> None:
    """Raises ValueError for a damping, given as a number, that `solver` cannot divide by."""
    if isinstance(damping, numbers.Real) and not float(damping) > 0:
        raise ValueError(f"{solver} divides by the damping, which has to be positive: {damping}")


def relative_residual(matvec: Product, x: Params, b: Params, *, damping: Scalar = 0.0) -> Array:
    """|(A + damping) x - b| / |b|; 0 where b is zero and x solves it."""
    product, wide = system(matvec, b, damping)
    error = tree.sub(product(tree.cast_like(x, wide)), wide)
    return relative_norm(error, wide)


def relative_norm(error: Params, b: Params) -> Array:
    """|error| / |b|, or |error| where b is zero."""
    norm = tree.unit(b)[1]
    return tree.unit(error)[1] / jnp.where(norm == 0, 1, norm)


def direct(residual: Array, negative_curvature: bool | Array = False) -> Info:
    """The report of a solver that does not iterate."""
    residuals = jnp.stack([jnp.where(residual == 0, 0, 1), residual]).astype(jnp.float32)
    return Info(residual, jnp.asarray(1), jnp.asarray(negative_curvature), residuals)
