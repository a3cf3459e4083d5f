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
    """(data, adapter): a network that Gauss-Newton steps on the Hessian's tail have brought to its minimum."""
    data, params = toys.sequences(rng, 24), toys.params(rng)
    objective = dataset_objective(toys.LOSS, params, Dataset.of(data), weight_decay=DECAY)
    found, norm = converge(objective, params, tolerance=1e-9)
    assert norm < 1e-8
    return data, found.adapter


def test_a_loss_starts_with_gauss_newton_and_goes_on_with_the_hessian(trained):
    data, params = trained
    free = {"weight_decay": DECAY, "newton_steps": 4, "rtol": 1e-3}
    steps = erase(toys.LOSS, params, data, EDITS, free).report.steps
    first = steps[0]
    foretold = first.step_size == 1 and first.actual / first.predicted > 0.75
    assert not foretold and [step.curvature for step in steps[:2]] == ["ggn", "hessian"]
    for one, two in zip(steps[1:], steps[2:], strict=False):
        if one.curvature == "hessian":
            assert two.curvature == ("ggn" if one.negative_curvature else "hessian")
    own = erase(toys.LOSS, params, data, EDITS, {**free, "curvature": "ggn"}).report
    assert {step.curvature for step in own.steps} == {"ggn"}
    plain = erase(lambda *args: toys.LOSS(*args), params, data, EDITS, free).report
    assert {step.curvature for step in plain.steps} == {"hessian"}


def test_hessian_steps_reach_the_warm_retrain(trained):
    """Quadratically, where Gauss-Newton's crawl."""
    data, params = trained
    after = apply(Dataset.of(data), EDITS)
    objective = dataset_objective(toys.LOSS, params, after, weight_decay=DECAY)
    warm, _ = converge(objective, params, tolerance=1e-10)
    distance = lambda x: np.linalg.norm(toys.flatten(x) - toys.flatten(warm.adapter))
    config = {"weight_decay": DECAY, "newton_steps": 8, "rtol": 1e-4, "max_steps": 200}
    free = erase(toys.LOSS, params, data, EDITS, config).adapter
    own = erase(toys.LOSS, params, data, EDITS, {**config, "curvature": "ggn"}).adapter
    assert distance(free) < 1e-3 * distance(params) and distance(free) < 0.1 * distance(own)


def test_the_damping_follows_how_well_a_step_was_foretold(trained):
    data, params = trained
    config = {"weight_decay": DECAY, "newton_steps": 4, "rtol": 1e-3, "curvature": "hessian", "damping_fraction": 1e-2}
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
    assert sum("Compiling" in r.getMessage() and "_lbfgs_step" in r.getMessage() for r in caplog.records) == 1
    assert [step for step, _, _ in seen] == [1, 2, 3, 4] and seen[-1][1] < seen[0][1]
    assert all(jnp.isfinite(norm) for _, _, norm in seen)


def test_a_sample_is_not_minimised(trained):
    """Of some examples only the response to the edit is taken, one Gauss-Newton step, unless more are asked for."""
    data, params = trained
    config = {"weight_decay": DECAY, "curvature_examples": 10}
    report = erase(toys.LOSS, params, data, EDITS, config).report
    assert [step.curvature for step in report.steps] == ["ggn"] and report.config.newton_steps == 1
    asked = erase(toys.LOSS, params, data, EDITS, {**config, "newton_steps": 2, "rtol": 1e-6}).report
    assert [step.curvature for step in asked.steps] == ["ggn", "ggn"]
