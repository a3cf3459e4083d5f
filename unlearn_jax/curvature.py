"""Curvature-vector products over pytrees of parameters, a micro-batch at a time.

    hvp     H v   of the mean loss: `jax.jvp` of `jax.grad`, exact for any loss that differentiates twice
    ggnvp   J' S J v: J the Jacobian of the outputs, S the criterion's second derivative in them; positive semidefinite for
            a convex criterion, and equal to H where the outputs are linear in the parameters
    fvp     sum_i c_i g_i g_i' v: the Fisher matrix from labels drawn from the model, which has ggnvp's matrix as its
            expectation for cross-entropy and the (half) squared error; or the empirical one, from the data's labels

Each returns a function of v, a pytree like the parameters; the function is a pytree too, so that `jax.jit` can take it as an
argument. `jax.vmap` of it multiplies a block of vectors at less than their separate cost. One compilation serves all vectors,
batches and parameters of the same shapes. With `linearize` all that does not depend on v is computed once and kept: products
are then cheaper, and the activations of the whole batch stay in memory.

An example's gradient in the Fisher matrix is that of the sum of its element losses, the sequence's log-likelihood, and the
mean over its elements is taken outside the square. With the gradient of the mean inside, the matrix would shrink with the length.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from unlearn_jax import tree
from unlearn_jax.arrays import Example, LossFunction, Params
from unlearn_jax.loss import Loss, require_parts, sum_and_weight
from unlearn_jax.objective import Objective, widen, zeros

Curvature = Literal["hessian", "ggn", "fisher", "empirical_fisher"]
Product = Callable[[Params], Params]


def hvp(
    loss: Callable, params: Params, batch: Example, micro_batch: int | None = None, *, linearize: bool = False
) -> Product:
    """The exact Hessian of the mean loss over a batch, as a product.

    Args:
        loss: `loss(params, example)` -> a scalar or (sum, weight), or a `Loss`.
        params: where the Hessian is taken.
        batch: fields [n, ...].
        micro_batch: examples that are computed at a time; None: all.
        linearize: keep what does not depend on v: faster, in the memory of all activations.

    Returns:
        v -> H v, for pytrees like the parameters, float32 or wider; a callable pytree.
    """
    return _product(mean_objective(loss, params, batch, micro_batch), params, "hessian", linearize)


def ggnvp(
    loss: Loss, params: Params, batch: Example, micro_batch: int | None = None, *, linearize: bool = False
) -> Product:
    """The generalised Gauss-Newton matrix of the mean loss over a batch, as a product (Schraudolph 2002).

    Args:
        loss: a `Loss`, which has the outputs and the criterion apart.
        params: where the matrix is taken.
        batch: fields [n, ...].
        micro_batch: examples that are computed at a time; None: all.
        linearize: keep what does not depend on v: faster, in the memory of all activations.

    Returns:
        v -> G v, for pytrees like the parameters, float32 or wider; a callable pytree.

    Raises:
        ValueError: the loss is a plain callable.
    """
    require_parts(loss, "the Gauss-Newton product")
    return _product(mean_objective(loss, params, batch, micro_batch), params, "ggn", linearize)


def fvp(
    loss: Callable,
    params: Params,
    batch: Example,
    micro_batch: int | None = None,
    *,
    kind: Literal["sampled", "empirical"] = "sampled",
    key: jax.Array | None = None,
    linearize: bool = False,
) -> Product:
    """The Fisher matrix over a batch, as a product.

    Args:
        loss: a `Loss`, or for the empirical matrix any callable.
        params: where the matrix is taken.
        batch: fields [n, ...].
        micro_batch: examples that are computed at a time; None: all.
        kind: "sampled" draws one label per element, the same for every v; "empirical" takes the data's own.
        key: for drawing the labels; None: `jax.random.key(0)`.
        linearize: keep the gradients of all examples.

    Returns:
        v -> F v, for pytrees like the parameters, float32 or wider; a callable pytree.

    Raises:
        ValueError: the loss is a plain callable, or its criterion cannot draw labels.
    """
    objective = mean_objective(loss, params, batch, micro_batch)
    if kind == "sampled":
        objective = sample_labels(objective, params, jax.random.key(0) if key is None else key)
    elif kind != "empirical":
        raise ValueError(f"kind {kind!r} is not one of 'sampled', 'empirical'")
    return _product(objective, params, "empirical_fisher", linearize)


def mean_objective(loss: Callable, params: Params, batch: Example, micro_batch: int | None = None) -> Objective:
    """The mean over a batch [n, ...] of each example's loss per element; one whose weight is zero does not count."""
    count = len(jax.tree.leaves(batch)[0])
    objective = Objective.of(loss, batch, np.ones(count), micro_batch=micro_batch)
    weights = objective.weights(params).astype(objective.coefficients.dtype)
    counts = (weights > 0) & (objective.coefficients > 0)
    coefficients = jnp.where(counts, 1 / jnp.where(counts, weights, 1), 0) / counts.sum().astype(weights.dtype)
    return dataclasses.replace(objective, coefficients=coefficients)


@functools.partial(jax.jit, static_argnames="curvature")
def product(objective: Objective, params: Params, v: Params, curvature: Curvature) -> Params:
    """Curvature of the objective's data term times v, without its regulariser. For "fisher" see `sample_labels`."""
    v = tangent(v, params)
    return objective.accumulate(lambda part: _PRODUCTS[curvature](part, params, v), zeros(params))


@functools.partial(jax.jit, static_argnames="curvature")
def micro_batch_product(
    objective: Objective, params: Params, v: Params, index: jax.Array, curvature: Curvature
) -> Params:
    """An estimate of `product` from one micro-batch, unbiased if the examples are in random order; `index` wraps around."""
    steps = objective.coefficients.shape[0]
    arrays = jax.tree.map(lambda x: x[index % steps], (objective.examples, objective.coefficients * steps))
    Av = _PRODUCTS[curvature](objective.part(arrays), params, tangent(v, params))
    return tree.cast_like(Av, zeros(params))


@functools.partial(jax.jit, static_argnames="curvature")
def linearized(objective: Objective, params: Params, curvature: Curvature) -> Product:
    """`product` as a callable pytree that keeps everything but v; v is float32 or wider, whatever the parameters are."""
    narrow = lambda wide: tree.cast_like(wide, params)  # inside the loop over micro-batches, so that sums are wide
    if curvature == "hessian":
        data = dataclasses.replace(objective, weight_decay=jnp.zeros_like(objective.weight_decay))
        return jax.linearize(lambda wide: data.gradient(narrow(wide)), widen(params))[1]
    if curvature == "ggn":
        outputs = lambda wide: objective.each(lambda part: _outputs(part, narrow(wide)))
        z, push, pull = jax.linearize(lambda wide: jax.vjp(outputs, wide), widen(params), has_aux=True)
        batches = (objective.examples, objective.coefficients)
        _, bend = jax.linearize(jax.grad(lambda z: jnp.sum(jax.vmap(_criterion(objective.loss))(z, *batches))), z)
        return Partial(lambda push, bend, pull, v: pull(bend(push(v)))[0], push, bend, pull)
    coefficients = objective.whole(objective.coefficients)
    return Partial(_outer_products, per_example_gradients(objective, params), coefficients)


@jax.jit
def sample_labels(objective: Objective, params: Params, key: jax.Array) -> Objective:
    """The objective with labels drawn from the model: its empirical Fisher matrix is a sample of the Fisher matrix."""
    loss = require_parts(objective.loss, "the sampled Fisher product")
    draw_labels = getattr(loss.criterion, "sample", None)
    if draw_labels is None:
        raise ValueError(f"the sampled Fisher product draws labels: give {loss.criterion!r} `sample(key, z, example)`")

    def sample(index, before):
        example = draw_labels(jax.random.fold_in(key, index), loss.z(params, before), before)
        mask = loss.element_mask(example)
        # g = sum_t sqrt(m_t) g_t has the expectation sum_t m_t g_t g_t' of its square, whatever the weights m_t.
        new = example if mask is None else {**example, loss.mask: jnp.sqrt(mask)}
        # Fields that were not drawn stay where they are, which may be the memory of the host.
        return {name: x for name, x in new.items() if x is not before.get(name)}

    index = jnp.arange(objective.coefficients.size).reshape(objective.coefficients.shape)
    draw = lambda arrays: jax.vmap(sample)(arrays[0], objective.part((arrays[1], arrays[2])).examples)
    drawn = jax.lax.map(draw, (index, objective.examples, objective.coefficients))
    return dataclasses.replace(objective, examples={**objective.examples, **drawn})


@jax.jit
def per_example_gradients(objective: Objective, params: Params) -> Params:
    """The gradient of every example's sum, each leaf [count, ...], float32 or wider."""
    gradients = objective.each(lambda part: _gradients(part, params))
    flat = lambda g: g.reshape(-1, *g.shape[2:])[: objective.count]
    return jax.tree.map(lambda g, z: flat(g).astype(z.dtype), gradients, zeros(params))


@jax.jit
def squared_gradients(objective: Objective, params: Params) -> Params:
    """The diagonal of the empirical Fisher matrix: sum_i c_i g_i^2."""

    def squares(part):
        return jax.tree.map(lambda g: jnp.tensordot(part.coefficients, g**2, 1), _gradients(part, params))

    return objective.accumulate(squares, zeros(params))


def tangent(v: Params, params: Params) -> Params:
    """v in the shapes and dtypes of params, or an error that names the leaf that differs."""
    if jax.tree.structure(v) != jax.tree.structure(params):
        raise ValueError(f"a vector is a pytree like the parameters, {jax.tree.structure(params)}, not {v!r}")
    for (path, x), p in zip(jax.tree_util.tree_leaves_with_path(v), jax.tree.leaves(params), strict=True):
        if jnp.shape(x) != jnp.shape(p):
            name = jax.tree_util.keystr(path)
            raise ValueError(f"the vector has the shape {jnp.shape(x)} at {name}, the parameters have {jnp.shape(p)}")
    return jax.tree.map(lambda x, p: jnp.asarray(x, p.dtype), v, params)


def _product(objective: Objective, params: Params, curvature: Curvature, linearize: bool) -> Product:
    # Callable pytrees: passed through `jax.jit` as arguments, neither data nor parameters become constants of a program.
    if not linearize:
        return Partial(_FUNCTIONS[curvature], objective, params)
    return Partial(_linear_product, linearized(objective, params, curvature), widen(params))


def _hessian(part: Objective, params: Params, v: Params) -> Params:
    return jax.jvp(jax.grad(part.data_value), (params,), (v,))[1]


def _gauss_newton(part: Objective, params: Params, v: Params) -> Params:
    # Forward mode is applied to the reverse-mode pass, whose auxiliary output is the pullback: an operation with a rule for its
    # gradient only (`jax.custom_vjp`, as in memory-linear attention) has no other forward mode, and nothing is computed twice.
    pullback = lambda params: jax.vjp(functools.partial(_outputs, part), params)
    z, dz, pull = jax.jvp(pullback, (params,), (v,), has_aux=True)
    criterion = lambda z: _criterion(part.loss)(z, part.examples, part.coefficients)
    return pull(jax.jvp(jax.grad(criterion), (z,), (dz,))[1])[0]


def _empirical_fisher(part: Objective, params: Params, v: Params) -> Params:
    return _outer_products(_gradients(part, params), part.coefficients, v)


@jax.jit
def _linear_product(linear: Product, wide: Params, v: Params) -> Params:
    return linear(tangent(v, wide))


def _hvp(objective: Objective, params: Params, v: Params) -> Params:
    return product(objective, params, v, "hessian")


def _ggnvp(objective: Objective, params: Params, v: Params) -> Params:
    return product(objective, params, v, "ggn")


def _fvp(objective: Objective, params: Params, v: Params) -> Params:
    return product(objective, params, v, "empirical_fisher")


_PRODUCTS = {"hessian": _hessian, "ggn": _gauss_newton, "empirical_fisher": _empirical_fisher}
_FUNCTIONS = {"hessian": _hvp, "ggn": _ggnvp, "empirical_fisher": _fvp}


def _outputs(part: Objective, params: Params) -> Params:
    loss = require_parts(part.loss, "the Gauss-Newton product")
    return jax.vmap(lambda example: loss.z(params, example))(part.examples)


def _criterion(loss: LossFunction) -> Callable:
    """(z, examples, coefficients) of a micro-batch -> its share of the objective, []."""
    parts = require_parts(loss, "the Gauss-Newton product")

    def criterion(z, examples, coefficients):
        return jnp.sum(coefficients * jax.vmap(lambda z, example: parts.reduce(z, example)[0])(z, examples))

    return criterion


def _gradients(part: Objective, params: Params) -> Params:
    """The gradients of one micro-batch, each leaf [micro_batch, ...], in reverse mode only, which every kernel supports."""
    total = lambda params, example: sum_and_weight(part.loss, params, example)[0]
    return jax.vmap(jax.grad(total), (None, 0))(params, part.examples)


def _outer_products(gradients: Params, coefficients: jax.Array, v: Params) -> Params:
    """sum_i c_i g_i (g_i . v)."""
    return tree.combine(coefficients * tree.inner(gradients, v), gradients)
