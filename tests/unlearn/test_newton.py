"""Steps of `erase`: which curvature and which damping each takes, and what is said of training that stopped early."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from unlearn_jax import Remove, ggnvp, hvp
from unlearn_jax.baselines import converge
from unlearn_jax.dataset import Dataset
from unlearn_jax.edits import apply
from unlearn_jax.erase import erase
from unlearn_jax.objective import dataset_objective

DECAY = 1e-2
EDITS = [Remove([0, 5, 9])]


@pytest.fixture
def trained(rng, x64):
    """(data, adapter): a network at its minimum."""
    data, params = toys.sequences(rng, 24), toys.params(rng)
    objective = dataset_objective(toys.LOSS, params, Dataset.of(data), weight_decay=DECAY)
    found, norm = converge(objective, params, tolerance=1e-9)
    assert norm < 1e-8
    return data, found.adapter


def test_lbfgs_goes_on_to_the_warm_retrain(trained):
    """From one Newton step, where the number of steps is left open; without it that step is all."""
    data, params = trained
    after = apply(Dataset.of(data), EDITS)
    objective = dataset_objective(toys.LOSS, params, after, weight_decay=DECAY)
    warm, _ = converge(objective, params, tolerance=1e-10)
    distance = lambda x: np.linalg.norm(toys.flatten(x) - toys.flatten(warm.adapter))
    config = {"weight_decay": DECAY, "solver": {"rtol": 1e-3, "max_steps": 200}, "epochs": "unlimited"}
    free = erase(toys.LOSS, params, data, EDITS, config)
    step = erase(toys.LOSS, params, data, EDITS, {**config, "newton_steps": 1})
    assert step.report.finish is None and free.report.steps[0].actual == step.report.steps[0].actual
    finish = free.report.finish
    assert finish.gradient <= 1e-6 * free.report.right_side and finish.evaluations > 1 and finish.actual < 0
    assert distance(free.adapter) < 1e-3 * distance(params) and distance(free.adapter) < 0.1 * distance(step.adapter)
    J = lambda x: float(objective.value(x))
    np.testing.assert_allclose(finish.actual, J(free.adapter) - J(step.adapter), rtol=1e-6)
    gradients = free.report.example_gradients - step.report.example_gradients
    np.testing.assert_allclose(gradients, finish.evaluations * objective.count)


def test_what_training_left_undone_is_kept_or_finished(rng, x64):
    data, params = toys.sequences(rng, 24), toys.params(rng)
    objective = dataset_objective(toys.LOSS, params, Dataset.of(data), weight_decay=DECAY)
    early = converge(objective, params, tolerance=1e-4)[0].adapter
    config = {"weight_decay": DECAY, "solver": {"rtol": 1e-3}, "epochs": "unlimited"}
    report = erase(toys.LOSS, early, data, [Remove([3])], config).report
    # Finer than training was done, the gradient tells of the tilt alone.
    assert 1e-6 < report.unfinished < 1 and report.finish.gradient <= report.residual_gradient
    assert report.finish.gradient > 1e-2 * report.residual_gradient
    kept = erase(toys.LOSS, early, data, [Remove([3])], {**config, "residual": "keep"})
    after = dataset_objective(toys.LOSS, early, apply(Dataset.of(data), [Remove([3])]), weight_decay=DECAY)
    assert np.linalg.norm(toys.flatten(after.gradient(kept.adapter))) <= 1e-6 * kept.report.right_side


def test_curvature_is_gauss_newton_of_a_loss_and_the_hessian_of_a_callable(trained):
    data, params = trained
    free = {"weight_decay": DECAY, "newton_steps": 1}
    assert erase(toys.LOSS, params, data, EDITS, free).report.config.curvature == "ggn"
    assert erase(lambda *args: toys.LOSS(*args), params, data, EDITS, free).report.config.curvature == "hessian"


def test_the_damping_follows_how_well_a_step_was_foretold(trained):
    data, params = trained
    config = {
        "weight_decay": DECAY,
        "newton_steps": 4,
        "solver": {"rtol": 1e-3},
        "curvature": "hessian",
        "damping_fraction": 1e-2,
    }
    steps = erase(toys.LOSS, params, data, EDITS, config).report.steps
    for one, two in zip(steps, steps[1:], strict=False):
        share = one.actual / one.predicted
        trusted = one.step_size == 1 and share > 0.75 and not one.negative_curvature
        factor = 10 if one.step_size < 1 or share < 0.25 else 0.1 if trusted else 1
        np.testing.assert_allclose(two.damping, factor * one.damping, rtol=1e-9)
    assert steps[-1].damping < steps[0].damping
    fixed = erase(toys.LOSS, params, data, EDITS, {**config, "damping": 0.1}).report.steps
    assert {step.damping for step in fixed} == {0.1}


def test_training_that_stopped_early_is_told(rng, x64):
    data, params = toys.sequences(rng, 24), toys.params(rng)
    with pytest.warns(
        UserWarning, match=r"training had not converged: \|grad R\| is .* times the right side.*residual='keep'"
    ):
        report = erase(toys.LOSS, params, data, [Remove([3])], {"weight_decay": DECAY}).report
    assert len(report.steps) == 1 and report.finish is None
    objective = dataset_objective(toys.LOSS, params, Dataset.of(data), weight_decay=DECAY)
    np.testing.assert_allclose(report.residual_gradient, np.linalg.norm(toys.flatten(objective.gradient(params))))
    np.testing.assert_allclose(report.unfinished, report.residual_gradient / report.right_side)


def test_trained_adapters_raise_no_warning(trained, recwarn):
    data, params = trained
    assert erase(toys.LOSS, params, data, EDITS, {"weight_decay": DECAY}).report.unfinished < 1e-5
    assert not [w for w in recwarn if "converged" in str(w.message)]


def test_products_carry_their_arrays_as_arguments(rng, x64):
    """A program that is handed a product holds none of its arrays, and serves another of the same shapes."""
    data, params = toys.sequences(rng), toys.params(rng)
    twice = jax.jit(lambda product, v: product(product(v)))
    for make in (hvp, ggnvp):
        for linearize in (False, True):
            product = make(toys.LOSS, params, data, linearize=linearize)
            assert not jax.make_jaxpr(lambda product, v: product(v))(product, params).consts
            other = make(toys.LOSS, jax.tree.map(lambda x: 2 * x, params), data, linearize=linearize)
            for one in (product, other):
                expected = one(one(params))
                jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9), twice(one, params), expected)


@pytest.mark.parametrize("bound", [False, True])
def test_a_step_of_lbfgs_compiles_once(rng, caplog, bound):
    """Whether or not the adapter is bound to a device."""
    data, params = toys.sequences(rng, 8), toys.params(rng, "float32")
    params = jax.device_put(params, jax.devices()[0]) if bound else params
    objective = dataset_objective(toys.LOSS, params, Dataset.of(data), weight_decay=DECAY, micro_batch=7 + bound)
    seen = []
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        converge(objective, params, max_steps=4, log=lambda *facts: seen.append(facts))
    assert sum("Compiling" in r.getMessage() and "jit(_step)" in r.getMessage() for r in caplog.records) == 1
    assert [step for step, _, _ in seen] == [1, 2, 3, 4] and seen[-1][1] < seen[0][1]
    assert all(jnp.isfinite(norm) for _, _, norm in seen)


def test_a_sample_is_judged_and_followed_by_all_examples(trained):
    """The curvature of ten examples makes the first step; J, its gradient and what follows are of all of them."""
    data, params = trained
    config = {"weight_decay": DECAY, "curvature_examples": 10}
    after = dataset_objective(toys.LOSS, params, apply(Dataset.of(data), EDITS), weight_decay=DECAY)
    J = lambda x: float(after.value(x))
    for more in ({"newton_steps": 1}, {}, {"newton_steps": 2, "solver": {"rtol": 1e-6}}):
        erasure = erase(toys.LOSS, params, data, EDITS, {**config, **more})
        np.testing.assert_allclose(erasure.report.actual, J(erasure.adapter) - J(params), rtol=1e-3)
        assert erasure.report.sampled == 10 and (erasure.report.finish is None) == bool(more)
    step = dataset_objective(toys.LOSS, params, Dataset.of(data), weight_decay=DECAY).gradient(params)
    b = jax.tree.map(jnp.subtract, step, after.gradient(params))
    np.testing.assert_allclose(erasure.report.right_side, np.linalg.norm(toys.flatten(b)), rtol=1e-9)
