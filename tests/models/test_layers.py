"""What a layer keeps for the backward pass."""

import jax
import jax.numpy as jnp
import pytest

from pixel_jax.models.layers import rematerialised


@pytest.mark.parametrize("remat, products, functions", [(False, 3, 1), ("dots", 3, 2), (True, 4, 2)])
def test_what_is_computed_again(remat, products, functions):
    """Of tanh(x W): nothing; the function but not the product; both."""
    block = rematerialised(lambda x, weight: jnp.tanh(x @ weight), remat)
    gradient = jax.grad(lambda x, weight: jnp.sum(block(x, weight)), (0, 1))
    program = str(jax.make_jaxpr(gradient)(jnp.ones((2, 3)), jnp.ones((3, 4))))
    assert (program.count("dot_general["), program.count("tanh ")) == (products, functions)
