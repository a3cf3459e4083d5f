"""Minima of the experiment: against the closed form, and as tight as they are said to be."""

import jax
import jax.numpy as jnp
import numpy as np
import toys

from unlearn_jax.baselines import converge
from unlearn_jax.dataset import Dataset
from unlearn_jax.experiment.setup import minimise
from unlearn_jax.objective import dataset_objective


def test_ridge_regression(rng, x64):
    data = toys.ridge_data(rng)
    objective = dataset_objective(toys.ridge_loss, jnp.zeros(5), Dataset.of(data), weight_decay=0.1)
    H, g = jax.hessian(objective.value)(jnp.zeros(5)), objective.gradient(jnp.zeros(5))
    found = minimise(objective, jnp.zeros(5), tolerance=1e-10, max_steps=50)
    np.testing.assert_allclose(found.params, -jnp.linalg.solve(H, g), atol=1e-8)
    np.testing.assert_allclose(found.start, jnp.linalg.norm(g), rtol=1e-12)
    assert found.norm < 1e-9


def test_newton_steps_finish_what_lbfgs_leaves(rng, x64):
    data, params = toys.sequences(rng, 24), toys.params(rng)
    objective = dataset_objective(toys.LOSS, params, Dataset.of(data), weight_decay=1e-2)
    rough, norm = converge(objective, params, max_steps=5)
    found = minimise(objective, params, tolerance=1e-9, max_steps=5)
    assert found.norm <= 1e-9 < 1e-4 < norm and objective.value(found.params) < objective.value(rough.adapter)
