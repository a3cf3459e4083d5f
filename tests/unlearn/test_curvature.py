"""Curvature-vector products against dense matrices, finite differences and explicit sums."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax.flatten_util import ravel_pytree

from pixel_jax.models.attention import Mask, attention, chunked_attention
from unlearn_jax import CrossEntropy, Loss, SquaredError, fvp, ggnvp, hvp
from unlearn_jax.curvature import (
    mean_objective,
    micro_batch_product,
    per_example_gradients,
    sample_labels,
    squared_gradients,
)


def mean_loss(loss, params, data):
    """The mean over examples of each one's mean, one at a time, as a function of flat parameters."""
    flat, unravel = ravel_pytree(params)
    count = len(jax.tree.leaves(data)[0])

    def value(flat):
        parts = [loss(unravel(flat), toys.row(data, i)) for i in range(count)]
        return sum(total / weight for total, weight in parts) / count

    return value, flat


def rows(loss, params, data):
    """Gradients of every example's sum [n, p], and 1 / (n weight) [n]."""
    flat, unravel = ravel_pytree(params)
    count = len(jax.tree.leaves(data)[0])
    both = [loss(unravel(flat), toys.row(data, i)) for i in range(count)]
    gradient = lambda i: jax.grad(lambda flat: loss(unravel(flat), toys.row(data, i))[0])(flat)
    return jnp.stack([gradient(i) for i in range(count)]), jnp.array([1 / (weight * count) for _, weight in both])


def gauss_newton(loss, params, data):
    """sum_i c_i J' S J, written with Jacobians and the criterion's Hessian."""
    flat, unravel = ravel_pytree(params)
    count, total = len(jax.tree.leaves(data)[0]), 0.0
    for i in range(count):
        example = toys.row(data, i)
        outputs = lambda flat: loss.outputs(unravel(flat), example).reshape(-1)  # noqa: B023
        shape = jax.eval_shape(loss.outputs, params, example).shape
        z, J = outputs(flat), jax.jacobian(outputs)(flat)
        criterion = lambda z: loss.reduce(z.reshape(shape), example)[0]  # noqa: B023
        total += J.T @ jax.hessian(criterion)(z) @ J / (loss.reduce(z.reshape(shape), example)[1] * count)
    return total


@pytest.mark.parametrize("linearize", [False, True])
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_products_equal_dense_matrices(rng, x64, micro_batch, linearize):
    params, data = toys.params(rng), toys.sequences(rng)
    options = {"micro_batch": micro_batch, "linearize": linearize}
    value, flat = mean_loss(toys.LOSS, params, data)
    hessian = toys.dense(hvp(toys.LOSS, params, data, **options), params)
    np.testing.assert_allclose(hessian, jax.hessian(value)(flat), atol=1e-10)
    np.testing.assert_allclose(hessian, jax.hessian(value)(flat), atol=1e-14)
    ggn = toys.dense(ggnvp(toys.LOSS, params, data, **options), params)
    np.testing.assert_allclose(ggn, gauss_newton(toys.LOSS, params, data), atol=1e-14)
    assert np.linalg.eigvalsh(ggn)[0] > -1e-14 > np.linalg.eigvalsh(hessian)[0]
    gradients, coefficients = rows(toys.LOSS, params, data)
    fisher = toys.dense(fvp(toys.LOSS, params, data, kind="empirical", **options), params)
    np.testing.assert_allclose(fisher, (gradients.T * coefficients) @ gradients, atol=1e-14)


def test_hessian_product_equals_finite_differences(rng, x64):
    params, data = toys.params(rng), toys.sequences(rng)
    value, flat = mean_loss(toys.LOSS, params, data)
    v = rng.normal(size=flat.size)
    slope, step = jax.grad(value), 1e-5
    difference = (slope(flat + step * v) - slope(flat - step * v)) / (2 * step)
    product = hvp(toys.LOSS, params, data)(ravel_pytree(params)[1](jnp.asarray(v)))
    np.testing.assert_allclose(toys.flatten(product), difference, atol=1e-8)


@pytest.mark.parametrize("criterion", [CrossEntropy(), SquaredError("y")])
def test_gauss_newton_is_the_hessian_of_linear_outputs(rng, x64, criterion):
    params, data = jnp.asarray(rng.normal(size=(toys.DIM, toys.CLASSES))), toys.sequences(rng)
    data["y"] = rng.normal(size=(toys.N, toys.LENGTH, toys.CLASSES))
    loss = Loss(toys.linear, criterion)
    H, G = (toys.dense(make(loss, params, data), params) for make in (hvp, ggnvp))
    np.testing.assert_allclose(G, H, atol=1e-14)


def test_gauss_newton_of_outputs_that_are_a_pytree(rng, x64):
    """Two heads with a criterion of their own each."""
    params, data = toys.params(rng), toys.sequences(rng)
    heads = lambda params, example: {"a": example["x"] @ params["a"], "b": toys.network(params, example)}
    criterion = lambda z, example: jnp.cosh(z["a"]).sum(-1) + CrossEntropy()(z["b"], example)
    both = toys.dense(ggnvp(Loss(heads, criterion), params, data, 2), params)
    one = lambda name, criterion: Loss(lambda p, e: heads(p, e)[name], lambda z, e: criterion(z, e))
    a = gauss_newton(one("a", lambda z, e: jnp.cosh(z).sum(-1)), params, data)
    np.testing.assert_allclose(both, a + gauss_newton(one("b", CrossEntropy()), params, data), atol=1e-14)


@pytest.mark.parametrize("weights", [False, True])
def test_sampled_fisher_is_an_explicit_sum_and_tends_to_gauss_newton(rng, x64, weights):
    params, data = toys.params(rng), toys.sequences(rng)
    if weights:  # elements may count by any number, not only by 0 and 1
        data["loss_mask"] = rng.random((toys.N, toys.LENGTH))
    objective = sample_labels(mean_objective(toys.LOSS, params, data), params, jax.random.key(5))
    drawn = toys.row(objective.examples, 0)
    assert not np.array_equal(drawn["labels"], data["labels"])
    gradients, _ = rows(toys.LOSS, params, drawn)
    coefficients = 1 / data["loss_mask"].sum(1) / toys.N
    explicit = (gradients.T * coefficients) @ gradients
    product = toys.dense(fvp(toys.LOSS, params, data, key=jax.random.key(5)), params)
    np.testing.assert_allclose(product, explicit, atol=1e-13)

    v = jax.tree.map(jnp.ones_like, params)
    many = jax.lax.map(
        lambda key: toys.flatten(fvp(toys.LOSS, params, data, key=key)(v)), jax.random.split(jax.random.key(0), 3000)
    )
    expected, error = toys.flatten(ggnvp(toys.LOSS, params, data)(v)), many.std(0) / np.sqrt(len(many))
    assert (np.abs(many.mean(0) - expected) < 4.5 * error).all()
    assert np.linalg.norm(many.mean(0) - expected) < 0.05 * np.linalg.norm(expected)


def test_one_draw_whatever_the_micro_batches(rng):
    params, data = toys.params(rng, "float32"), toys.sequences(rng)
    v = jax.tree.map(jnp.ones_like, params)
    whole, parts = (toys.flatten(fvp(toys.LOSS, params, data, m, key=jax.random.key(1))(v)) for m in (None, 2))
    np.testing.assert_allclose(whole, parts, atol=1e-6)


def test_blocks_of_vectors(rng, x64):
    params, data = toys.params(rng), toys.sequences(rng)
    block = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=(3, *p.shape))), params)
    for make in (hvp, ggnvp, fvp):
        product = make(toys.LOSS, params, data, 3)
        together, apart = jax.vmap(product)(block), [product(toys.row(block, i)) for i in range(3)]
        for name in params:
            np.testing.assert_allclose(together[name], [x[name] for x in apart], atol=1e-14)


def test_micro_batches_average_to_the_whole(rng, x64):
    params, data = toys.params(rng), toys.sequences(rng)
    objective = mean_objective(toys.LOSS, params, data, 2)
    v = jax.tree.map(jnp.ones_like, params)
    for kind, make in (("hessian", hvp), ("ggn", ggnvp)):
        parts = [toys.flatten(micro_batch_product(objective, params, v, i, kind)) for i in range(8)]
        np.testing.assert_allclose(
            np.mean(parts[:4], axis=0), toys.flatten(make(toys.LOSS, params, data)(v)), atol=1e-14
        )
        np.testing.assert_array_equal(parts[:4], parts[4:])


def test_per_example_gradients(rng, x64):
    params, data = toys.params(rng), toys.sequences(rng)
    expected, coefficients = rows(toys.LOSS, params, data)
    objective = mean_objective(toys.LOSS, params, data, 3)
    got = jax.vmap(toys.flatten)(per_example_gradients(objective, params))
    np.testing.assert_allclose(got, expected, atol=1e-14)
    np.testing.assert_allclose(
        toys.flatten(squared_gradients(objective, params)), coefficients @ expected**2, atol=1e-14
    )


def test_one_compilation_whatever_the_vector_and_the_batch(rng):
    traces = []

    def network(params, example):
        traces.append(1)
        return toys.network(params, example)

    loss = Loss(network, CrossEntropy())
    for make in (hvp, ggnvp, fvp, lambda *args: hvp(*args, linearize=True), lambda *args: ggnvp(*args, linearize=True)):
        counts = []
        for _ in range(2):
            params, data = toys.params(rng, "float32"), toys.sequences(rng)
            product = make(loss, params, data, 2)
            for _ in range(3):
                product(toys.params(rng, "float32"))
            counts.append(len(traces))
        assert counts[0] == counts[1]


def test_products_are_wide_and_micro_batches_do_not_matter(rng):
    data = toys.sequences(rng)
    params = toys.params(rng, "bfloat16")
    for make in (hvp, ggnvp, fvp):
        for linearize in (False, True):
            product = make(toys.LOSS, params, data, 2, linearize=linearize)(toys.params(rng, "float32"))
            assert all(x.dtype == jnp.float32 for x in product.values())
    params, v = toys.params(rng, "float32"), toys.params(rng, "float32")
    for make in (hvp, ggnvp, fvp):
        whole, *parts = (toys.flatten(make(toys.LOSS, params, data, m)(v)) for m in (None, 1, 2, 3))
        for part in parts:
            np.testing.assert_allclose(part, whole, atol=2e-6)


def test_an_example_of_which_nothing_counts(rng, x64):
    params, data = toys.params(rng), toys.sequences(rng)
    v = toys.params(rng)
    expected = hvp(toys.LOSS, params, toys.row(data, slice(1, None)))(v)
    data["loss_mask"][0] = False
    np.testing.assert_allclose(toys.flatten(hvp(toys.LOSS, params, data)(v)), toys.flatten(expected), atol=1e-14)


def test_inside_jit(rng, x64):
    """Parameters, batch and vector may all be traced."""
    params, data, v = toys.params(rng), toys.sequences(rng), toys.params(rng)
    inside = jax.jit(lambda params, data, v: hvp(toys.LOSS, params, data, 3)(v))(params, data, v)
    np.testing.assert_allclose(toys.flatten(inside), toys.flatten(hvp(toys.LOSS, params, data)(v)), atol=1e-14)


def test_what_is_refused(rng):
    params, data = toys.params(rng, "float32"), toys.sequences(rng)
    plain = lambda params, example: toys.LOSS(params, example)
    hvp(plain, params, data)(params)
    fvp(plain, params, data, kind="empirical")(params)
    with pytest.raises(ValueError, match="the Gauss-Newton product needs the outputs and the criterion apart"):
        ggnvp(plain, params, data)
    with pytest.raises(ValueError, match="the sampled Fisher product needs the outputs and the criterion apart"):
        fvp(plain, params, data)
    with pytest.raises(ValueError, match=r"give .* `sample\(key, z, example\)`"):
        fvp(Loss(toys.network, lambda z, example: z.sum(-1)), params, data)
    with pytest.raises(ValueError, match="kind 'exact' is not one of 'sampled', 'empirical'"):
        fvp(toys.LOSS, params, data, kind="exact")
    with pytest.raises(ValueError, match=r"the vector has the shape \(3,\) at \['a'\], the parameters have \(3, 4\)"):
        hvp(toys.LOSS, params, data)({**params, "a": jnp.ones(3)})
    with pytest.raises(ValueError, match="a vector is a pytree like the parameters"):
        hvp(toys.LOSS, params, data)(jnp.ones(3))


def attend(implementation):
    """Logits of a causal attention layer with 2 heads of 4 over LENGTH tokens, queries and values adapted."""

    def outputs(params, example):
        order = jnp.arange(toys.LENGTH)[None]
        heads = lambda w: (example["x"] @ w).reshape(1, toys.LENGTH, 2, 4)
        q, k, v = heads(params["q"]), heads(jnp.cos(jnp.arange(24.0)).reshape(3, 8)), heads(params["v"])
        mixed = implementation(q, k, v, Mask(order, order))
        return mixed.reshape(toys.LENGTH, 8)[:, : toys.CLASSES]

    return Loss(outputs, CrossEntropy())


def small_chunks(q, k, v, mask):
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    return jnp.swapaxes(chunked_attention(q[:, :, None], k, v, mask, 2, 2)[0][:, :, 0], 1, 2)


@pytest.mark.parametrize("make", [hvp, ggnvp, fvp])
@pytest.mark.parametrize("linearize", [False, True])
def test_memory_linear_attention(rng, x64, make, linearize):
    """Its gradient rule is custom and it has no forward mode of its own; the products do not need one."""
    params, data = (
        {"q": jnp.asarray(rng.normal(size=(3, 8))), "v": jnp.asarray(rng.normal(size=(3, 8)))},
        toys.sequences(rng),
    )
    v = jax.tree.map(jnp.sin, params)
    expected = make(attend(functools.partial(attention, causal=True)), params, data)(v)
    got = make(attend(small_chunks), params, data, 3, linearize=linearize)(v)
    np.testing.assert_allclose(toys.flatten(got), toys.flatten(expected), atol=1e-13)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda p: attend(small_chunks).outputs(p, toys.row(data, 0)), (params,), (v,))
