"""The configuration: solvers, dampings, presets, the report."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from ml_collections import ConfigDict

import unlearn_jax as u
from pixel_jax.config import convert
from unlearn_jax import Dataset, ErasureConfig, Remove, apply, erase, fvp, ggnvp, hvp
from unlearn_jax.config import PRESETS, preset, resolve, to_mapping
from unlearn_jax.objective import dataset_objective
from unlearn_jax.solvers import SOLVERS

DECAY, DAMPING = 1e-2, 3e-2
EDITS = [Remove([0, 5, 9])]
EXACT = u.cg(rtol=1e-13, max_steps=200)


@pytest.fixture
def network(rng, x64):
    """(data, parameters): a network that is not at a minimum, with an indefinite Hessian."""
    return toys.sequences(rng, 24), toys.params(rng)


def dense_step(params, data, make, edits=EDITS, decay=DECAY, damping=DAMPING):
    """(A' + decay + damping)^-1 (grad R - grad R'), A' of the edited data by `make` (hvp, ggnvp or fvp)."""
    after = apply(Dataset.of(data), edits)
    gradient = lambda data: toys.flatten(
        dataset_objective(toys.LOSS, params, data, weight_decay=decay).gradient(params)
    )
    A = toys.dense(make(toys.LOSS, params, after.take()), params)
    return jnp.linalg.solve(A + (decay + damping) * jnp.eye(len(A)), gradient(Dataset.of(data)) - gradient(after))


def one_step(params, data, **config):
    exact = {"newton_steps": 1, "line_search": False, "solver": EXACT, "damping": DAMPING}
    return erase(toys.LOSS, params, data, EDITS, {"weight_decay": DECAY, **exact, **config})


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"linearize": True, "micro_batch": 7},
        {"solver": dataclasses.replace(EXACT, preconditioner=u.diagonal())},
        {"solver": dataclasses.replace(EXACT, preconditioner=u.nystrom(rank=10))},
        {"solver": dataclasses.replace(EXACT, preconditioner=u.ekfac()), "micro_batch": 5},
        {"solver": u.minres(rtol=1e-13, max_steps=200)},
        {"solver": u.lanczos(max_steps=32)},
        {"solver": u.sgd_qp(max_steps=4000)},
        {"solver": u.lissa(max_steps=4000)},
        {"solver": u.adam_qp(max_steps=6000, learning_rate=1e-2)},
    ],
    ids=lambda config: "-".join(map(str, config.values())) or "cg",
)
def test_solvers_of_gauss_newton(network, config):
    data, params = network
    erasure = one_step(params, data, **config)
    rough = {"sgd_qp": 1e-4, "lissa": 1e-4, "adam_qp": 1e-3}.get(config.get("solver", EXACT).name, 1e-9)
    expected = dense_step(params, data, ggnvp)
    np.testing.assert_allclose(toys.flatten(erasure.delta), expected, atol=rough * float(np.linalg.norm(expected)))
    assert erasure.report.residual < rough * 10


@pytest.mark.parametrize("solver", [EXACT, u.dual(), dataclasses.replace(EXACT, preconditioner=u.ekfac())], ids=str)
def test_solvers_of_the_empirical_fisher(network, solver):
    data, params = network
    empirical = lambda *args: fvp(*args, kind="empirical")
    erasure = one_step(params, data, curvature="empirical_fisher", micro_batch=5, solver=solver)
    expected = dense_step(params, data, empirical)
    np.testing.assert_allclose(toys.flatten(erasure.delta), expected, atol=1e-9 * float(np.linalg.norm(expected)))


def test_solvers_for_comparison(network):
    """They solve another system, and the residual says so."""
    data, params = network
    for config in (
        {"solver": u.identity()},
        {"solver": u.datainf(), "curvature": "fisher"},
        {"solver": u.ekfac(), "curvature": "fisher"},
    ):
        report = one_step(params, data, **config).report
        assert 1e-3 < report.residual and np.isfinite(report.delta_norm)


def test_hessian_with_negative_curvature(network):
    data, params = network
    H = toys.dense(hvp(toys.LOSS, params, apply(Dataset.of(data), EDITS).take()), params)
    lowest = float(np.linalg.eigvalsh(H)[0])
    assert lowest < -DECAY
    report = one_step(params, data, curvature="hessian", damping=0.0).report
    assert report.negative_curvature
    erasure = one_step(params, data, curvature="hessian", damping=-2 * lowest)
    expected = dense_step(params, data, hvp, damping=-2 * lowest)
    np.testing.assert_allclose(toys.flatten(erasure.delta), expected, rtol=1e-8, atol=1e-12)
    assert not erasure.report.negative_curvature


def test_default_curvature(network):
    data, params = network
    plain = lambda params, example: toys.LOSS(params, example)
    assert erase(toys.LOSS, params, data, []).report.config.curvature == "ggn"
    assert erase(plain, params, data, []).report.config.curvature == "hessian"
    for curvature in ("ggn", "fisher"):
        with pytest.raises(ValueError, match=f"curvature='{curvature}' needs the outputs and the criterion apart"):
            erase(plain, params, data, [], {"curvature": curvature})


def test_damping_by_spectrum(network):
    data, params = network
    A = toys.dense(ggnvp(toys.LOSS, params, apply(Dataset.of(data), EDITS).take()), params)
    report = one_step(params, data, damping="spectrum").report
    np.testing.assert_allclose(report.damping, 1e-4 * np.linalg.eigvalsh(A)[-1], rtol=0.05)


def test_damping_on_held_out_data(network, rng):
    """The best of the grid, by the edited objective of examples that the solve has not seen."""
    data, params = network
    unseen = toys.sequences(np.random.default_rng(7), 40)
    config = {
        "curvature": "ggn",
        "damping_fraction": 1e-2,
        "newton_steps": 1,
        "line_search": False,
        "weight_decay": DECAY,
    }
    chosen = erase(toys.LOSS, params, data, EDITS, {**config, "damping": "held_out"}, held_out=unseen).report.damping
    middle = erase(toys.LOSS, params, data, EDITS, {**config, "damping": "spectrum"}).report.damping

    value = lambda params: dataset_objective(toys.LOSS, params, Dataset.of(unseen)).value(params)
    slope = jax.grad(value)(params)
    removed = dataset_objective(toys.LOSS, params, Dataset.of(toys.row(data, [0, 5, 9])))
    # The objective after the edit, with the unseen examples in the place of the 21 that stay, less its slope before it.
    pull = jax.tree.map(lambda kept, gone: 3 / 24 * (kept - gone), slope, removed.gradient(params))

    def score(damping):
        delta = erase(toys.LOSS, params, data, EDITS, {**config, "damping": damping}).delta
        moved = jax.tree.map(jnp.add, params, delta)
        flat, step = toys.flatten(params), toys.flatten(delta)
        change = value(moved) - value(params) - toys.flatten(slope) @ step
        return change + toys.flatten(pull) @ step + DECAY * (flat @ step + step @ step / 2) - DECAY * flat @ step

    grid = [middle * factor for factor in (1e-2, 1e-1, 1.0, 1e1, 1e2)]
    scores = [float(score(damping)) for damping in grid]
    np.testing.assert_allclose(chosen, grid[int(np.argmin(scores))], rtol=1e-9)
    assert len({round(x, 9) for x in scores}) == 5

    left_out = erase(toys.LOSS, params, data, EDITS, {**config, "damping": "held_out", "curvature_examples": 10})
    assert left_out.report.damping > 0
    with pytest.raises(ValueError, match="damping 'held_out' needs examples that the curvature was not taken of"):
        erase(toys.LOSS, params, data, EDITS, {**config, "damping": "held_out"})


def test_line_search(network):
    """An undamped step of an indefinite Hessian is no descent; what is taken of a step lets the objective fall."""
    data, params = network
    config = {
        "curvature": "ggn",
        "damping": 0.0,
        "weight_decay": 1e-6,
        "newton_steps": 3,
        "solver": u.cg(rtol=1e-8, max_steps=100),
    }
    edits = [Remove(range(12))]
    report = erase(toys.LOSS, params, data, edits, config).report
    assert all(step.actual < 0 for step in report.steps if step.step_size)
    assert any(step.step_size < 1 for step in report.steps)
    bold = erase(toys.LOSS, params, data, edits, {**config, "line_search": False}).report
    assert bold.actual > report.actual and all(step.step_size == 1 for step in bold.steps)


def test_predicted_and_actual_change(network):
    """For a small step of the exact Hessian the quadratic model holds."""
    data, params = network
    report = one_step(params, data, curvature="hessian", damping=1e3).report
    np.testing.assert_allclose(report.predicted, report.actual, rtol=1e-3)
    assert report.actual < 0


def test_a_solve_that_diverges_is_refused(network):
    data, params = network
    with pytest.raises(FloatingPointError, match="solver 'sgd_qp' diverged with damping 0.03.*learning_rate"):
        one_step(params, data, solver=u.sgd_qp(learning_rate=1e6, max_steps=400))


def test_repo_solves_half_of_the_hessian(x64):
    """Run until it stands still, the released code's step is twice the paper's."""
    rng = np.random.default_rng(0)
    data = toys.ridge_data(rng)
    start = toys.minimise(toys.ridge_loss, jnp.zeros(5), data, 0.0)
    edits = [Remove(range(7))]
    run = lambda config: erase(toys.ridge_loss, start, data, edits, config).delta
    paper = run(preset("paper", solver=u.cg(rtol=1e-13)))
    exact = dataset_objective(toys.ridge_loss, start, Dataset.of(data))
    g = dataset_objective(toys.ridge_loss, start, Dataset.of(data).select(range(7))).gradient(start) * 7 / 50
    np.testing.assert_allclose(paper, jnp.linalg.solve(jax.hessian(exact.value)(start), g), rtol=1e-9)
    long, options = {"max_steps": 4000, "learning_rate": 1e-3}, {"micro_batch": 50, "damping": 0.0}
    np.testing.assert_allclose(run(preset("repo", solver=long, **options)), 2 * paper, rtol=1e-3)
    mended = run(preset("repo", solver={**long, "half_hessian": False}, **options))
    np.testing.assert_allclose(mended, paper, rtol=1e-3)
    by_sgd = run(preset("paper", solver={"max_steps": 3000}, micro_batch=50))
    np.testing.assert_allclose(by_sgd, paper, rtol=1e-3)
    as_released = run(preset("repo"))
    assert np.abs(as_released).max() < 1e-5 + 20 * 1e-5 + 1e-6  # whatever the edit: 20 steps of the learning rate


def test_presets_and_overrides():
    assert set(PRESETS) == {"best", "paper", "repo"}
    assert resolve(None) == ErasureConfig() == preset("best")
    assert resolve({"preset": "paper", "weight_decay": 0.5}) == dataclasses.replace(preset("paper"), weight_decay=0.5)
    config = ErasureConfig(solver=u.minres(rtol=0.5))
    assert resolve(config) is config
    assert resolve({"damping": 0}).damping == 0.0


@pytest.mark.parametrize("solver", [kind() for kind in SOLVERS.values()], ids=str)
def test_a_configuration_is_written_and_read(solver):
    config = ErasureConfig(solver=solver, curvature="fisher", damping=0.5, epochs=3.0)
    written = json.loads(json.dumps(to_mapping(config)))
    assert resolve(written) == config and convert(ErasureConfig, ConfigDict(written), "config.erasure") == config
    named = cg_with(u.nystrom(rank=3))
    assert resolve(json.loads(json.dumps(to_mapping(named)))) == named


def cg_with(preconditioner):
    return ErasureConfig(solver=u.cg(rtol=0.2, preconditioner=preconditioner))


def test_the_solver_stands_beside_the_configuration_or_in_it():
    solver = u.cg(preconditioner=u.diagonal())
    assert resolve({"weight_decay": 0.5}, solver) == ErasureConfig(weight_decay=0.5, solver=solver)
    assert resolve(ErasureConfig(seed=3), solver) == ErasureConfig(seed=3, solver=solver)
    with pytest.raises(ValueError, match="give one of them"):
        resolve({"solver": u.minres()}, solver)
    with pytest.raises(ValueError, match="solver is a value, as unlearn_jax.cg"):
        resolve({}, "cg")
    with pytest.raises(ValueError, match=r"config.solver must be Solver, not nystrom\(rank=3\)"):
        resolve({"solver": u.nystrom(rank=3)})
    with pytest.raises(
        ValueError, match=r"preconditioner is nystrom\(rank=...\), diagonal\(\) or ekfac\(\), not minres"
    ):
        u.cg(preconditioner=u.minres())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dampning": 1.0}, "unknown key config.dampning; the nearest known one is config.damping"),
        ({"damping": "large"}, "config.damping must be"),
        ({"damping": -1.0}, "damping must be finite and not negative: -1.0"),
        ({"preset": "fast"}, "preset 'fast' is not one of 'best', 'paper', 'repo'"),
        (
            {"solver": {"name": "dual"}},
            "solver 'dual' works on per-example gradients: curvature must be 'fisher' or 'empirical_fisher'",
        ),
        ({"solver": {"name": "lanczos"}, "damping": 0.0}, "solver 'lanczos' divides by the damping, which is zero"),
        ({"formula": "paper"}, "formula 'paper' is one step from the trained adapter: newton_steps=1"),
        ({"solver": "cg"}, "config.solver must be Solver, not 'cg'"),
        ({"solver": {"name": "gauss"}}, "config.solver.name must be one of 'cg', .*, not 'gauss'"),
        (
            {"solver": {"name": "minres", "preconditioner": {"name": "diagonal"}}},
            "unknown key config.solver.preconditioner; config.solver has rtol, max_steps",
        ),
        ({"solver": {"preconditioner": {"name": "nystrom"}}}, "config.solver.preconditioner lacks rank"),
        (
            {"solver": {"preconditioner": {"name": "nystrom", "rank": 3.5}}},
            "config.solver.preconditioner.rank must be int",
        ),
        ({"solver": {"half_hessian": True}}, "unknown key config.solver.half_hessian"),
        ({"solver": {"max_steps": 0}}, "max_steps of solver 'cg' must be positive, not 0"),
        ({"solver": {"name": "lissa"}, "linearize": True}, "solver 'lissa' takes no product twice"),
        ({"newton_steps": 0}, "newton_steps must be positive, not 0"),
        ({"solver": {"rtol": -1.0}}, "rtol must not be negative: -1.0"),
    ],
)
def test_malformed_configurations(config, message):
    with pytest.raises(ValueError, match=message):
        resolve(config)


def test_report(network):
    data, params = network
    erasure = erase(toys.LOSS, params, data, EDITS, {"weight_decay": DECAY, "newton_steps": 2})
    report = erasure.report
    read = json.loads(report.to_json(indent=1))
    assert read["edits"] == {"Remove": 3} and (read["examples"], read["edited"], read["sampled"]) == (24, 3, 21)
    assert (
        resolve(read["config"]) == report.config
        and read["config"]["solver"]["name"] == "cg"
        and len(read["steps"]) == 2
    )
    assert {
        "residual",
        "negative_curvature",
        "predicted",
        "actual",
        "step_size",
        "damping",
        "seconds",
        "memory",
    } <= read.keys()
    np.testing.assert_allclose(read["delta_norm"], np.linalg.norm(toys.flatten(erasure.delta)), rtol=1e-12)
    np.testing.assert_allclose(report.actual, sum(step.actual for step in report.steps), rtol=1e-12)
    moved = jax.tree.map(jnp.add, params, erasure.delta)
    np.testing.assert_array_equal(toys.flatten(erasure.adapter), toys.flatten(moved))
    assert report.memory > 1e6 and report.seconds >= sum(step.seconds for step in report.steps)
    first = report.steps[0]
    assert report.right_side == first.gradient and first.solver_steps > 0 and 0 < first.residual <= 0.1


def test_requests_of_a_size_share_their_programs(rng, caplog):
    data, params = toys.sequences(rng, 24), toys.params(rng, "float32")
    jax.clear_caches()  # another test may have compiled the same programs
    compilations = []
    for ids in ([0, 5], [1, 2]):
        caplog.clear()
        with jax.log_compiles():
            erase(toys.LOSS, params, data, [Remove(ids)], {"weight_decay": DECAY}, solver=u.cg(rtol=0.02))
        compilations.append(sum("Compiling" in record.getMessage() for record in caplog.records))
    assert compilations[0] > 0 == compilations[1]
