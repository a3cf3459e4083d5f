import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from systems import SIZE, error, flat, jitted, pack, products, symmetric, vector

from unlearn_jax import solvers

cg, identity, relative_residual = map(jitted, (solvers.cg, solvers.identity, solvers.relative_residual))

SPD = symmetric(np.geomspace(0.1, 100, SIZE))
B = vector()


def by_hand(A, b, steps):
    """Textbook conjugate gradients from zero: the iterates."""
    x, r = np.zeros_like(b), b
    p, iterates = r, []
    for _ in range(steps):
        alpha = r @ r / (p @ A @ p)
        x, r_new = x + alpha * p, r - alpha * A @ p
        p, r = r_new + (r_new @ r_new) / (r @ r) * p, r_new
        iterates.append(x)
    return iterates


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_iterates_are_scipys(x64, steps):
    iterate, _ = scipy.sparse.linalg.cg(SPD, B, rtol=0, maxiter=steps)
    x, info = cg(products(SPD), pack(B), rtol=0.0, max_steps=steps)
    assert error(x, iterate) < 1e-11
    assert info.steps == steps


def test_preconditioned_iterate_is_scipys(x64):
    A = SPD + np.diag(np.geomspace(1, 1e4, SIZE))
    M = np.diag(1 / (np.diag(A) + 0.3))
    iterate, _ = scipy.sparse.linalg.cg(A + 0.3 * np.eye(SIZE), B, rtol=0, maxiter=5, M=M)
    preconditioner = solvers.diagonal().build(pack(np.diag(A)), damping=0.3)
    x, _ = cg(products(A), pack(B), damping=0.3, rtol=0.0, max_steps=5, preconditioner=preconditioner)
    assert error(x, iterate) < 1e-11


def test_damped_solve_under_jit(x64):
    A = symmetric(np.r_[-0.4, np.geomspace(1e-3, 10, SIZE - 1)])
    for damping in (0.5, 3.0):
        x, info = cg(products(A), pack(B), damping=damping, rtol=1e-13, max_steps=60)
        assert error(x, jnp.linalg.solve(A + damping * np.eye(SIZE), B)) < 1e-10
        assert not info.negative_curvature


def test_dampings_in_blocks(x64):
    dampings = jnp.array([0.01, 1.0, 50.0])
    x, info = jax.vmap(lambda mu: cg(products(SPD), pack(B), damping=mu, rtol=1e-12, max_steps=60))(dampings)
    for k, damping in enumerate(dampings):
        alone, report = cg(products(SPD), pack(B), damping=damping, rtol=1e-12, max_steps=60)
        assert error(jax.tree.map(lambda leaf, k=k: leaf[k], x), flat(alone)) < 1e-11
        assert abs(info.steps[k] - report.steps) <= 1


def test_report_and_log(x64):
    x, info = cg(products(SPD), pack(B), damping=0.1, rtol=1e-6, max_steps=60)
    A = SPD + 0.1 * np.eye(SIZE)
    np.testing.assert_allclose(info.residual, np.linalg.norm(A @ flat(x) - B) / np.linalg.norm(B), rtol=1e-6)
    np.testing.assert_allclose(info.residual, relative_residual(products(SPD), x, pack(B), damping=0.1), rtol=1e-6)
    steps = int(info.steps)
    assert info.residuals.shape == (61,) and info.residuals.dtype == jnp.float32
    wanted = [1.0] + [np.linalg.norm(A @ y - B) / np.linalg.norm(B) for y in by_hand(A, B, 10)]
    np.testing.assert_allclose(info.residuals[:11], wanted, rtol=1e-4)
    assert info.residuals[steps] <= 1e-6 < info.residuals[steps - 1]
    assert np.isnan(info.residuals[steps + 1 :]).all()


def test_stops_at_max_steps():
    _, info = cg(products(SPD, jnp.float32), pack(B, jnp.float32), rtol=0.0, max_steps=3)
    assert info.steps == 3
    x, info = cg(products(SPD, jnp.float32), pack(B, jnp.float32), max_steps=0)
    assert info.steps == 0 and info.residual == pytest.approx(1) and not flat(x).any()


def test_first_direction_of_negative_curvature_gives_b(x64):
    x, info = cg(products(-SPD), pack(B))
    assert error(x, B) < 1e-15
    assert info.negative_curvature and info.steps == 0
    np.testing.assert_allclose(info.residual, np.linalg.norm(SPD @ B + B) / np.linalg.norm(B), rtol=1e-12)


def test_later_negative_curvature_gives_the_iterate_before(x64):
    A = symmetric(np.r_[-1.0, np.geomspace(1, 100, SIZE - 1)])
    x, info = cg(products(A), pack(B), rtol=1e-10, max_steps=60)
    assert info.negative_curvature and 0 < info.steps < SIZE
    iterates = by_hand(A, B, int(info.steps))
    assert error(x, iterates[-1]) < 1e-9
    values = [y @ A @ y / 2 - B @ y for y in iterates]
    assert values == sorted(values, reverse=True) and values[-1] < 0
    # With damping that lifts the negative eigenvalue there is nothing to flag.
    x, info = cg(products(A), pack(B), damping=1.5, rtol=1e-12, max_steps=60)
    assert not info.negative_curvature and info.residual < 1e-11


def test_singular_system_is_solved_without_null_directions(x64):
    """The gauge of LoRA: b has no part along the flat directions, and a start from zero never puts one in."""
    eigenvalues = np.r_[np.zeros(6), np.geomspace(0.1, 10, SIZE - 6)]
    A = symmetric(eigenvalues)
    b = A @ B
    x, info = cg(products(A), pack(b), rtol=1e-12, max_steps=60)
    assert not info.negative_curvature
    assert error(x, np.linalg.pinv(A, hermitian=True) @ b) < 1e-10
    # A constant start leaves its null part in the answer for good.
    start = np.full(SIZE, 0.1)
    x, _ = cg(products(A), pack(b), rtol=1e-12, max_steps=60, x0=pack(start))
    null = np.linalg.eigh(A)[1][:, :6]
    np.testing.assert_allclose(null.T @ flat(x), null.T @ start, atol=1e-10)
    assert np.linalg.norm(null.T @ start) > 0.1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_flat_direction_in_b_stops_the_solve(x64, dtype):
    """No x solves it: the steps grow until the curvature along them drowns in rounding, and there it ends."""
    A = symmetric(np.r_[np.zeros(6), np.geomspace(0.1, 10, SIZE - 6)])
    x, info = cg(products(A, dtype), pack(B, dtype), rtol=1e-12, max_steps=60)
    assert info.negative_curvature and info.steps < 40
    assert np.isfinite(flat(x)).all() and np.isfinite(info.residual)


@pytest.mark.parametrize("start", [None, pack(np.ones(SIZE, np.float32))])
def test_zero_right_side_gives_exactly_zero(start):
    x, info = cg(products(SPD, jnp.float32), pack(jnp.zeros(SIZE)), x0=start)
    assert not flat(x).any()
    assert info.residual == 0 and info.steps == 0 and not info.negative_curvature


def test_starts_from_x0(x64):
    exact = np.linalg.solve(SPD, B)
    x, info = cg(products(SPD), pack(B), rtol=1e-8, x0=pack(exact))
    assert info.steps == 0 and info.residual < 1e-12 and error(x, exact) < 1e-15
    near = pack(exact + 1e-3 * vector(5))
    x, info = cg(products(SPD), pack(B), rtol=1e-11, max_steps=60, x0=near)
    assert error(x, exact) < 1e-9
    np.testing.assert_allclose(info.residuals[0], relative_residual(products(SPD), near, pack(B)), rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_float32_is_indifferent_to_the_size_of_b(scale):
    x, info = cg(products(SPD, jnp.float32), pack(scale * B, jnp.float32), rtol=1e-5, max_steps=60)
    assert error(x, scale * np.linalg.solve(SPD, B)) < 1e-4
    assert info.residual < 5e-5


def test_float32_reports_the_residual_it_has_not_the_one_it_hopes_for():
    A = symmetric(np.geomspace(1e-4, 1, SIZE)).astype(np.float32)
    x, info = cg(products(A), pack(B, jnp.float32), rtol=1e-7, max_steps=60)
    true = np.linalg.norm(A.astype(float) @ flat(x) - B) / np.linalg.norm(B)
    assert np.nanmin(info.residuals) < true / 10
    assert true / 3 < info.residual < 3 * true


def test_bfloat16_products_float32_algebra():
    seen = []

    def matvec(v):
        seen.append({leaf.dtype for leaf in jax.tree.leaves(v)})
        return jax.tree.map(lambda leaf: 2 * leaf, v)

    x, info = jax.jit(lambda b: solvers.cg().solve(matvec, b, damping=1.0))(pack(B, jnp.bfloat16))
    assert all(dtypes == {jnp.dtype(jnp.bfloat16)} for dtypes in seen)
    assert {leaf.dtype for leaf in jax.tree.leaves(x)} == {jnp.dtype(jnp.bfloat16)}
    assert info.residual.dtype == jnp.float32
    assert error(x, flat(pack(B, jnp.bfloat16)) / 3) < 1e-2


@pytest.mark.parametrize("where", ["b", "products"])
def test_nan_is_not_taken_for_an_answer(where):
    b = np.where(np.arange(SIZE) == 3, np.nan, B) if where == "b" else B
    A = np.full_like(SPD, np.nan) if where == "products" else SPD
    x, info = cg(products(A, jnp.float32), pack(b, jnp.float32))
    assert np.isnan(info.residual) and np.isnan(flat(x)).any()
    assert not info.negative_curvature


def test_the_program_holds_one_copy_of_the_product():
    matvec = lambda v: jax.tree.map(jnp.arctan, v)
    program = str(
        jax.make_jaxpr(lambda b, x0: solvers.cg().solve(matvec, b, x0=x0))(pack(jnp.ones(SIZE)), pack(jnp.ones(SIZE)))
    )
    assert program.count(" atan ") == 4  # one a leaf


def test_identity_is_the_best_multiple_of_b(x64):
    x, info = identity(products(SPD), pack(B), damping=0.2)
    best = B @ B / (B @ (SPD + 0.2 * np.eye(SIZE)) @ B)
    assert error(x, best * B) < 1e-14
    assert info.steps == 1


def test_products_of_another_shape_are_refused():
    b = pack(B, jnp.float32)
    with pytest.raises(ValueError, match=r"shape \(1,\) at \['layers'\]\[0\] for a vector of shape \(4,\)"):
        solvers.cg().solve(lambda v: {**v, "layers": [v["layers"][0][:1], v["layers"][1]]}, b)
    with pytest.raises(ValueError, match="matvec returned PyTreeDef"):
        solvers.cg().solve(lambda v: v["layers"], b)


@jax.jit
def solve_dense(A, b, damping):
    return solvers.cg(rtol=1e-11, max_steps=100).solve(lambda x: A @ x, b, damping=damping)


@settings(max_examples=40, deadline=None)
@given(
    size=st.sampled_from([1, 2, 7]),
    decades=st.floats(0, 3),
    log_scale=st.floats(-20, 20),
    damping=st.sampled_from([0.0, 1e-2]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_positive_definite_system(size, decades, log_scale, damping, seed):
    rng = np.random.default_rng(seed)
    A = symmetric(10 ** rng.uniform(-decades, 0, size), seed)
    b = rng.normal(size=size) * 10**log_scale
    with jax.enable_x64(True):
        x, info = jax.tree.map(np.asarray, solve_dense(A, b, damping))
        twice = np.asarray(solve_dense(A, 2 * b, damping)[0])
    exact = np.linalg.solve(A + damping * np.eye(size), b)
    assert info.residual < 1e-10 and not info.negative_curvature
    assert error(x, exact) < 1e-10 * 10**decades
    np.testing.assert_array_equal(twice, 2 * x)
