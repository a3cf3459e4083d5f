"""Low-rank adapters: (A, B) -> (A + M A, B - B M) is a direction along which nothing changes, for every matrix M."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from unlearn_jax import CrossEntropy, Dataset, Loss, Remove, adam_qp, cg, erase, fvp, ggnvp, hvp
from unlearn_jax.edits import apply
from unlearn_jax.objective import dataset_objective

RANK, WIDTH = 2, 6


@pytest.fixture
def adapted(rng, x64):
    """(data, adapter, loss): one hidden layer with an adapter on each of its two matrices."""
    base = [jnp.asarray(rng.normal(size=shape)) for shape in ((WIDTH, toys.DIM), (toys.CLASSES, WIDTH))]
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    adapter = [{"A": draw(RANK, w.shape[1]), "B": draw(w.shape[0], RANK)} for w in base]

    def outputs(adapter, example):
        first, second = (w + pair["B"] @ pair["A"] for w, pair in zip(base, adapter, strict=True))
        return jnp.tanh(example["x"] @ first.T) @ second.T

    return toys.sequences(rng, 20), adapter, Loss(outputs, CrossEntropy())


def gauge(adapter):
    """All 2 * RANK^2 directions, [directions, parameters]."""
    directions = []
    for layer in range(2):
        for entry in np.eye(RANK * RANK):
            M = entry.reshape(RANK, RANK)
            move = [jax.tree.map(jnp.zeros_like, pair) for pair in adapter]
            move[layer] = {"A": M @ adapter[layer]["A"], "B": -adapter[layer]["B"] @ M}
            directions.append(toys.flatten(move))
    return jnp.stack(directions)


def test_gradients_and_products_are_orthogonal_to_the_gauge(adapted, rng):
    data, adapter, loss = adapted
    flat = gauge(adapter)
    before = Dataset.of(data)
    objective = lambda data: dataset_objective(loss, adapter, data).gradient(adapter)
    b = jax.tree.map(jnp.subtract, objective(before), objective(apply(before, [Remove([1, 2])])))
    assert np.abs(flat @ toys.flatten(b)).max() < 1e-12 < 1e-4 < np.linalg.norm(toys.flatten(b))
    v = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), adapter)
    for make in (ggnvp, fvp, lambda *args: fvp(*args, kind="empirical")):
        product = make(loss, adapter, data)
        assert np.abs(flat @ toys.flatten(product(v))).max() < 1e-12
        into = toys.dense(product, adapter) @ flat.T
        assert np.abs(into).max() < 1e-12
    # The Hessian has them in its null space at stationary points only.
    assert np.abs(toys.dense(hvp(loss, adapter, data), adapter) @ flat.T).max() > 1e-4


def test_conjugate_gradients_never_enter_the_gauge(adapted):
    """From zero; a constant start, as in the released code, stays there."""
    data, adapter, loss = adapted
    flat = gauge(adapter)
    exact = {"newton_steps": 1, "line_search": False, "damping": 1e-3, "solver": cg(rtol=1e-10, max_steps=200)}
    delta = toys.flatten(erase(loss, adapter, data, [Remove([1, 2])], exact).delta)
    assert np.abs(flat @ delta).max() < 1e-11 * np.linalg.norm(delta) * np.linalg.norm(flat, axis=1).max()
    junk = {**exact, "damping": 0.0, "solver": adam_qp(max_steps=200, init=1e-2, learning_rate=1e-3)}
    started = toys.flatten(erase(loss, adapter, data, [Remove([1, 2])], junk).delta)
    assert np.abs(flat @ started).max() > 1e-3
