"""LiSSA and the quadratic program: solvers that see one mini-batch's curvature at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from systems import SIZE, error, flat, jitted, multiply, pack, symmetric, vector

from unlearn_jax import solvers

adam_qp, lissa, sgd_qp = map(jitted, (solvers.adam_qp, solvers.lissa, solvers.sgd_qp))

B = vector()
BATCHES = np.stack([symmetric(np.geomspace(0.5, 4, SIZE), seed) for seed in range(6)])
MEAN = BATCHES.mean(axis=0)
SOLUTION = np.linalg.solve(MEAN, B)


def sampled(shift=0):
    """Products with mini-batches in turn, step k seeing batch k + shift."""
    return jax.tree_util.Partial(turn, np.roll(BATCHES, -shift, axis=0))


def full(A, dtype=None):
    return jax.tree_util.Partial(turn, np.asarray(A, dtype)[None])


def turn(batches, v, k):
    return multiply(jnp.asarray(batches)[k % len(batches)], v)


@pytest.mark.parametrize("steps", [0, 1, 9])
def test_sgd_on_the_quadratic_is_lissa_one_step_ahead(x64, steps):
    """From zero, SGD's first step is b / scale whatever its batch, which is where LiSSA starts."""
    scale, damping = 5.0, 0.3
    x, _ = lissa(sampled(), pack(B), scale=scale, damping=damping, max_steps=steps)
    y, _ = sgd_qp(sampled(-1), pack(B), learning_rate=1 / scale, damping=damping, max_steps=steps + 1)
    assert error(x, flat(y)) < 1e-14


def test_lissa_is_the_neumann_series(x64):
    scale, damping = 5.0, 0.3
    u = B
    for k in range(7):
        u = B + (1 - damping / scale) * u - BATCHES[k % 6] @ u / scale
    x, _ = lissa(sampled(), pack(B), scale=scale, damping=damping, max_steps=7)
    assert error(x, u / scale) < 1e-14


def test_both_reach_the_damped_solution(x64):
    exact = jnp.linalg.solve(MEAN + 0.1 * np.eye(SIZE), B)
    x, info = lissa(full(MEAN), pack(B), scale=3.0, damping=0.1, max_steps=120)
    assert error(x, exact) < 1e-10 and info.residual < 1e-10 and not info.negative_curvature
    x, info = sgd_qp(full(MEAN), pack(B), learning_rate=0.33, damping=0.1, max_steps=120)
    assert error(x, exact) < 1e-10 and info.residual < 1e-10 and info.steps == 120


def test_residual_log_is_of_each_iterate_on_its_batch(x64):
    x, info = sgd_qp(sampled(), pack(B), learning_rate=0.2, damping=0.1, max_steps=4)
    y, wanted = np.zeros(SIZE), []
    for k in range(5):
        r = BATCHES[k] @ y + 0.1 * y - B
        wanted.append(np.linalg.norm(r) / np.linalg.norm(B))
        y = y - 0.2 * r if k < 4 else y
    np.testing.assert_allclose(info.residuals, wanted, rtol=1e-6)
    np.testing.assert_allclose(info.residual, wanted[-1], rtol=1e-12)
    assert error(x, y) < 1e-14


def test_a_decaying_rate_lowers_the_noise_floor(x64):
    steps = 600
    decayed = optax.cosine_decay_schedule(0.4, steps, alpha=0.01)
    constant, _ = sgd_qp(sampled(), pack(B), learning_rate=0.4, max_steps=steps)
    x, _ = solvers.sgd_qp(learning_rate=decayed, max_steps=steps).solve(sampled(), pack(B))
    assert error(x, SOLUTION) < 0.02 < 5 * error(x, SOLUTION) < error(constant, SOLUTION)


@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_half_the_hessian_solves_another_system(x64, damping):
    x, info = sgd_qp(full(MEAN), pack(B), learning_rate=0.5, damping=damping, max_steps=200, half_hessian=True)
    assert error(x, np.linalg.solve(MEAN / 2 + damping * np.eye(SIZE), B)) < 1e-10
    assert info.residual > 0.5  # of the system it was meant to solve: twice the answer leaves b itself
    if damping == 0:
        assert error(x, 2 * SOLUTION) < 1e-10


@pytest.mark.torch
@pytest.mark.parametrize("half_hessian", [True, False])
def test_adam_is_the_released_loop(x64, half_hessian):
    """The loop of attack_demo.py on a quadratic loss, its missing create_graph and all."""
    import torch

    rate, decay, init, steps = 1e-2, 0.05, 1e-3, 12
    b, params = torch.tensor(B), torch.zeros(SIZE, dtype=torch.float64, requires_grad=True)
    x = torch.nn.Parameter(torch.full((SIZE,), init, dtype=torch.float64))
    optimizer = torch.optim.Adam([x], lr=rate, weight_decay=decay)
    for k in range(steps):
        A = torch.tensor(BATCHES[k % 6])
        gradient = torch.autograd.grad(0.5 * params @ A @ params, params, create_graph=True)[0]
        Hx = torch.autograd.grad(gradient, params, grad_outputs=x, create_graph=not half_hessian)[0]
        optimizer.zero_grad()
        (0.5 * x @ Hx - b @ x).backward()
        optimizer.step()
    options = {"damping": decay, "init": init, "max_steps": steps, "half_hessian": half_hessian}
    ours, _ = adam_qp(sampled(), pack(B), learning_rate=rate, **options)
    assert error(ours, x.detach().numpy()) < 1e-10


def test_adam_of_few_steps_is_a_sign_not_a_solution(x64):
    x, info = adam_qp(sampled(), pack(B), learning_rate=1e-5, damping=1e-5, init=1e-5, max_steps=20, half_hessian=True)
    assert np.abs(flat(x)).max() <= 1e-5 + 20 * 1.01e-5
    assert np.linalg.norm(flat(x)) < 2e-3 * np.linalg.norm(SOLUTION)
    np.testing.assert_allclose(flat(x) - 1e-5, 20e-5 * np.sign(B), rtol=1e-2)


def test_a_constant_start_stays_in_the_null_space(x64):
    A = symmetric(np.r_[np.zeros(5), np.geomspace(0.5, 4, SIZE - 5)])
    null = np.linalg.eigh(A)[1][:, :5]
    x, _ = sgd_qp(full(A), pack(A @ B), learning_rate=0.3, init=0.01, max_steps=100)
    np.testing.assert_allclose(null.T @ flat(x), 0.01 * null.sum(axis=0), atol=1e-12)
    x, _ = sgd_qp(full(A), pack(A @ B), learning_rate=0.3, max_steps=100)
    np.testing.assert_allclose(null.T @ flat(x), 0, atol=1e-12)


@pytest.mark.parametrize("solve", [sgd_qp, adam_qp])
def test_zero_right_side_gives_exactly_zero(solve):
    x, info = solve(sampled(), pack(jnp.zeros(SIZE)), learning_rate=0.1, max_steps=5)
    assert not flat(x).any() and info.residual == 0
    x, info = lissa(sampled(), pack(jnp.zeros(SIZE)), scale=5.0, max_steps=5)
    assert not flat(x).any() and info.residual == 0


def test_negative_curvature_is_flagged_and_divergence_seen(x64):
    A = symmetric(np.r_[-1.0, np.geomspace(0.5, 4, SIZE - 1)])
    for x, info in (
        sgd_qp(full(A), pack(B), learning_rate=0.3, max_steps=60),
        lissa(full(A), pack(B), scale=4.0, max_steps=60),
    ):
        assert info.negative_curvature and info.residual > 100
        assert np.isfinite(flat(x)).all()
    assert not sgd_qp(full(A), pack(B), learning_rate=0.3, damping=1.5, max_steps=60)[1].negative_curvature


def test_float32(x64):
    x, info = sgd_qp(full(MEAN, jnp.float32), pack(B, jnp.float32), learning_rate=0.33, max_steps=120)
    assert {leaf.dtype for leaf in jax.tree.leaves(x)} == {jnp.dtype(jnp.float32)}
    assert error(x, SOLUTION) < 1e-5
