import jax.numpy as jnp
import numpy as np
import pytest
from systems import SIZE, error, flat, jitted, pack, products, vector

from unlearn_jax import solvers

cg, dual = map(jitted, (solvers.cg, solvers.dual))

B = vector()


def gradients(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, SIZE))


@pytest.mark.parametrize("n", [4, 40])
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_dual_is_the_primal_solve(x64, n, damping):
    G = gradients(n)
    x, info = dual(pack(G), pack(B), damping=damping)
    assert error(x, jnp.linalg.solve(G.T @ G / n + damping * np.eye(SIZE), B)) < 1e-10
    assert info.residual < 1e-10 and info.steps == 1


def test_weights_and_padding(x64):
    G, weights = gradients(6), np.array([0.5, 2.0, 0.0, 1.0, 0.25, 0.0])
    exact = jnp.linalg.solve((G.T * weights) @ G + 0.1 * np.eye(SIZE), B)
    padded = np.where((weights == 0)[:, None], 1e6, G)
    x, _ = dual(pack(padded), pack(B), damping=0.1, weights=weights)
    assert error(x, exact) < 1e-10


def test_agrees_with_conjugate_gradients_on_the_empirical_fisher(x64):
    G = gradients(8)
    x, _ = dual(pack(G), pack(B), damping=0.05)
    y, _ = cg(products(G.T @ G / 8), pack(B), damping=0.05, rtol=1e-13, max_steps=60)
    assert error(x, flat(y)) < 1e-10


def test_refinement_holds_float32_where_the_difference_cancels():
    """b within the gradients' span, as an edit's is: the plain formula subtracts two nearly equal vectors."""
    G = gradients(8)
    F = G.T @ G / 8
    b, damping = G.T @ vector(3, 8), 1e-4 * np.linalg.eigvalsh(F)[-1]
    x, info = dual(pack(G, jnp.float32), pack(b, jnp.float32), damping=damping)
    assert error(x, np.linalg.solve(F + damping * np.eye(SIZE), b)) < 1e-3
    assert info.residual < 1e-4  # some 2e-3 before refinement


def test_damping_below_rounding_stays_finite():
    G = gradients(8)
    x, info = dual(pack(G, jnp.float32), pack(G[0], jnp.float32), damping=1e-9)
    assert np.isfinite(flat(x)).all() and np.isfinite(info.residual)


def test_gradients_in_half_precision_need_no_copy():
    """Rounded gradients are what they are; the arithmetic on them is float32."""
    G = np.asarray(jnp.asarray(gradients(8), jnp.bfloat16), np.float64)
    x, info = dual(pack(G, jnp.bfloat16), pack(B, jnp.float32), damping=0.1)
    assert error(x, np.linalg.solve(G.T @ G / 8 + 0.1 * np.eye(SIZE), B)) < 1e-5
    assert info.residual < 1e-5


def test_zero_right_side_gives_exactly_zero():
    x, info = dual(pack(gradients(4), jnp.float32), pack(jnp.zeros(SIZE)), damping=0.1)
    assert not flat(x).any() and info.residual == 0


def test_no_damping_is_refused():
    with pytest.raises(ValueError, match="dual divides by the damping, which has to be positive: 0.0"):
        solvers.dual().solve(pack(gradients(4)), pack(B), damping=0.0)
