"""Examples in the memory of the host: the same edit, and what a device holds does not grow with their number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from unlearn_jax import Dataset, Remove, erase
from unlearn_jax.config import resolve
from unlearn_jax.curvature import product
from unlearn_jax.objective import HOST, Objective
from unlearn_jax.problem import make_problem

MICRO_BATCH = 8


def problem(rng, count, mesh=None):
    data, params = toys.sequences(rng, count), toys.params(rng, jnp.float32)
    config = resolve({"micro_batch": MICRO_BATCH, "offload": True, "curvature": "ggn"})
    before = Dataset.of(data)
    after = before.select(np.arange(2, count))
    return make_problem(toys.LOSS, params, before, after, config, mesh), params


@pytest.mark.parametrize("mesh", [None, lambda: jax.make_mesh((8,), ("data",))])
def test_what_a_device_holds_does_not_grow_with_the_examples(rng, mesh):
    """Bytes of the compiled programs that an edit spends its time in, at 40 and at 400 examples.

    Besides the examples, which lie in the host's memory, a program holds a coefficient and a loss of each.
    """
    mesh = mesh and mesh()
    held = []
    for count in (42, 402):
        found, params = problem(rng, count, mesh)
        kinds = {x.sharding.memory_kind for x in jax.tree.leaves(found.edited.examples)}
        assert kinds == {HOST} and found.edited.coefficients.sharding.memory_kind != HOST
        programs = [
            Objective.gradient.lower(found.edited, params),
            Objective.sums_and_gradient.lower(found.edited, params),
            jax.jit(product, static_argnames="curvature").lower(found.edited, params, params, curvature="ggn"),
        ]
        held.append([program.compile().memory_analysis().temp_size_in_bytes for program in programs])
    for few, many in zip(*held, strict=True):
        assert 0 < many <= few + 4 * 8 * 360  # a few numbers an example, not its fields


def test_without_it_the_examples_lie_on_the_device(rng):
    data, params = Dataset.of(toys.sequences(rng, 42)), toys.params(rng, jnp.float32)
    config = resolve({"micro_batch": MICRO_BATCH, "curvature": "ggn"})
    found = make_problem(toys.LOSS, params, data, data.select(np.arange(40)), config)
    assert HOST not in {x.sharding.memory_kind for x in jax.tree.leaves(found.edited.examples)}


@pytest.mark.parametrize("mesh", [None, lambda: jax.make_mesh((8,), ("data",))])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", [{"curvature_examples": 12}, {"curvature": "fisher", "newton_steps": 1}])
def test_the_edit_is_the_same(rng, x64, mesh, config):
    data, params = toys.sequences(rng, 30), toys.params(rng)
    config = {"weight_decay": 1e-2, "micro_batch": MICRO_BATCH, **config}
    mesh = mesh and mesh()
    one, two = (
        erase(toys.LOSS, params, data, [Remove([1, 2])], {**config, "offload": x}, mesh=mesh) for x in (False, True)
    )
    np.testing.assert_allclose(toys.flatten(two.delta), toys.flatten(one.delta), atol=1e-12)
    assert np.abs(toys.flatten(one.delta)).max() > 1e-3 and two.report.memory > 0


def test_linearized_products_are_no_use():
    with pytest.raises(ValueError, match="offload is of no use with it"):
        resolve({"linearize": True, "offload": True})
