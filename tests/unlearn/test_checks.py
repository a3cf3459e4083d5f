"""What would go wrong silently is refused in words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import nnx
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from pixel_jax.models.attention import Mask, attention
from unlearn_jax import CrossEntropy, Loss, Remove, erase
from unlearn_jax.checks import primitives

flash = Primitive("flash_pallas_call")  # a kernel: it can be run, and that is all that JAX knows of it
flash.def_impl(lambda x: x)
flash.def_abstract_eval(lambda x: x)
mlir.register_lowering(flash, mlir.lower_fun(lambda x: x, multiple_results=False))
batching.primitive_batchers[flash] = lambda args, axes: (flash.bind(*args), axes[0])


@jax.custom_vjp
def kernel(x):
    return jnp.sin(x)


kernel.defvjp(lambda x: (flash.bind(x), x), lambda x, g: (jnp.cos(x) * g,))


def run(loss, data, rng, **config):
    return erase(loss, toys.params(rng, "float32"), data, [Remove([1])], config)


@pytest.mark.parametrize("where", [lambda f: f, jax.jit, jax.checkpoint])
def test_dropout_is_refused(rng, where):
    def dropout(params, example):
        x = toys.network(params, example)
        keep = where(lambda: jax.random.bernoulli(jax.random.key(0), 0.9, x.shape))()
        return jnp.where(keep, x, 0)

    with pytest.raises(ValueError, match=r"random numbers \(random_bits in its jaxpr\): turn dropout off"):
        run(Loss(dropout, CrossEntropy()), toys.sequences(rng), rng)


def test_dropout_of_flax_that_is_left_on_is_refused(rng):
    dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    noisy = Loss(lambda params, example: dropout(toys.network(params, example)), CrossEntropy())
    with pytest.raises(ValueError, match=r"dropout that is left on .* call model.eval\(\) first.*Flax says: Cannot"):
        run(noisy, toys.sequences(rng), rng)


def test_primitives_are_found_wherever_they_are():
    def nested(x):
        inside = lambda x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.tanh, x)
        _, y = jax.lax.scan(lambda c, _: (c, jax.jit(inside)(c)), x, None, 2)
        return kernel(y)

    found = set(primitives(jax.make_jaxpr(nested)(jnp.ones(3)).jaxpr))
    assert {"sin", "tanh", "scan", "cond"} <= found


def test_the_attention_kernels_are_refused(rng):
    """Also where they are not what would run: on this machine the door takes a plain implementation."""

    def attends(params, example):
        x = toys.network(params, example)[None, :, None]
        order = jnp.arange(x.shape[1])[None]
        return attention(x, x, x, Mask(order, order), causal=True, implementation="kernel")[0, :, 0]

    with pytest.raises(ValueError, match=r"pallas_call.*implementation='chunked'.*no kernel that a TPU"):
        run(Loss(attends, CrossEntropy()), toys.sequences(rng), rng)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_kernels_without_forward_mode_are_refused(rng, curvature):
    loss = Loss(lambda params, example: kernel(toys.network(params, example)), CrossEntropy())
    message = (
        f"curvature='{curvature}' needs it.*implementation='chunked'.*curvature='empirical_fisher'.*flash_pallas_call"
    )
    with pytest.raises(ValueError, match=message):
        run(loss, toys.sequences(rng), rng, curvature=curvature)


def test_first_derivatives_are_enough_for_fisher(rng):
    """A kernel that has a gradient rule and nothing else."""
    loss = Loss(lambda params, example: kernel(toys.network(params, example)), CrossEntropy())
    erasure = run(loss, toys.sequences(rng), rng, curvature="empirical_fisher", weight_decay=1e-2)
    assert np.isfinite(toys.flatten(erasure.delta)).all()


def test_loops_without_reverse_mode_are_named(rng):
    def endless(params, example):
        z = toys.network(params, example)
        return jax.lax.while_loop(lambda z: z.sum() < 0, lambda z: z + 1, z)

    with pytest.raises(ValueError, match="while_loop .write it as a scan."):
        run(Loss(endless, CrossEntropy()), toys.sequences(rng), rng)


def test_the_losses_own_errors_come_first(rng):
    with pytest.raises(KeyError, match="tokens"):
        run(lambda params, example: example["tokens"], toys.sequences(rng), rng)


@pytest.mark.parametrize("at", [1, 4])
def test_a_gradient_that_is_not_finite_names_its_example(rng, at):
    """An edited one, and one of the others."""
    data = toys.sequences(rng)
    data["id"] = np.array(list("abcdefg"))
    data["x"][at, 0] = np.nan
    with pytest.raises(FloatingPointError, match=rf"gradient of 1 of \d examples is not finite: '{'abcdefg'[at]}'"):
        erase(toys.LOSS, toys.params(rng, "float32"), data, [Remove(["b"])])


def test_adapters(rng):
    data, params = toys.sequences(rng), toys.params(rng, "float32")
    for adapter, error, message in (
        ({}, ValueError, "the adapter has no arrays"),
        (
            {**params, "n": jnp.arange(3)},
            ValueError,
            r"\['n'\] of the adapter is int32; it must be a floating point array",
        ),
        ({**params, "b": params["b"] * jnp.nan}, FloatingPointError, r"\['b'\] of the adapter is not finite"),
    ):
        with pytest.raises(error, match=message):
            erase(toys.LOSS, adapter, data, [Remove([1])])
