"""Requests: empty, one after another, taken back; what is added and what is dropped of unconverged training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from test_closed_forms import EXACT, mixed_edits, softmax_problem

from unlearn_jax import CorrectResponse, Dataset, MaskTokens, ModifyQuery, Remove, apply, erase
from unlearn_jax.config import resolve
from unlearn_jax.newton import newton
from unlearn_jax.objective import dataset_objective
from unlearn_jax.problem import make_problem

CONVERGED = {**EXACT, "weight_decay": 1e-2, "newton_steps": 8, "line_search": True}
CONFIG = resolve({**CONVERGED, "curvature": "ggn"})


@pytest.fixture
def problem(rng, x64):
    data, loss = softmax_problem(rng)
    return data, loss, toys.minimise(loss, jnp.zeros((3, 5)), data, 1e-2)


@pytest.mark.parametrize("residual", ["drop", "keep"])
def test_an_edit_that_changes_nothing(rng, problem, residual):
    """Dropping the residual, the delta is exactly zero; keeping it, training is finished."""
    data, loss, trained = problem
    start = trained + 0.1 * rng.normal(size=(3, 5))
    same = [ModifyQuery([1], {"x": data["x"][1:2]}), CorrectResponse([2], [toys.row(data, 2)]), Remove([])]
    for edits in ([], same):
        for curvature_examples in (None, 10):
            config = {**CONVERGED, "residual": residual, "curvature_examples": curvature_examples}
            erasure = erase(loss, start, data, edits, config)
            if residual == "drop":
                assert (erasure.delta == 0).all() and (erasure.adapter == start).all()
                assert erasure.report.steps == [] and erasure.report.delta_norm == 0
            elif curvature_examples is None:
                np.testing.assert_allclose(erasure.adapter, trained, atol=1e-9)
            assert erasure.report.residual_gradient > 0.01


def test_the_residual_of_training(rng, problem):
    """keep: the minimum of the edited objective. drop: the point where its gradient is what it was before the edit."""
    data, loss, trained = problem
    start = trained + 0.1 * rng.normal(size=(3, 5))
    after = apply(Dataset.of(data), mixed_edits(rng, data), loss)
    gradient = lambda params, data: dataset_objective(loss, params, Dataset.of(data), weight_decay=1e-2).gradient(
        params
    )
    edits = mixed_edits(np.random.default_rng(0), data)
    after = apply(Dataset.of(data), edits, loss)
    kept = erase(loss, start, data, edits, {**CONVERGED, "residual": "keep"})
    np.testing.assert_allclose(gradient(kept.adapter, after), 0, atol=1e-10)
    dropped = erase(loss, start, data, edits, CONVERGED)
    np.testing.assert_allclose(gradient(dropped.adapter, after), gradient(start, data), atol=1e-10)
    np.testing.assert_allclose(dropped.report.residual_gradient, np.linalg.norm(gradient(start, data)), rtol=1e-10)


def test_requests_one_after_another_are_the_joint_request(rng, problem):
    data, loss, trained = problem
    start = trained + 0.05 * rng.normal(size=(3, 5))  # not converged: the residual must not be counted twice either
    edits = mixed_edits(rng, data)
    joint = erase(loss, start, data, edits, CONVERGED)
    first = erase(loss, start, data, edits[:2], CONVERGED)
    second = erase(loss, first.adapter, apply(Dataset.of(data), edits[:2], loss), edits[2:], CONVERGED)
    np.testing.assert_allclose(second.adapter, joint.adapter, atol=1e-9)
    assert np.abs(first.adapter - joint.adapter).max() > 1e-3


def test_removed_and_put_back(rng, problem):
    data, loss, start = problem
    before = Dataset.of(data)
    after = apply(before, [Remove([3, 4, 5])], loss)
    removed = newton(make_problem(loss, start, before, after, CONFIG), start, CONFIG).delta
    again = newton(make_problem(loss, start, after, before, CONFIG), start + removed, CONFIG).delta
    assert np.abs(removed).max() > 1e-2
    np.testing.assert_allclose(removed + again, 0, atol=1e-9)


def test_right_sides_add_up(rng, problem):
    """To first order in the share of edited examples always; and exactly where no example comes or goes."""
    data, loss, start = problem
    before, edits = Dataset.of(data), mixed_edits(rng, data)

    def sides(edits, formula):
        config = resolve({**CONVERGED, "curvature": "ggn", "formula": formula, "newton_steps": 1})
        problem = make_problem(loss, start, before, apply(before, edits, loss), config)
        change = problem.change(start, problem.edited.gradient(start))
        return change, problem.first_order and problem.first_order.gradient(start)

    for formula in ("paper", "influence"):
        _, together = sides(edits, formula)
        apart = sum(sides([edit], formula)[1] for edit in edits)
        np.testing.assert_allclose(together, apart, atol=1e-15)
    together, apart = sides(edits[1:], "newton")[0], sum(sides([edit], "newton")[0] for edit in edits[1:])
    np.testing.assert_allclose(together, apart, atol=1e-15)
    together, apart = sides(edits, "newton")[0], sum(sides([edit], "newton")[0] for edit in edits)
    assert 1e-4 < toys.relative_error(apart, together) < 0.15  # 6 of 30 edited


def test_a_sample_of_the_others(rng, x64):
    """Steps by the curvature of a quarter of the untouched examples; right side and residual are exact."""
    data, loss = softmax_problem(rng, 400)
    trained = toys.minimise(loss, jnp.zeros((3, 5)), data, 1e-2)
    edits = [Remove(range(8))]
    whole = erase(loss, trained, data, edits, CONVERGED)
    part = erase(loss, trained, data, edits, {**CONVERGED, "curvature_examples": 100})
    assert (whole.report.sampled, part.report.sampled, part.report.edited) == (392, 100, 8)
    assert toys.relative_error(part.delta, whole.delta) < 0.25
    # Products cost a quarter; gradients and judgement are of all examples.
    assert part.report.example_gradients < 0.7 * whole.report.example_gradients
    start = trained + 0.1 * rng.normal(size=(3, 5))
    keep = {"residual": "keep", "curvature_examples": 100}
    kept = erase(loss, start, data, [], {**CONVERGED, **keep})
    assert toys.relative_error(kept.delta, trained - start) < 0.25


def test_grain_source(rng):
    import grain

    data, loss = softmax_problem(rng)
    data = {name: x.astype(np.float32) if x.dtype == float else x for name, x in data.items()}
    source = grain.MapDataset.source([toys.row(data, i) for i in range(30)])
    edits = mixed_edits(rng, data)
    start = jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)
    for config in ({}, {"reduction": "per_token", "curvature_examples": 10}):
        ours, theirs = (erase(loss, start, x, edits, {"weight_decay": 1e-2, **config}) for x in (data, source))
        np.testing.assert_array_equal(ours.delta, theirs.delta)
        assert np.abs(ours.delta).max() > 1e-3


def test_named_examples_and_masks(rng):
    data, loss = softmax_problem(rng)
    names = np.array([f"q{i}" for i in range(30)])
    edits = [MaskTokens(["q4"], data["loss_mask"][4:5] & (np.arange(4) == 0), renormalize=False), Remove(["q9"])]
    start = jnp.zeros((3, 5))
    named = erase(loss, start, {**data, "id": names}, edits)
    numbered = erase(loss, start, data, [MaskTokens([4], edits[0].masks, renormalize=False), Remove([9])])
    np.testing.assert_array_equal(named.delta, numbered.delta)
    with pytest.raises(ValueError, match="no example has the id 'q30'"):
        erase(loss, start, {**data, "id": names}, [Remove(["q30"])])


def test_adapters_in_bfloat16(rng):
    data, loss = softmax_problem(rng)
    start = {"w": jnp.zeros((3, 5), jnp.bfloat16)}
    loss = type(loss)(lambda params, example: toys.linear(params["w"].astype("float32"), example), loss.criterion)
    erasure = erase(loss, start, data, [Remove([1, 2])], {"weight_decay": 1e-2})
    assert erasure.adapter["w"].dtype == jnp.bfloat16 and erasure.delta["w"].dtype == jnp.float32
    assert jax.tree.leaves(erasure.delta)[0].any()
