"""Approximate inverses of A + damping that make conjugate gradients converge faster, and EK-FAC, which is a solver, too.

A preconditioner is a value (`nystrom(rank=50)`); its `build` makes the inverse, a callable pytree v -> M^-1 v that passes
through `jax.jit` as an argument.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from unlearn_jax import tree
from unlearn_jax.arrays import AnyArray, Array, Key, Params, Product, Scalar, Stack
from unlearn_jax.solvers.base import Solution, Solver, direct, positive, relative_norm, system, working_dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preconditioner:
    """The base class of preconditioners that are not solvers as well."""

    @property
    def name(self) -> str:
        """What configurations call it."""
        return type(self).__name__


@dataclasses.dataclass(frozen=True, kw_only=True)
class nystrom(Preconditioner):
    """The randomised Nystrom preconditioner (Frangella, Tropp and Udell 2021), for a spectrum that decays."""

    rank: int  # number of products with random vectors, and of vectors kept

    def __post_init__(self) -> None:
        """Raises ValueError for a rank below one."""
        if self.rank < 1:
            raise ValueError(f"rank must be positive, not {self.rank}")

    def build(self, matvec: Product, like: Params, *, key: Key, damping: Scalar) -> Product:
        """v -> (U (values + damping) U' / (lambda_rank + damping) + I - U U')^-1 v.

        U and values are the eigenpairs of A's Nystrom approximation. The condition number falls to about that of the
        spectrum below lambda_rank. A must be positive semidefinite (Gauss-Newton, Fisher): negative eigenvalues of the
        approximation are left out, so that the preconditioner stays positive definite.

        Args:
            matvec: v -> A v.
            like: a pytree like the parameters.
            key: of the random vectors.
            damping: [], positive.

        Returns:
            The inverse, a callable pytree.

        Raises:
            ValueError: the damping is a number that is not positive.
        """
        positive(damping, "nystrom")
        dtype = working_dtype(like)
        product, _ = system(matvec, like, 0.0)
        draw = lambda key: tree.random_like(key, like, dtype=dtype)
        probes, _ = tree.row_space(jax.lax.map(draw, jax.random.split(key, self.rank)))
        images = jax.lax.map(product, probes)
        core = tree.gram(probes, images)
        # A ~ images' core^-1 images: the rows core^-1/2 images have the approximation's eigenvectors as their row space.
        roots, _ = tree.row_space(images, (core + core.T) / 2)
        vectors, values = tree.row_space(roots)
        return Partial(_apply_nystrom, values, vectors, damping)


def _apply_nystrom(values: Array, vectors: Stack, damping: Scalar, v: Params) -> Params:
    coefficients = tree.inner(vectors, v) * ((values[0] + damping) / (values + damping) - 1)
    return tree.add(v, tree.combine(coefficients, vectors))


@dataclasses.dataclass(frozen=True, kw_only=True)
class diagonal(Preconditioner):
    """The inverse of a diagonal."""

    def build(self, estimate: Params, *, damping: Scalar = 0.0) -> Product:
        """v -> v / (|estimate| + damping), coordinate by coordinate.

        Each coordinate is at least a millionth of the largest: the estimate of one may be too small, and its inverse must not
        dominate.

        Args:
            estimate: a pytree of A's diagonal.
            damping: [].

        Returns:
            The inverse, a callable pytree.
        """
        magnitude = jax.tree.map(jnp.abs, estimate)
        floor = 1e-6 * tree.largest(magnitude)
        inverse = jax.tree.map(lambda d: 1 / (jnp.maximum(d, floor) + damping), magnitude)
        return Partial(tree.mul, inverse)


class _Layer(NamedTuple):
    """A layer's eigenbases and second moments; a basis of None leaves the coordinates of its side as they are."""

    rows: Array | None  # [..., out, out]
    columns: Array | None  # [..., in, in]
    moments: Array  # [..., out, in]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ekfac(Solver):
    """EK-FAC (George et al. 2018; Grosse et al. 2023): the Fisher's inverse, layer by layer, in a Kronecker eigenbasis.

    A leaf is a layer and its last two axes a matrix; axes between those and the examples are layers of their own (a scan's).
    A leaf of fewer axes is treated by its diagonal. The eigenbases are those of E[G G'] and E[G' G], as in Shampoo, not those
    of K-FAC's output gradients and activations: they need gradients only, no hooks in the model. The two agree where an
    example's gradient is one outer product of independent factors. The eigenvalues are EK-FAC's own: the second moments
    E[(Q_out' G Q_in)^2].
    """

    takes = "gradients"
    divides = True

    max_side: int = 2048  # a longer side of a matrix is not rotated, because its eigenproblem costs too much

    def build(self, gradients: Stack, *, damping: Scalar, weights: AnyArray | None = None) -> Product:
        """v -> (F + damping)^-1 v, block-diagonal over layers.

        Args:
            gradients: per-example gradients, each leaf [n, ..., out, in], at sampled labels for the Fisher and at the data's
                own for the empirical one.
            damping: [], positive.
            weights: [n], by default 1/n.

        Returns:
            The inverse, a callable pytree.

        Raises:
            ValueError: the damping is a number that is not positive.
        """
        positive(damping, "ekfac")
        n = tree.length(gradients)
        dtype = working_dtype(gradients)
        roots = jnp.full(n, n**-0.5, dtype) if weights is None else jnp.sqrt(jnp.asarray(weights, dtype))
        layers = [self._layer(g) for g in jax.tree.leaves(tree.scale_each(roots, gradients))]
        return Partial(_apply_ekfac, layers, damping)

    def solve(self, gradients: Stack, b: Params, *, damping: Scalar, weights: AnyArray | None = None) -> Solution:
        """Applies the inverse of `build` to b, and computes the residual with F itself.

        Args:
            gradients: as of `build`.
            b: the right side.
            damping: [], positive.
            weights: [n], by default 1/n.

        Returns:
            x, and an `Info`.
        """
        x = self.build(gradients, damping=damping, weights=weights)(tree.cast(b, working_dtype(b)))
        n = tree.length(gradients)
        weights = jnp.full(n, 1 / n) if weights is None else jnp.asarray(weights)
        Fx = tree.combine(weights * tree.inner(gradients, x), gradients)
        error = jax.tree.map(lambda h, x, b: h + damping * x - b, Fx, x, b)
        return x, direct(relative_norm(error, b))

    def _layer(self, g: Array) -> _Layer:
        """Factors one leaf of gradients times the roots of their weights, [n, ..., out, in]."""
        if g.ndim < 3:
            return _Layer(None, None, jnp.sum(g**2, axis=0))
        rows = columns = None
        if g.shape[-2] <= self.max_side:
            _, rows = jnp.linalg.eigh(jnp.einsum("n...oi,n...pi->...op", g, g, precision=tree.PRECISION))
        if g.shape[-1] <= self.max_side:
            _, columns = jnp.linalg.eigh(jnp.einsum("n...oi,n...oj->...ij", g, g, precision=tree.PRECISION))
        return _Layer(rows, columns, jnp.sum(_rotate(g, rows, columns) ** 2, axis=0))


def _rotate(matrix: Array, rows: Array | None, columns: Array | None) -> Array:
    """rows' matrix columns: into the eigenbasis, or with transposed bases back out of it."""
    if rows is not None:
        matrix = jnp.matmul(rows.mT, matrix, precision=tree.PRECISION)
    return matrix if columns is None else jnp.matmul(matrix, columns, precision=tree.PRECISION)


def _apply_ekfac(layers: list[_Layer], damping: Scalar, v: Params) -> Params:
    def transposed(basis):
        return None if basis is None else basis.mT

    def apply(layer: _Layer, x):
        scaled = _rotate(x, layer.rows, layer.columns) / (layer.moments + damping)
        return _rotate(scaled, transposed(layer.rows), transposed(layer.columns)).astype(x.dtype)

    leaves, structure = jax.tree.flatten(v)
    return jax.tree.unflatten(structure, [apply(layer, x) for layer, x in zip(layers, leaves, strict=True)])
