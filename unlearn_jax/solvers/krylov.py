"""A Krylov space of the right side: (A + damping) x = b for every damping at the price of one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unlearn_jax import tree
from unlearn_jax.solvers.system import Info


@dataclasses.dataclass
class Krylov:
    """Lanczos's basis of b, Ab, A^2 b, ..., orthogonalised in full; `extend` takes a product more.

    `solve(damping)` is the iterate of conjugate gradients from zero on A + damping after as many products: the space does not
    depend on the damping. A is symmetric; the driver runs on the host, so that each product may be weighed before it is made.
    """

    size: float  # |b|
    basis: list  # orthonormal, one more than products
    T: np.ndarray  # float64 [products + 1, products]: A basis[:-1] = basis T

    @classmethod
    def of(cls, b) -> "Krylov":
        unit, size = _unit(b)
        return cls(float(size), [unit], np.zeros((1, 0)))

    @property
    def steps(self) -> int:
        return self.T.shape[1]

    @property
    def exhausted(self) -> bool:
        """Nothing is left of the space: the solutions are exact."""
        return self.steps > 0 and self.T[-1, -1] <= self._rounding()

    def extend(self, matvec) -> None:
        """matvec: v -> A v, in the dtypes of b"""
        w, column = matvec(self.basis[-1]), np.zeros(self.steps + 2)
        for _ in range(2):
            for i, v in enumerate(self.basis):
                c = _inner(v, w)
                column[i] += float(c)
                w = _add_scale(w, -c, v)
        unit, rest = _unit(w)
        column[-1] = float(rest)
        if not np.isfinite(column).all():
            raise FloatingPointError("a curvature product is not finite: it overflows")
        self.T = np.pad(self.T, ((0, 1), (0, 1)))
        self.T[:, -1] = column
        self.basis.append(unit)

    def values(self) -> np.ndarray:
        """Ritz values of A, ascending, [products]"""
        return np.linalg.eigvalsh(self._projected())

    def coefficients(self, damping: float) -> np.ndarray:
        """Of the solution in the basis, [products]"""
        right = np.zeros(self.steps)
        right[0] = self.size
        return np.linalg.solve(self._projected() + damping * np.eye(self.steps), right)

    def residual(self, damping: float) -> float:
        """|(A + damping) x - b| / |b| of the solution"""
        y = self.coefficients(damping)
        error = self.T @ y
        error[:-1] += damping * y
        error[0] -= self.size
        return float(np.linalg.norm(error) / self.size)

    def solve(self, damping: float):
        """(x, Info)"""
        y = self.coefficients(damping)
        x = optax.tree.zeros_like(self.basis[0])
        for c, v in zip(y, self.basis, strict=False):
            x = _add_scale(x, c, v)
        residual = jnp.asarray(self.residual(damping), jnp.float32)
        negative = jnp.asarray(self.values()[0] + damping <= 0)
        return x, Info(residual, jnp.asarray(self.steps), negative, jnp.stack([jnp.ones_like(residual), residual]))

    def bend(self, damping: float) -> float:
        """x . A x of the solution"""
        y = self.coefficients(damping)
        return float(y @ self._projected() @ y)

    def pairs(self):
        """(v, A v) of every vector that was multiplied"""
        for i, v in enumerate(self.basis[:-1]):
            image = optax.tree.zeros_like(v)
            for c, u in zip(self.T[:, i], self.basis, strict=True):
                image = _add_scale(image, c, u)
            yield v, image

    def _projected(self) -> np.ndarray:
        square = self.T[:-1]
        return (square + square.T) / 2

    def _rounding(self) -> float:
        eps = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(self.basis[0]))
        return 10 * eps * float(np.abs(self.T).max(initial=0))


_unit = jax.jit(tree.unit)
_inner = jax.jit(optax.tree.vdot)


@jax.jit
def _add_scale(x, c, v):
    return jax.tree.map(lambda x, v: x + jnp.asarray(c, x.dtype) * v, x, v)
