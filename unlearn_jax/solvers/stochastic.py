"""Solvers that use the curvature of one mini-batch in each step: LiSSA, and LLMEraser's finite-sum quadratic program."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from unlearn_jax import tree
from unlearn_jax.arrays import BatchProduct, Params, Scalar
from unlearn_jax.solvers.base import Info, Solution, Solver, relative_norm, system

if TYPE_CHECKING:
    import optax

Rate = float | jax.Array | Callable[..., jax.typing.ArrayLike]  # a number, or an optax schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class lissa(Solver):
    """LiSSA (Agarwal et al. 2017): the truncated Neumann series by stochastic curvature products."""

    takes = "micro_batches"

    max_steps: int = 30  # products
    # Converges where the eigenvalues of every A_k + damping lie within (0, 2 scale). None: `erase` takes twice the largest.
    scale: float | jax.Array | None = None

    def solve(self, matvec: BatchProduct, b: Params, *, damping: Scalar = 0.0) -> Solution:
        """Solves (A + damping) x = b by u <- b + (1 - damping/scale) u - (A_k u)/scale from u = b, x = u/scale.

        This is `sgd_qp` with learning rate 1/scale, one step ahead. Other implementations take the damping relative to the
        scale; here it is the damping of the system, like everywhere else.

        Args:
            matvec: (v, k) -> A_k v, the product of step k's mini-batch, k = 0 .. max_steps.
            b: the right side.
            damping: [].

        Returns:
            x in the dtypes of b, and an `Info`, whose residuals are those on the mini-batch of each step.

        Raises:
            ValueError: the scale is None.
        """
        scale = _given(self.scale, "lissa", "scale")
        product, wide = system(matvec, b, damping)

        def step(carry, k):
            u, negative = carry
            Au = product(u, k)
            error = jax.tree.map(lambda h, b: h / scale - b, Au, wide)
            moved = tree.where(k < self.max_steps, tree.sub(u, error), u)
            return (moved, negative | (tree.vdot(u, Au) < 0)), relative_norm(error, wide)

        (u, negative), residuals = jax.lax.scan(step, (wide, jnp.asarray(False)), jnp.arange(self.max_steps + 1))
        x = tree.cast_like(tree.scale(1 / scale, u), b)
        return x, Info(residuals[-1], jnp.asarray(self.max_steps), negative, residuals.astype(jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _QuadraticProgram(Solver):
    """min 1/2 x'(A + damping) x - b'x by mini-batches and an optimizer."""

    takes = "micro_batches"

    max_steps: int = 30  # products
    # A number, or an optax schedule. None: `erase` takes half of the inverse of the largest eigenvalue.
    learning_rate: Rate | None = None
    init: float = 0.0  # the start of every coordinate; the released code has another value than 0, a fault
    # Another fault of the released code: a gradient A x/2 + damping x - b, whose root is about twice the solution.
    half_hessian: bool = False

    def optimizer(self) -> "optax.GradientTransformation":
        """The optax optimizer that takes the steps."""
        raise NotImplementedError

    def solve(self, matvec: BatchProduct, b: Params, *, damping: Scalar = 0.0) -> Solution:
        """Minimises the quadratic. A step too long for the curvature diverges, and the residuals show it.

        Args:
            matvec: (v, k) -> A_k v, the product of step k's mini-batch, k = 0 .. max_steps.
            b: the right side.
            damping: [], the same as an L2 term that the optimizer couples to the gradient (torch's Adam(weight_decay)).

        Returns:
            x in the dtypes of b, and an `Info`, whose residuals are those of the system asked for, on the mini-batch of each
            step.

        Raises:
            ValueError: the learning rate is None.
        """
        optimizer = self.optimizer()
        product, wide = system(matvec, b, damping)

        def step(carry, k):
            x, state, negative = carry
            Ax = product(x, k)
            gradient = tree.sub(Ax, wide)
            residual = relative_norm(gradient, wide)
            if self.half_hessian:
                gradient = jax.tree.map(lambda g, h, x: g - (h - damping * x) / 2, gradient, Ax, x)
            updates, state = optimizer.update(gradient, state, x)
            moved = tree.where(k < self.max_steps, tree.add(x, updates), x)
            return (moved, state, negative | (tree.vdot(x, Ax) < 0)), residual

        x = tree.full_like(wide, self.init)
        carry = x, optimizer.init(x), jnp.asarray(False)
        (x, _, negative), residuals = jax.lax.scan(step, carry, jnp.arange(self.max_steps + 1))
        x = tree.cast_like(x, b)
        return x, Info(residuals[-1], jnp.asarray(self.max_steps), negative, residuals.astype(jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class sgd_qp(_QuadraticProgram):
    """The quadratic program of LLMEraser by SGD, the paper's solver. Needs optax.

    The learning rate must be below 2 / (largest eigenvalue of any A_k + damping). A constant one keeps a noise floor on
    mini-batches; an optax schedule that decays lowers it.
    """

    def optimizer(self) -> "optax.GradientTransformation":
        """SGD."""
        import optax  # here, so that `import unlearn_jax` needs jax and numpy only

        return optax.sgd(_given(self.learning_rate, "sgd_qp", "learning_rate"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class adam_qp(_QuadraticProgram):
    """The quadratic program of LLMEraser by Adam, the released code's solver. Needs optax.

    A coordinate moves by about the learning rate in a step whatever b and A are: few steps give a sign, not a solution.
    """

    def optimizer(self) -> "optax.GradientTransformation":
        """Adam."""
        import optax  # here, so that `import unlearn_jax` needs jax and numpy only

        return optax.adam(_given(self.learning_rate, "adam_qp", "learning_rate"))


def _given(value, solver: str, name: str):
    """Returns a setting, or raises ValueError if it is None."""
    if value is None:
        raise ValueError(f"{solver} needs a {name}, which only `erase` can work out: {solver}({name}=...)")
    return value
