import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from systems import SIZE, error, flat, jitted, pack, products, run, symmetric, vector

from unlearn_jax import solvers

cg, diagonal, nystrom = map(jitted, (solvers.cg, solvers.diagonal, solvers.nystrom))


def ekfac(gradients, **options):
    """Its inverse: it is a solver, too."""
    return run(solvers.ekfac, "build", (gradients,), options)


B = vector()
KEY = jax.random.key(0)


def dense(preconditioner, dtype=np.float64):
    """The matrix of a preconditioner on the pytree."""
    columns = jax.jit(jax.vmap(lambda e: ravel_pytree(preconditioner(pack(e)))[0]))(np.eye(SIZE, dtype=dtype))
    return np.asarray(columns, np.float64)


def condition(preconditioner, A):
    """Condition number of the preconditioned matrix; it must be positive definite."""
    values = np.linalg.eigvals(dense(preconditioner) @ A).real
    assert values.min() > 0
    return values.max() / values.min()


def steps(A, preconditioner=None, damping=0.0):
    return int(
        cg(products(A), pack(B), damping=damping, rtol=1e-8, max_steps=60, preconditioner=preconditioner)[1].steps
    )


def test_diagonal_makes_a_scaled_system_easy(x64):
    scales = np.geomspace(1, 1e3, SIZE)
    A = scales[:, None] * symmetric(np.linspace(1, 2, SIZE)) * scales
    jacobi = diagonal(pack(np.diag(A)))
    assert condition(jacobi, A) < 10 < 1e4 < np.linalg.cond(A)
    assert 2 * steps(A, jacobi) < steps(A)


def test_diagonal_survives_missing_and_negative_estimates():
    estimate = pack(jnp.asarray(np.r_[0.0, -2.0, np.ones(SIZE - 2)], jnp.float32))
    scaled = flat(diagonal(estimate)(pack(jnp.ones(SIZE))))
    np.testing.assert_allclose(scaled, np.r_[5e5, 0.5, np.ones(SIZE - 2)], rtol=1e-6)


def test_nystrom_at_full_rank_is_the_inverse(x64):
    A = symmetric(np.geomspace(1e-3, 10, SIZE))
    inverse = dense(nystrom(products(A), pack(B), key=KEY, rank=SIZE, damping=0.1))
    product = inverse @ (A + 0.1 * np.eye(SIZE))
    np.testing.assert_allclose(product / product[0, 0], np.eye(SIZE), atol=1e-9)


def test_nystrom_cuts_the_steps_on_an_ill_conditioned_spectrum(x64):
    A, damping = symmetric(np.geomspace(1e-6, 1, SIZE)), 1e-4
    damped = A + damping * np.eye(SIZE)
    preconditioner = nystrom(products(A), pack(B), key=KEY, rank=9, damping=damping)
    assert condition(preconditioner, damped) < 100 < 5e3 < np.linalg.cond(damped)
    assert 2 * steps(A, preconditioner, damping) < steps(A, damping=damping)
    x, info = cg(products(A), pack(B), damping=damping, rtol=1e-12, max_steps=60, preconditioner=preconditioner)
    assert error(x, np.linalg.solve(damped, B)) < 1e-9


def test_nystrom_leaves_what_it_did_not_see_as_it_is(x64):
    """Rank and damping both too small to reach the bottom of the spectrum: still no worse than without."""
    A, damping = symmetric(np.geomspace(1e-3, 1, SIZE)), 1e-7
    preconditioner = nystrom(products(A), pack(B), key=KEY, rank=9, damping=damping)
    assert condition(preconditioner, A) < np.linalg.cond(A) / 4


def test_nystrom_of_low_rank_curvature_solves_in_one_step(x64):
    A = symmetric(np.r_[np.zeros(SIZE - 4), 1.0, 5.0, 20.0, 100.0])
    preconditioner = nystrom(products(A), pack(B), key=KEY, rank=9, damping=0.01)
    assert condition(preconditioner, A + 0.01 * np.eye(SIZE)) < 1 + 1e-6


def test_nystrom_stays_positive_definite(x64):
    indefinite = symmetric(np.r_[-2.0, -0.1, np.geomspace(0.01, 20, SIZE - 2)])
    values = np.linalg.eigvalsh(dense(nystrom(products(indefinite), pack(B), key=KEY, rank=9, damping=0.1)))
    assert values.min() > 0
    A = symmetric(np.geomspace(1e-9, 1, SIZE))
    preconditioner = nystrom(products(A, np.float32), pack(B, np.float32), key=KEY, rank=SIZE, damping=1e-6)
    assert np.linalg.eigvalsh(dense(preconditioner, np.float32)).min() > 0


def kronecker_gradients(leading=()):
    """All pairs of four output and five input vectors: the Fisher is then a Kronecker product. [20, ..., 3, 4]"""
    rng = np.random.default_rng(0)
    s, a = rng.normal(size=(4, *leading, 3)), rng.normal(size=(5, *leading, 4))
    return np.einsum("j...o,k...i->jk...oi", s, a).reshape(20, *leading, 3, 4)


def test_ekfac_is_exact_on_kronecker_gradients(x64):
    G = kronecker_gradients()
    rows = G.reshape(20, -1)
    v = vector(1, 12)
    exact = np.linalg.solve(rows.T @ rows / 20 + 0.1 * np.eye(12), v)
    solved = ekfac({"w": jnp.asarray(G)}, damping=0.1)({"w": jnp.asarray(v.reshape(3, 4))})
    assert error(np.asarray(solved["w"]).ravel(), exact) < 1e-12
    # It is more than the diagonal, which is all there is without the bases.
    plain = ekfac({"w": jnp.asarray(G)}, damping=0.1, max_side=2)({"w": jnp.asarray(v.reshape(3, 4))})
    np.testing.assert_allclose(np.asarray(plain["w"]).ravel(), v / ((rows**2).mean(axis=0) + 0.1), rtol=1e-12)
    assert error(np.asarray(plain["w"]).ravel(), exact) > 0.1


def test_ekfac_treats_a_scans_layers_apart(x64):
    G, v = kronecker_gradients((2,)), vector(1, 24).reshape(2, 3, 4)
    stacked = ekfac(jnp.asarray(G), damping=0.1)(jnp.asarray(v))
    for layer in range(2):
        alone = ekfac(jnp.asarray(G[:, layer]), damping=0.1)(jnp.asarray(v[layer]))
        np.testing.assert_allclose(stacked[layer], alone, rtol=1e-10)


def test_ekfac_on_a_pytree_with_weights(x64):
    """Moments in any eigenbasis are exact, so its diagonal there is the Fisher's; vectors get their plain diagonal."""
    G, weights = np.random.default_rng(0).normal(size=(9, SIZE)), np.random.default_rng(1).uniform(size=9)
    inverse = dense(ekfac(pack(G), damping=0.2, weights=weights))
    np.testing.assert_allclose(inverse, inverse.T, atol=1e-12)
    fisher = (G.T * weights) @ G
    np.testing.assert_allclose(np.diag(inverse)[12:], 1 / (np.diag(fisher)[12:] + 0.2), rtol=1e-10)
    for block in (slice(0, 6), slice(6, 12)):
        values, Q = np.linalg.eigh(inverse[block, block])
        np.testing.assert_allclose(1 / values - 0.2, np.diag(Q.T @ fisher[block, block] @ Q), rtol=1e-9)
    assert not inverse[:12, 12:].any() and not inverse[:6, 6:12].any()


def test_ekfac_preconditions_conjugate_gradients(x64):
    """Gradients whose layers are on different scales, nearly Kronecker within: a few steps instead of many."""
    rng = np.random.default_rng(0)
    s, a = rng.normal(size=(60, 3)) * [1, 5, 25], rng.normal(size=(60, 2)) * [1, 9]
    t, c = rng.normal(size=(60, 2)) * [0.1, 1], rng.normal(size=(60, 3)) * [0.1, 0.3, 1]
    parts = np.einsum("no,ni->noi", s, a), np.einsum("no,ni->noi", t, c), rng.normal(size=(60, 5))
    G = np.concatenate([part.reshape(60, -1) for part in parts], axis=1)
    fisher, damping = G.T @ G / 60, 1e-3
    preconditioner = ekfac(pack(G), damping=damping)
    assert 2 * steps(fisher, preconditioner, damping) < steps(fisher, damping=damping)


@pytest.mark.parametrize(
    "build",
    [
        lambda: solvers.nystrom(rank=2).build(products(np.eye(SIZE)), pack(B), key=KEY, damping=0.0),
        lambda: solvers.ekfac().build(pack(B[None]), damping=0.0),
    ],
)
def test_no_damping_is_refused(build):
    with pytest.raises(ValueError, match="divides by the damping, which has to be positive: 0.0"):
        build()


def test_preconditioners_pass_through_jit_as_arguments():
    A = symmetric(np.geomspace(1e-3, 1, SIZE)).astype(np.float32)
    solver = solvers.cg(rtol=1e-3, max_steps=100)
    solve = jax.jit(lambda M, b: solver.solve(products(A), b, damping=1e-2, preconditioner=M))
    b = pack(B, jnp.float32)
    exact = np.linalg.solve(A + 1e-2 * np.eye(SIZE), B)
    gradients = pack(np.random.default_rng(0).normal(size=(4, SIZE)), jnp.float32)
    for preconditioner in (
        diagonal(pack(np.diag(A))),
        nystrom(products(A), b, key=KEY, rank=9, damping=1e-2),
        ekfac(gradients, damping=1e-2),
    ):
        x, _ = solve(preconditioner, b)
        assert error(x, exact) < 1e-2


def test_a_value_builds_its_preconditioner_where_products_are_enough(x64):
    A, damping = symmetric(np.geomspace(1e-6, 1, SIZE)), 1e-4
    solver = solvers.cg(rtol=1e-8, max_steps=60, preconditioner=solvers.nystrom(rank=9))
    x, info = solver.solve(products(A), pack(B), damping=damping, key=KEY)
    assert error(x, np.linalg.solve(A + damping * np.eye(SIZE), B)) < 1e-4
    assert 2 * info.steps < steps(A, damping=damping)
    with pytest.raises(
        ValueError, match=r"'ekfac' is built from per-example gradients: .*preconditioner=ekfac\(\).build"
    ):
        solvers.cg(preconditioner=solvers.ekfac()).solve(products(A), pack(B), damping=damping)


def test_ekfac_solves_and_says_how_well(x64):
    """A Kronecker Fisher exactly, any other roughly: the residual is that of the Fisher itself."""
    v = vector(1, 12)
    for gradients, exact in ((kronecker_gradients(), True), (np.random.default_rng(0).normal(size=(5, 3, 4)), False)):
        x, info = solvers.ekfac().solve({"w": jnp.asarray(gradients)}, {"w": jnp.asarray(v.reshape(3, 4))}, damping=0.1)
        rows = gradients.reshape(len(gradients), -1)
        left = (rows.T @ rows / len(rows) + 0.1 * np.eye(12)) @ np.asarray(x["w"]).ravel() - v
        np.testing.assert_allclose(info.residual, np.linalg.norm(left) / np.linalg.norm(v), rtol=1e-6, atol=1e-12)
        assert (info.residual < 1e-10) == exact
