"""Eight devices give the numbers of one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from pixel_jax.parallel.mesh import make_mesh
from unlearn_jax import Dataset, Remove, erase
from unlearn_jax.curvature import per_example_gradients, product, sample_labels
from unlearn_jax.objective import dataset_objective

MESHES = [lambda: jax.make_mesh((8,), ("data",)), lambda: make_mesh({"data": 2, "fsdp": 2, "tensor": 2})]


@pytest.mark.parametrize("mesh", MESHES)
def test_objective_and_products(rng, x64, mesh):
    """21 examples in micro-batches of 8 (of 4 where four devices share the examples)."""
    params, data, v = toys.params(rng), toys.sequences(rng, 21), toys.params(rng)
    one, many = (dataset_objective(toys.LOSS, params, Dataset.of(data), micro_batch=4, mesh=m) for m in (None, mesh()))
    assert len(many.coefficients.sharding.device_set) == 8
    assert many.coefficients.shape[1] == many.coefficients.sharding.shard_shape(many.coefficients.shape)[1] * (
        many.mesh.shape["data"] * many.mesh.shape.get("fsdp", 1)
    )
    same = lambda a, b: np.testing.assert_allclose(toys.flatten(a), toys.flatten(b), atol=1e-14)
    same(many.value_and_gradient(params), one.value_and_gradient(params))
    same(many.per_example(params), one.per_example(params))
    same(per_example_gradients(many, params), per_example_gradients(one, params))
    for kind in ("hessian", "ggn", "empirical_fisher"):
        same(product(many, params, v, kind), product(one, params, v, kind))
    drawn = [sample_labels(objective, params, jax.random.key(2)) for objective in (many, one)]
    same(*(product(objective, params, v, "empirical_fisher") for objective in drawn))


@pytest.mark.parametrize("mesh", MESHES)
def test_an_edit(rng, x64, mesh):
    params, data = toys.params(rng), toys.sequences(rng, 21)
    config = {
        "weight_decay": 1e-2,
        "micro_batch": 8,
        "solver": {"rtol": 1e-10},
        "newton_steps": 2,
        "curvature_examples": 15,
    }
    one, many = (erase(toys.LOSS, params, data, [Remove([1, 2])], config, mesh=m) for m in (None, mesh()))
    np.testing.assert_allclose(toys.flatten(many.delta), toys.flatten(one.delta), atol=1e-9)
    assert np.linalg.norm(toys.flatten(one.delta)) > 1e-2


def test_a_mesh_without_an_axis_for_examples(rng):
    data, params = toys.sequences(rng), toys.params(rng)
    with pytest.raises(ValueError, match=r"mesh axes \('data', 'fsdp'\); the mesh has \('model',\)"):
        erase(toys.LOSS, params, data, [Remove([1])], mesh=jax.make_mesh((8,), ("model",)))
    assert all(isinstance(x, jnp.ndarray) for x in params.values())
