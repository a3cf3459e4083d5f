"""Solvers on per-example gradients, which are kept in memory: A = sum_i w_i g_i g_i', the (empirical) Fisher matrix."""

import dataclasses

import jax
import jax.numpy as jnp

from unlearn_jax import tree
from unlearn_jax.arrays import AnyArray, Params, Scalar, Stack
from unlearn_jax.solvers.base import Solution, Solver, direct, positive, relative_norm, working_dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class dual(Solver):
    """The dual form (Woodbury): an exact solve in as many dimensions as there are examples."""

    takes = "gradients"
    divides = True

    def solve(self, gradients: Stack, b: Params, *, damping: Scalar, weights: AnyArray | None = None) -> Solution:
        """Solves (sum_i w_i g_i g_i' + damping) x = b.

        With G the [n, p] gradients times the roots of their weights, x = (b - G'(damping + G G')^-1 G b) / damping: n^2 p
        operations and an [n, n] eigenproblem, which stays solvable where the damping is below rounding. One step of
        iterative refinement makes up for what the difference cancels.

        Args:
            gradients: per-example gradients, a pytree like b with leaves [n, ...].
            b: the right side.
            damping: [], positive.
            weights: [n], not negative, by default 1/n.

        Returns:
            x in the dtypes of b, and an `Info`.

        Raises:
            ValueError: the damping is a number that is not positive.
        """
        positive(damping, "dual")
        dtype = working_dtype(b)
        wide = tree.cast(b, dtype)
        n = tree.length(gradients)
        roots = jnp.full(n, n**-0.5, dtype) if weights is None else jnp.sqrt(jnp.asarray(weights, dtype))
        # The roots scale vectors of n numbers and not the gradients, of which memory may not hold a second copy.
        G = lambda v: roots * tree.inner(gradients, v)
        G_transposed = lambda c: tree.combine(roots * c, gradients)
        values, vectors = jnp.linalg.eigh(roots[:, None] * tree.gram(gradients) * roots)
        values = jnp.maximum(values, 0) + damping

        def solve(v):
            rotated = jnp.matmul(vectors.T, G(v), precision=tree.PRECISION) / values
            coefficients = jnp.matmul(vectors, rotated, precision=tree.PRECISION)
            return jax.tree.map(lambda x, y: (x - y) / damping, v, G_transposed(coefficients))

        def error(x):
            return jax.tree.map(lambda b, h, x: b - h - damping * x, wide, G_transposed(G(x)), x)

        x = solve(wide)
        x = tree.add(x, solve(error(x)))
        return tree.cast_like(x, b), direct(relative_norm(error(x), wide))


@dataclasses.dataclass(frozen=True, kw_only=True)
class datainf(Solver):
    """DataInf (Kwon et al. 2023): the mean of the inverses in place of the inverse of the mean. For comparison only.

    It tends to (F + damping)^-1 b where the damping is far above |g_i|^2, and is many times too long elsewhere. This does not
    matter for a ranking but for an edit; the residual, computed with the whole empirical Fisher F, shows it.
    """

    takes = "gradients"
    divides = True

    def solve(
        self, gradients: Stack, b: Params, *, damping: Scalar | None = None, weights: AnyArray | None = None
    ) -> Solution:
        """x = mean_i (g_i g_i' + damping)^-1 b, leaf by leaf, by Sherman and Morrison's formula. A leaf is a layer, as published.

        Args:
            gradients: per-example gradients, a pytree like b with leaves [n, ...].
            b: the right side.
            damping: [], positive; None: the published rule, a tenth of the layer's mean squared gradient.
            weights: [n], by default 1/n; a gradient counts times the root of n times its weight.

        Returns:
            x in the dtypes of b, and an `Info`.

        Raises:
            ValueError: the damping is a number that is not positive.
        """
        dtype, n = working_dtype(b), tree.length(gradients)
        G, wide = tree.cast(gradients, dtype), tree.cast(b, dtype)
        if weights is not None:
            G = jax.tree.map(lambda g: jnp.einsum("n...,n->n...", g, jnp.sqrt(weights * n)), G)
        if damping is None:
            dampings = jax.tree.map(lambda g: 0.1 * jnp.mean(g**2), G)
        else:
            positive(damping, "DataInf")
            dampings = jax.tree.map(lambda g: jnp.asarray(damping, dtype), G)

        def layer(g, v, mu):
            squares = jnp.sum(g.reshape(len(g), -1) ** 2, axis=1)
            coefficients = tree.inner(g, v) / (mu + squares)
            return (v - tree.combine(coefficients, g) / len(g)) / mu

        x = jax.tree.map(layer, G, wide, dampings)
        Fx = tree.combine(tree.inner(G, x) / n, G)
        error = jax.tree.map(lambda h, x, b, mu: h + mu * x - b, Fx, x, wide, dampings)
        return tree.cast_like(x, b), direct(relative_norm(error, wide))
