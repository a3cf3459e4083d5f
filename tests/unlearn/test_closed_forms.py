"""Edits against retraining where retraining is exact: ridge regression, logistic regression, softmax over sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from unlearn_jax import CorrectResponse, CrossEntropy, Dataset, Loss, MaskTokens, ModifyQuery, Remove, apply, cg, erase

EXACT = {
    "damping": 0.0,
    "solver": cg(rtol=1e-13, max_steps=60),
    "newton_steps": 1,
    "line_search": False,
    "curvature_examples": None,
}


def edit_error(loss, start, data, edits, **config):
    """(relative error of the delta against retraining, the delta, the retrained delta)"""
    config = {**EXACT, **config}
    options = (config["weight_decay"], config.get("reduction", "per_example"))
    retrained = toys.minimise(loss, start, apply(Dataset.of(data), edits, loss), *options)
    expected = jax.tree.map(jnp.subtract, retrained, start)
    delta = erase(loss, start, data, edits, config).delta
    return toys.relative_error(delta, expected), toys.flatten(delta), toys.flatten(expected)


def test_ridge_regression(rng, x64):
    """The objective is quadratic: Newton's step is the retrained model, and so is the first order where n stays the same."""
    data, decay = toys.ridge_data(rng), {"weight_decay": 1e-2}
    start = toys.minimise(toys.ridge_loss, jnp.zeros(5), data, 1e-2)
    remove = [Remove(range(7))]
    assert edit_error(toys.ridge_loss, start, data, remove, **decay)[0] < 1e-12
    first_order, _, _ = edit_error(toys.ridge_loss, start, data, remove, formula="influence", **decay)
    assert 0.05 < first_order < 0.5  # 7 of 50
    correct = [CorrectResponse(range(7), {"y": data["y"][:7] + 1})]
    for formula in ("newton", "influence", "paper"):
        assert edit_error(toys.ridge_loss, start, data, correct, formula=formula, **decay)[0] < 1e-12
    ask = [ModifyQuery(range(7), {"x": data["x"][:7] + rng.normal(size=(7, 5))})]
    assert edit_error(toys.ridge_loss, start, data, ask, **decay)[0] < 1e-12


def test_first_order_is_a_fifth_off_in_ridge_regression(rng, x64):
    """Median over draws of removing 7 of 50 (the share of removed examples is .14, and their leverage adds to it)."""
    errors = []
    for seed in range(9):
        data = toys.ridge_data(np.random.default_rng(seed))
        start = toys.minimise(toys.ridge_loss, jnp.zeros(5), data, 1e-2)
        config = {"weight_decay": 1e-2, "formula": "influence"}
        errors.append(edit_error(toys.ridge_loss, start, data, [Remove(range(7))], **config)[0])
    assert 0.17 < np.median(errors) < 0.27


@pytest.fixture
def logistic(rng, x64):
    data = toys.logistic_data(rng)
    return data, toys.minimise(toys.logistic_loss, jnp.zeros(12), data, 1e-2)


@pytest.mark.parametrize(
    ("count", "paper", "influence", "newton", "two", "three"),
    [
        (1, 0.05, 0.04, 0.02, 1e-4, 1e-8),
        (20, 0.2, 0.14, 0.06, 1e-3, 1e-6),
        (40, 0.4, 0.2, 0.09, 2e-3, 1e-5),
        (160, 0.8, 0.5, 0.2, 0.03, 1e-3),
    ],
)
def test_removal_in_logistic_regression(logistic, count, paper, influence, newton, two, three):
    """Removing 1, 5 %, 10 %, 40 % of 400: the paper's formula (at least so far off), its mended first order, Newton steps."""
    data, start = logistic
    errors = [
        edit_error(toys.logistic_loss, start, data, [Remove(range(count))], weight_decay=1e-2, **config)[0]
        for config in ({"formula": "paper"}, {"formula": "influence"}, {}, {"newton_steps": 2}, {"newton_steps": 3})
    ]
    assert errors[0] > paper and (np.array(errors[1:]) < (influence, newton, two, three)).all()
    assert (np.diff(errors) < 0).all()


@pytest.mark.parametrize(("count", "newton", "three"), [(20, 0.1, 1e-6), (40, 0.2, 1e-4), (160, 0.45, 1e-2)])
def test_other_questions_in_logistic_regression(rng, logistic, count, newton, three):
    data, start = logistic
    edits = [ModifyQuery(range(count), {"x": data["x"][:count] + 0.7 * rng.normal(size=(count, 12))})]
    error = lambda **config: edit_error(toys.logistic_loss, start, data, edits, weight_decay=1e-2, **config)[0]
    assert error(newton_steps=3) < three
    assert error() < newton
    assert error() < error(formula="paper")


@pytest.mark.parametrize("count", [20, 40, 160])
def test_other_answers_in_logistic_regression(logistic, count):
    """The curvature does not depend on answers: Newton's first step is the first order's, and only more steps help."""
    data, start = logistic
    edits = [CorrectResponse(range(count), {"labels": 1 - data["labels"][:count]})]
    run = lambda **config: edit_error(toys.logistic_loss, start, data, edits, weight_decay=1e-2, **config)
    one, delta, _ = run()
    for formula in ("paper", "influence"):
        np.testing.assert_allclose(run(formula=formula)[1], delta, rtol=1e-8)
    three = run(newton_steps=3, line_search=True)[0]
    assert 0.1 < one and three < one / 4
    assert run(newton_steps=12, line_search=True)[0] < 1e-6


def test_corrected_answers_are_underestimated_by_one_step(logistic):
    """From corrupted labels to the clean ones, as in the paper: the right direction at about half of the length."""
    clean, _ = logistic
    labels = clean["labels"].copy()
    labels[:80] = 1 - labels[:80]
    data = {**clean, "labels": labels}
    start = toys.minimise(toys.logistic_loss, jnp.zeros(12), data, 1e-2)
    edits = [CorrectResponse(range(80), {"labels": clean["labels"][:80]})]
    error, delta, expected = edit_error(toys.logistic_loss, start, data, edits, weight_decay=1e-2)
    norm = np.linalg.norm
    assert delta @ expected > 0.99 * norm(delta) * norm(expected)
    assert 0.35 < norm(delta) / norm(expected) < 0.75
    assert edit_error(toys.logistic_loss, start, data, edits, weight_decay=1e-2, newton_steps=3)[0] < error / 10


def test_the_wrong_sign_is_twice_off(logistic):
    data, start = logistic
    error, delta, expected = edit_error(toys.logistic_loss, start, data, [Remove(range(20))], weight_decay=1e-2)
    wrong = np.linalg.norm(-delta - expected) / np.linalg.norm(expected)
    assert error < 0.06 and 1.9 < wrong < 2.1


def softmax_problem(rng, n=30):
    """Linear outputs of sequences: the objective is convex, so converged Newton steps must find the retrained minimum."""
    data = toys.sequences(rng, n)
    data["labels"] = (data["x"] @ rng.normal(size=(toys.DIM, toys.CLASSES)) + rng.gumbel(size=(n, 4, 5))).argmax(-1)
    return data, Loss(toys.linear, CrossEntropy())


def mixed_edits(rng, data):
    """One of each kind; the answer changes its length, so that the normaliser per token changes too."""
    shorter = data["loss_mask"][3:4].copy()
    shorter[0, 1:] = False
    long = [i for i in range(8, 30) if data["loss_mask"][i].sum() > 1][:2]
    masks = [np.eye(4, dtype=bool)[np.flatnonzero(data["loss_mask"][i])[-1]] for i in long]
    return [
        Remove([0, 1]),
        ModifyQuery([2], {"x": rng.normal(size=(1, 4, 3))}),
        CorrectResponse([3], {"labels": (data["labels"][3:4] + 1) % 5, "loss_mask": shorter}),
        MaskTokens(long[:1], masks[:1]),
        MaskTokens(long[1:], masks[1:], renormalize=False),
    ]


@pytest.mark.parametrize("reduction", ["per_example", "per_token"])
@pytest.mark.parametrize("weighted", [False, True])
def test_mixed_edits_reach_the_retrained_minimum(rng, x64, reduction, weighted):
    data, loss = softmax_problem(rng)
    weights = rng.random(30) + 0.5 if weighted else None
    dataset = Dataset.of(data, weights)
    start = toys.minimise(loss, jnp.zeros((3, 5)), dataset, 1e-2, reduction)
    edits = mixed_edits(rng, data)
    config = {**EXACT, "weight_decay": 1e-2, "reduction": reduction, "newton_steps": 6, "line_search": True}
    erasure = erase(loss, start, data, edits, config, weights=weights)
    retrained = toys.minimise(loss, start, apply(dataset, edits, loss), 1e-2, reduction)
    np.testing.assert_allclose(erasure.adapter, retrained, atol=1e-9)
    assert np.abs(retrained - start).max() > 0.02
    assert erasure.report.edits == {"Remove": 2, "ModifyQuery": 1, "CorrectResponse": 1, "MaskTokens": 2}
