"""Solvers that need products only: conjugate gradients, MINRES, and the Krylov space that serves every damping at once."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unlearn_jax import tree
from unlearn_jax.arrays import Array, Key, Params, Product, Scalar
from unlearn_jax.solvers.base import Info, Solution, Solver, system
from unlearn_jax.solvers.preconditioners import diagonal, ekfac, nystrom


@dataclasses.dataclass(frozen=True, kw_only=True)
class cg(Solver):
    """Conjugate gradients with a curvature test (Steihaug 1983; Martens 2010), for a symmetric A."""

    takes = "products"

    max_steps: int = 30  # products, at most
    # An approximate inverse that makes steps fewer: `nystrom(rank=50)`, `diagonal()`, `ekfac()`.
    preconditioner: nystrom | diagonal | ekfac | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a preconditioner that is none."""
        super().__post_init__()
        if not isinstance(self.preconditioner, nystrom | diagonal | ekfac | None):
            raise ValueError(f"preconditioner is nystrom(rank=...), diagonal() or ekfac(), not {self.preconditioner!r}")

    def solve(
        self,
        matvec: Product,
        b: Params,
        *,
        damping: Scalar = 0.0,
        x0: Params | None = None,
        preconditioner: Product | None = None,
        key: Key | None = None,
    ) -> Solution:
        """Solves (A + damping) x = b.

        Every iterate from zero lies in the span of A's products, so that flat directions of a singular A (the gauge of
        LoRA's factors) never enter. Stops on a direction of no positive curvature, too (less than rounding of the steepest
        one met). Then the last iterate before it is returned: from zero, the iterates grow in length and descend on the
        quadratic, so it is a safe step. If the very first direction from zero is one, the answer is that direction, b
        itself (or the preconditioned b): a descent step whose length means nothing, which needs a line search.

        The residual reported costs one product more than the steps. The whole is a `while_loop` whose body holds the only
        copy of `matvec`, so it compiles once; a damping of [k] under `jax.vmap` solves for k dampings in blocks.

        Args:
            matvec: v -> A v, for pytrees of b's structure and dtypes.
            b: the right side.
            damping: [], added to the diagonal.
            x0: where to start, instead of zero.
            preconditioner: v -> an approximate positive definite inverse of A + damping times v, as `self.preconditioner`
                builds it; only `nystrom` can be built from products alone, as happens without.
            key: of the random vectors of `nystrom`.

        Returns:
            x in the dtypes of b, and an `Info`.
        """
        product, wide = system(matvec, b, damping)
        # On a unit right side squares cannot under- or overflow, however small a gradient is.
        b_hat, size = tree.unit(wide)
        precondition = self._preconditioner(matvec, b, damping, preconditioner, key)
        eps = jnp.finfo(size.dtype).eps

        def check(s: _CGState, Ax) -> _CGState:
            r = tree.sub(b_hat, Ax)
            z = precondition(r)
            residual = tree.norm(r)
            done = s.stop | (residual <= self.rtol) | (self.max_steps == 0)
            log = jnp.where(s.stop, s.log, s.log.at[s.step].set(residual.astype(jnp.float32)))
            rz = tree.vdot(r, z)
            return s._replace(r=r, p=z, rz=rz, residual=residual, check=jnp.asarray(False), done=done, log=log)

        def step(s: _CGState, Ap) -> _CGState:
            curvature = tree.vdot(s.p, Ap)
            squared = tree.vdot(s.p, s.p)
            # False for a nan, which then runs through x and the residual instead of passing for curvature.
            flat = curvature <= eps * s.steepest * squared
            alpha = s.rz / jnp.where(flat, 1, curvature)
            x = tree.add_scale(s.x, alpha, s.p)
            r = tree.add_scale(s.r, -alpha, Ap)
            z = precondition(r)
            rz = tree.vdot(r, z)
            residual = tree.norm(r)
            taken = s._replace(
                x=x,
                r=r,
                p=tree.add_scale(z, rz / s.rz, s.p),
                rz=rz,
                steepest=jnp.maximum(s.steepest, curvature / squared),
                step=s.step + 1,
                residual=residual,
                log=s.log.at[s.step + 1].set(residual.astype(jnp.float32)),
            )
            only_direction = (s.step == 0) & (x0 is None)
            refused = s._replace(x=tree.where(only_direction, s.p, s.x), negative=jnp.asarray(True))
            s = tree.where(flat, refused, taken)
            stop = flat | ~(s.residual > self.rtol) | (s.step >= self.max_steps)
            return s._replace(stop=stop, check=stop)

        def body(s: _CGState) -> _CGState:
            v = product(tree.where(s.check, s.x, s.p))
            return jax.lax.cond(s.check, check, step, s, v)

        x = tree.zeros_like(b_hat)
        if x0 is not None:
            x = tree.scale(1 / jnp.where(size == 0, 1, size), tree.cast_like(x0, b_hat))
        z = precondition(b_hat)
        residual = tree.norm(b_hat)
        enough = ~(residual > self.rtol) | (self.max_steps == 0)
        start = _CGState(
            x=x,
            r=b_hat,
            p=z,
            rz=tree.vdot(b_hat, z),
            steepest=jnp.zeros_like(residual),
            step=jnp.asarray(0),
            check=jnp.asarray(x0 is not None),
            stop=jnp.asarray(False),
            done=(size == 0) | (enough & (x0 is None)),
            negative=jnp.asarray(False),
            residual=residual,
            log=jnp.full(self.max_steps + 1, jnp.nan, jnp.float32).at[0].set(residual.astype(jnp.float32)),
        )
        end = jax.lax.while_loop(lambda s: ~s.done, body, start)
        x = tree.cast_like(tree.scale(size, end.x), b)
        return x, Info(end.residual, end.step, end.negative, end.log)

    def _preconditioner(self, matvec, b, damping, given, key) -> Product:
        if given is not None:
            return given
        if self.preconditioner is None:
            return lambda r: r
        if not isinstance(self.preconditioner, nystrom):
            raise ValueError(
                f"{self.preconditioner.name!r} is built from per-example gradients: give the solve "
                f"preconditioner={self.preconditioner.name}().build(...)"
            )
        key = jax.random.key(0) if key is None else key
        return self.preconditioner.build(matvec, b, key=key, damping=damping)


@dataclasses.dataclass(frozen=True, kw_only=True)
class identity(Solver):
    """One number as the curvature: gradient ascent at the best length, the baseline for a second-order solve."""

    takes = "products"

    def solve(self, matvec: Product, b: Params, *, damping: Scalar = 0.0) -> Solution:
        """x = b / c, with c the damped curvature along b.

        One product gives c, so that directions are compared, and not learning rates.

        Args:
            matvec: v -> A v.
            b: the right side.
            damping: [], added to the diagonal.

        Returns:
            x in the dtypes of b, and an `Info`.
        """
        return cg(rtol=0.0, max_steps=1).solve(matvec, b, damping=damping)


class _CGState(NamedTuple):
    x: Params
    r: Params  # b - (A + damping) x
    p: Params  # search direction
    rz: Array  # r . M^-1 r
    steepest: Array  # largest curvature seen along a unit direction
    step: Array
    check: Array  # the next product is at x: it gives the true residual, and the directions start afresh from it
    stop: Array  # no more steps
    done: Array  # stopped and checked
    negative: Array
    residual: Array
    log: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class minres(Solver):
    """MINRES (Paige and Saunders 1975): least residual over the Krylov space, for symmetric A of any signature."""

    takes = "products"

    max_steps: int = 30  # products, at most

    def solve(self, matvec: Product, b: Params, *, damping: Scalar = 0.0) -> Solution:
        """Solves (A + damping) x = b from zero; the residual never grows.

        A direction of no positive curvature is reported but not avoided: on an indefinite A the answer is the stationary
        point of the quadratic, which need not be a descent step, so it suits exact Hessians that the damping nearly makes
        definite. A singular A gives the solution without null directions, and the least-squares one where b has no exact
        solution. The residual reported costs one product more than the steps.

        Args:
            matvec: v -> A v, for pytrees of b's structure and dtypes.
            b: the right side.
            damping: [], added to the diagonal.

        Returns:
            x in the dtypes of b, and an `Info`.
        """
        product, wide = system(matvec, b, damping)
        b_hat, size = tree.unit(wide)
        eps = jnp.finfo(size.dtype).eps

        def check(s: _MINRESState, Ax) -> _MINRESState:
            residual = tree.norm(tree.sub(b_hat, Ax))
            return s._replace(phi=residual, done=jnp.asarray(True))

        def step(s: _MINRESState, Av) -> _MINRESState:
            alpha = tree.vdot(s.v, Av)
            Av = tree.add_scale(tree.add_scale(Av, -alpha, s.v), -s.beta, s.v_old)
            v, beta = tree.unit(Av)
            squared = s.squared + alpha**2 + s.beta**2 + beta**2

            delta = s.cos * s.delta_bar + s.sin * alpha
            gamma_bar = s.sin * s.delta_bar - s.cos * alpha
            delta_bar = -s.cos * beta
            # |A r| has come down to rounding: no x makes r smaller, and the next would run along the null space. Where r is a
            # null vector, |A r| / |A| |r| was seen to fall to 1e-5 in float32 and 4e-13 in float64 before it grows again.
            least = jnp.hypot(gamma_bar, delta_bar) <= eps ** (2 / 3) * jnp.sqrt(squared)
            gamma = jnp.hypot(gamma_bar, beta)
            gamma = jnp.where(least, 1, gamma)
            cos, sin = gamma_bar / gamma, beta / gamma

            w = tree.add_scale(tree.add_scale(s.v, -s.epsilon, s.w_old), -delta, s.w)
            w = tree.scale(1 / gamma, w)
            phi = s.phi * sin
            taken = s._replace(
                x=tree.add_scale(s.x, s.phi * cos, w),
                v=v,
                v_old=s.v,
                w=w,
                w_old=s.w,
                beta=beta,
                cos=cos,
                sin=sin,
                delta_bar=delta_bar,
                epsilon=s.sin * beta,
                phi=phi,
                squared=squared,
                step=s.step + 1,
                log=s.log.at[s.step + 1].set(phi.astype(jnp.float32)),
            )
            # r . A r = -cos gamma_bar |r|^2 (Liu and Roosta 2022).
            negative = s.negative | (-s.cos * gamma_bar <= 0)
            s = tree.where(least, s, taken)
            return s._replace(stop=least | ~(s.phi > self.rtol) | (s.step >= self.max_steps), negative=negative)

        def body(s: _MINRESState) -> _MINRESState:
            v = product(tree.where(s.stop, s.x, s.v))
            return jax.lax.cond(s.stop, check, step, s, v)

        zero = tree.zeros_like(b_hat)
        phi = tree.norm(b_hat)
        nothing = jnp.zeros_like(phi)
        start = _MINRESState(
            x=zero,
            v=b_hat,
            v_old=zero,
            w=zero,
            w_old=zero,
            beta=nothing,
            cos=nothing - 1,
            sin=nothing,
            delta_bar=nothing,
            epsilon=nothing,
            phi=phi,
            squared=nothing,
            step=jnp.asarray(0),
            stop=jnp.asarray(False),
            done=~(phi > self.rtol) | (self.max_steps == 0),
            negative=jnp.asarray(False),
            log=jnp.full(self.max_steps + 1, jnp.nan, jnp.float32).at[0].set(phi.astype(jnp.float32)),
        )
        end = jax.lax.while_loop(lambda s: ~s.done, body, start)
        x = tree.cast_like(tree.scale(size, end.x), b)
        return x, Info(end.phi, end.step, end.negative, end.log)


class _MINRESState(NamedTuple):
    x: Params
    v: Params  # Lanczos vector, and the one before
    v_old: Params
    w: Params  # search direction, and the one before
    w_old: Params
    beta: Array  # off-diagonal of the tridiagonal matrix before v
    cos: Array  # the last rotation of its QR factorisation
    sin: Array
    delta_bar: Array  # entries of the next column that the last rotations have touched
    epsilon: Array
    phi: Array  # residual norm
    squared: Array  # Frobenius norm of the tridiagonal matrix, squared
    step: Array
    stop: Array
    done: Array
    negative: Array
    log: Array


@dataclasses.dataclass
class Krylov:
    """Lanczos's basis of b, Ab, A^2 b, ..., orthogonalised in full; `extend` takes a product more.

    `solve(damping)` is the iterate of conjugate gradients from zero on A + damping after as many products: the space does not
    depend on the damping. A is symmetric. It runs on the host, so that the caller may decide about each product.
    """

    size: float  # |b|
    basis: list  # orthonormal, one more than products
    T: np.ndarray  # float64 [products + 1, products]: A basis[:-1] = basis T

    @classmethod
    def of(cls, b) -> "Krylov":
        """The space of b, without a product yet."""
        unit, size = _unit(b)
        return cls(float(size), [unit], np.zeros((1, 0)))

    @property
    def steps(self) -> int:
        """The number of products so far."""
        return self.T.shape[1]

    @property
    def exhausted(self) -> bool:
        """Whether a further product would not extend the space; its solutions are then exact."""
        return self.steps > 0 and self.T[-1, -1] <= self._rounding()

    def extend(self, matvec) -> None:
        """Extends the space by one product; `matvec` computes v -> A v in the dtypes of b."""
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
        """Ritz values of A, ascending, [products]."""
        return np.linalg.eigvalsh(self._projected())

    def coefficients(self, damping: float) -> np.ndarray:
        """Coefficients [products] of the solution in the basis."""
        right = np.zeros(self.steps)
        right[0] = self.size
        return np.linalg.solve(self._projected() + damping * np.eye(self.steps), right)

    def residual(self, damping: float) -> float:
        """|(A + damping) x - b| / |b| of the solution."""
        y = self.coefficients(damping)
        error = self.T @ y
        error[:-1] += damping * y
        error[0] -= self.size
        return float(np.linalg.norm(error) / self.size)

    def solve(self, damping: float) -> Solution:
        """The solution for a damping, and its report."""
        y = self.coefficients(damping)
        x = tree.zeros_like(self.basis[0])
        for c, v in zip(y, self.basis, strict=False):
            x = _add_scale(x, c, v)
        residual = jnp.asarray(self.residual(damping), jnp.float32)
        negative = jnp.asarray(self.values()[0] + damping <= 0)
        return x, Info(residual, jnp.asarray(self.steps), negative, jnp.stack([jnp.ones_like(residual), residual]))

    def bend(self, damping: float) -> float:
        """x . A x of the solution."""
        y = self.coefficients(damping)
        return float(y @ self._projected() @ y)

    def pairs(self):
        """(v, A v) of every vector that was multiplied."""
        for i, v in enumerate(self.basis[:-1]):
            image = tree.zeros_like(v)
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
_inner = jax.jit(tree.vdot)


@jax.jit
def _add_scale(x, c, v):
    return jax.tree.map(lambda x, v: x + jnp.asarray(c, x.dtype) * v, x, v)
