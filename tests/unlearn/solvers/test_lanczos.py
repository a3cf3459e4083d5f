import jax
import jax.numpy as jnp
import numpy as np
import pytest
from systems import SIZE, error, flat, jitted, pack, products, symmetric, vector

from unlearn_jax import solvers, tree
from unlearn_jax.solvers.spectrum import eigenpairs, tridiagonalise

cg, lanczos = map(jitted, (solvers.cg, solvers.lanczos))
extremes = jitted(solvers.extremes)
eigenpairs, low_rank_solve, tridiagonalise = map(jitted, (eigenpairs, solvers.low_rank_solve, tridiagonalise))

EIGENVALUES = np.r_[-3.0, -0.5, np.geomspace(0.01, 50, SIZE - 2)]
A = symmetric(EIGENVALUES)
B = vector()
KEY = jax.random.key(0)


def test_full_krylov_space_has_numpys_eigenvalues(x64):
    values, vectors = eigenpairs(products(A), pack(vector(2)), steps=SIZE)
    wanted, columns = np.linalg.eigh(A)
    order = np.argsort(-np.abs(wanted))
    np.testing.assert_allclose(values, wanted[order], rtol=1e-9, atol=1e-11)
    overlaps = np.stack([tree.inner(vectors, pack(column)) for column in columns[:, order].T])
    np.testing.assert_allclose(np.abs(overlaps), np.eye(SIZE), atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.float64, 1e-14)])
def test_basis_stays_orthonormal(x64, dtype, tolerance):
    basis, T = tridiagonalise(products(A, dtype), pack(vector(2), dtype), steps=SIZE)
    np.testing.assert_allclose(tree.gram(basis), np.eye(SIZE), atol=tolerance)


def test_full_rank_solve_is_exact(x64):
    x, info = lanczos(products(A), pack(B), key=KEY, damping=3.5, max_steps=SIZE)
    assert error(x, jnp.linalg.solve(A + 3.5 * np.eye(SIZE), B)) < 1e-10
    assert info.residual < 1e-10 and info.steps == SIZE and not info.negative_curvature


def test_the_complement_is_kept(x64):
    """Four large eigenvalues, the rest below the damping: b's part outside the four is most of the answer."""
    low = symmetric(np.r_[1e-6 * np.arange(SIZE - 4), 1.0, 5.0, 20.0, 100.0])
    damping = 0.01
    exact = np.linalg.solve(low + damping * np.eye(SIZE), B)
    x, info = lanczos(products(low), pack(B), key=KEY, damping=damping, rank=4, max_steps=12)
    assert error(x, exact) < 2e-3 and info.residual < 2e-3
    values, vectors = eigenpairs(products(low), pack(vector(2)), steps=12, rank=4)
    dropped = tree.combine(tree.inner(vectors, pack(B)) / (values + damping), vectors)
    assert error(dropped, exact) > 0.9


def test_pairs_that_start_from_b_solve_like_conjugate_gradients_for_every_damping(x64):
    pairs = eigenpairs(products(A), pack(B), steps=6)
    for damping in (4.0, 40.0):
        x = low_rank_solve(*pairs, pack(B), damping=damping)
        y, _ = cg(products(A), pack(B), damping=damping, rtol=0.0, max_steps=6)
        assert error(x, flat(y)) < 1e-9


def test_negative_curvature_is_flagged_and_the_step_descends(x64):
    x, info = lanczos(products(A), pack(B), key=KEY, damping=0.1, max_steps=SIZE)
    assert info.negative_curvature and B @ flat(x) > 0
    wanted, Q = np.linalg.eigh(A)
    magnitudes = np.where(wanted + 0.1 > 0, wanted, np.abs(wanted)) + 0.1
    assert error(x, Q @ ((Q.T @ B) / magnitudes)) < 1e-9


def test_exhausted_krylov_space_ends_in_zeros(x64):
    """Three distinct eigenvalues leave nothing after three products, from any start."""
    simple = symmetric(np.repeat([1.0, 2.0, 5.0], [6, 6, 5]))
    basis, T = tridiagonalise(products(simple), pack(B), steps=8)
    np.testing.assert_allclose(np.sort(np.linalg.eigvalsh(T)), [0, 0, 0, 0, 0, 1, 2, 5], atol=1e-9)
    x = low_rank_solve(*eigenpairs(products(simple), pack(B), steps=8), pack(B), damping=0.1)
    assert error(x, np.linalg.solve(simple + 0.1 * np.eye(SIZE), B)) < 1e-9
    values, vectors = eigenpairs(products(np.zeros((SIZE, SIZE))), pack(B), steps=3)
    assert not np.asarray(values).any() and np.isfinite(tree.gram(vectors)).all()


def test_zero_right_side_gives_exactly_zero():
    x, info = lanczos(products(A, jnp.float32), pack(jnp.zeros(SIZE)), key=KEY, damping=4.0, max_steps=5)
    assert not flat(x).any() and info.residual == 0


def test_no_damping_is_refused():
    with pytest.raises(ValueError, match="which has to be positive: 0.0"):
        solvers.lanczos(max_steps=2).solve(products(A, jnp.float32), pack(B, jnp.float32), key=KEY, damping=0.0)


def test_float32_solve():
    x, info = lanczos(products(A, jnp.float32), pack(B, jnp.float32), key=KEY, damping=3.5, max_steps=SIZE)
    assert error(x, np.linalg.solve(A + 3.5 * np.eye(SIZE), B)) < 1e-4
    assert info.residual < 1e-4


def test_products_see_the_parameters_dtype():
    def matvec(v):
        assert {leaf.dtype for leaf in jax.tree.leaves(v)} == {jnp.dtype(jnp.bfloat16)}
        return jax.tree.map(lambda leaf: 2 * leaf, v)

    @jax.jit
    def solve(b):
        _, largest = solvers.extremes(matvec, b, key=KEY, steps=2)
        return largest, solvers.lanczos(max_steps=2).solve(matvec, b, key=KEY, damping=1.0)[0]

    largest, x = solve(pack(B, jnp.bfloat16))
    assert largest.dtype == jnp.float32
    np.testing.assert_allclose(largest, 2, rtol=1e-2)
    assert {leaf.dtype for leaf in jax.tree.leaves(x)} == {jnp.dtype(jnp.bfloat16)}


def test_extremes_come_from_inside(x64):
    for steps, tolerance in ((8, 0.2), (SIZE, 1e-9)):
        smallest, largest = extremes(products(A), pack(B), key=KEY, steps=steps)
        assert -3 * (1 + 1e-12) <= smallest <= -3 * (1 - tolerance)
        assert 50 * (1 - tolerance) <= largest <= 50 * (1 + 1e-12)
