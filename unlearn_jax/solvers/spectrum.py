"""Eigenpairs by Lanczos's method with full re-orthogonalisation: a low-rank solve that keeps the complement, and dampings.

On a symmetric A, Arnoldi's Hessenberg matrix is Lanczos's tridiagonal one up to rounding, so this is also the Arnoldi
method of Schioppa et al. 2022, which drops the complement: harmless for a ranking, not for an edit.
"""

import dataclasses

import jax
import jax.numpy as jnp

from unlearn_jax import tree
from unlearn_jax.arrays import Array, Key, Params, Product, Scalar, Stack
from unlearn_jax.solvers.base import Solution, Solver, direct, positive, relative_residual, system, working_dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class lanczos(Solver):
    """A solve with A's top eigenpairs, the rest taken as zero."""

    takes = "products"
    divides = True

    max_steps: int = 30  # products, from a random start
    rank: int | None = None  # eigenpairs of largest magnitude that are kept; None: all

    def solve(self, matvec: Product, b: Params, *, damping: Scalar, key: Key) -> Solution:
        """x = V (values + damping)^-1 V'b + (b - V V'b) / damping.

        The other eigenvalues have to be below the damping: along the vector of a larger one x is too long by their ratio, which
        the residual shows.

        Args:
            matvec: v -> A v, for pytrees of b's structure and dtypes.
            b: the right side.
            damping: [], positive.
            key: of the random start.

        Returns:
            x in the dtypes of b, and an `Info`.

        Raises:
            ValueError: the damping is a number that is not positive.
        """
        values, vectors = eigenpairs(matvec, tree.random_like(key, b), steps=self.max_steps, rank=self.rank)
        x = low_rank_solve(values, vectors, b, damping=damping)
        residual = relative_residual(matvec, x, b, damping=damping)
        return x, direct(residual, jnp.any(values + damping <= 0))._replace(steps=jnp.asarray(self.max_steps))


def low_rank_solve(values: Array, vectors: Stack, b: Params, *, damping: Scalar) -> Params:
    """(V values V' + damping)^-1 b.

    Many right sides and dampings can share one set of pairs. From pairs that all come from the start b the complement
    is zero and the answer is that of conjugate gradients after as many steps. A negative eigenvalue which the damping
    does not lift above zero counts by its magnitude, so that x stays a descent step.

    Args:
        values: eigenvalues [k].
        vectors: orthonormal eigenvectors, a stack of k pytrees like b.
        b: the right side.
        damping: [], positive.

    Returns:
        x in the dtypes of b.

    Raises:
        ValueError: the damping is a number that is not positive.
    """
    positive(damping, "a low-rank solve")
    wide = tree.cast(b, working_dtype(b))
    rest = project_out(vectors, wide)
    coefficients = tree.inner(vectors, wide)
    lifted = jnp.where(values + damping > 0, values, jnp.abs(values)) + damping
    inside = tree.combine(coefficients / lifted, vectors)
    return tree.cast_like(tree.add_scale(inside, 1 / damping, rest), b)


def eigenpairs(matvec: Product, start: Params, *, steps: int, rank: int | None = None) -> tuple[Array, Stack]:
    """The Ritz pairs of largest magnitude in the Krylov space of `start`; a multiple eigenvalue appears once.

    Args:
        matvec: v -> A v.
        start: the first vector.
        steps: products, and vectors that are held.
        rank: pairs to return, as many vectors more; None: all.

    Returns:
        Values [rank], and a stack of as many vectors.
    """
    basis, T = tridiagonalise(matvec, start, steps)
    values, vectors = jnp.linalg.eigh(T)
    order = jnp.argsort(-jnp.abs(values))[:rank]
    return values[order], tree.combine(vectors[:, order].T, basis)


def tridiagonalise(matvec: Product, start: Params, steps: int) -> tuple[Stack, Array]:
    """Lanczos's method, `steps` products.

    Returns:
        An orthonormal basis of the Krylov space of `start`, and A's tridiagonal matrix [steps, steps] in it. Where the space
        is exhausted early, the rest of both is zero.
    """
    product, wide = system(matvec, start, 0.0)
    dtype = working_dtype(start)
    eps = jnp.finfo(dtype).eps

    def step(carry, k):
        basis, v, largest = carry
        basis = jax.tree.map(lambda s, x: s.at[k].set(x), basis, v)
        Av = product(v)
        alpha = tree.vdot(v, Av)
        largest = jnp.maximum(largest, tree.norm(Av))
        v, beta = tree.unit(project_out(basis, Av))
        beta = jnp.where(beta > 10 * eps * largest, beta, 0)
        v = tree.where(beta > 0, v, tree.zeros_like(v))
        return (basis, v, largest), (alpha, beta)

    basis = jax.tree.map(lambda x: jnp.zeros((steps, *x.shape), dtype), wide)
    carry = basis, tree.unit(wide)[0], jnp.zeros((), dtype)
    (basis, _, _), (alpha, beta) = jax.lax.scan(step, carry, jnp.arange(steps))
    return basis, jnp.diag(alpha) + jnp.diag(beta[:-1], 1) + jnp.diag(beta[:-1], -1)


def project_out(basis: Stack, v: Params) -> Params:
    """v without its part in the span of an orthonormal basis."""
    for _ in range(2):  # the first subtraction leaves rounding errors; twice is enough (Parlett)
        v = tree.sub(v, tree.combine(tree.inner(basis, v), basis))
    return v


def extremes(matvec: Product, like: Params, *, key: Key, steps: int = 16) -> tuple[Array, Array]:
    """Estimates A's smallest and largest eigenvalue by `steps` products; both lie within the spectrum."""
    _, T = tridiagonalise(matvec, tree.random_like(key, like), steps)
    values = jnp.linalg.eigvalsh(T)
    return values[0], values[-1]


def fraction_of_largest(matvec: Product, like: Params, *, key: Key, fraction: float = 1e-4, steps: int = 16) -> Array:
    """A damping []: `fraction` of the largest eigenvalue, plus twice the depth of the most negative one found.

    It bounds the condition number by 1/fraction whatever the number of parameters, so that conjugate gradients need
    some hundreds of steps at the most. About 1e-4 kept both the edit and the retained examples on LoRA transformers,
    for the Hessian and for Gauss-Newton. Twice the depth turns the most negative eigenvalue into its magnitude.

    The right damping has to be found by experiment: it depends on how far training got in flat directions and on how far the
    quadratic model holds. This one scales with the loss; compare values on held-out data.
    """
    smallest, largest = extremes(matvec, like, key=key, steps=steps)
    return fraction * largest + 2 * jnp.maximum(-smallest, 0)
