import jax
import jax.numpy as jnp
import numpy as np
import pytest
from systems import SIZE, error, flat, jitted, pack

from unlearn_jax import solvers

datainf, dual = map(jitted, (solvers.datainf, solvers.dual))

N = 30
G = np.random.default_rng(0).normal(size=(N, SIZE)) * np.geomspace(3, 0.03, SIZE)
B = G[:3].mean(axis=0)
FISHER = G.T @ G / N


def one_layer(G, b, damping):
    x, info = datainf({"w": jnp.asarray(G)}, {"w": jnp.asarray(b)}, damping=damping)
    return np.asarray(x["w"]), info


def test_one_example_is_exact(x64):
    x, info = one_layer(G[:1], B, 0.1)
    assert error(x, np.linalg.solve(np.outer(G[0], G[0]) + 0.1 * np.eye(SIZE), B)) < 1e-10
    assert info.residual < 1e-12


def test_exact_as_the_damping_grows(x64):
    largest = (G**2).sum(axis=1).max()
    errors = []
    for factor in (1.0, 10.0, 100.0, 1000.0):
        damping = factor * largest
        x, _ = one_layer(G, B, damping)
        errors.append(error(x, np.linalg.solve(FISHER + damping * np.eye(SIZE), B)))
    # The first order in 1/damping is right, so the error falls with its square.
    ratios = np.array(errors[:-1]) / errors[1:]
    assert errors[-1] < 1e-6 and (ratios[1:] > 80).all()


def test_many_times_too_long_at_small_damping(x64):
    x, info = one_layer(G, B, 1e-3)
    exact = np.linalg.solve(FISHER + 1e-3 * np.eye(SIZE), B)
    assert np.linalg.norm(x) > 10 * np.linalg.norm(exact)
    assert info.residual > 10


def test_published_formula_layer_by_layer(x64):
    gradients, b = pack(G), pack(B)
    x, info = datainf(gradients, b)
    dampings = []
    for g, v, got in zip(*map(jax.tree.leaves, (gradients, b, x)), strict=True):
        g, v = g.reshape(N, -1), v.ravel()
        damping = 0.1 * (g**2).mean(axis=1).mean()
        wanted = sum((v - (v @ gi) / (damping + gi @ gi) * gi) / damping for gi in g) / N
        np.testing.assert_allclose(np.asarray(got).ravel(), wanted, rtol=1e-10)
        dampings += [damping] * v.size
    np.testing.assert_allclose(info.residual, error((FISHER + np.diag(dampings)) @ flat(x), B), rtol=1e-10)


def test_zero_right_side_gives_exactly_zero():
    x, info = datainf(pack(G, jnp.float32), pack(jnp.zeros(SIZE)), damping=0.1)
    assert not flat(x).any() and info.residual == 0


def test_no_damping_is_refused():
    with pytest.raises(ValueError, match="DataInf divides by the damping, which has to be positive: 0.0"):
        solvers.datainf().solve(pack(G), pack(B), damping=0.0)


def test_one_damping_for_all_layers_tends_to_the_dual(x64):
    damping = 1e4 * (G**2).sum(axis=1).max()
    x, _ = datainf(pack(G), pack(B), damping=damping)
    y, _ = dual(pack(G), pack(B), damping=damping)
    assert error(x, flat(y)) < 1e-4
