"""The proximal Bregman response: its divergence is the Kullback-Leibler one, its first order the damped Gauss-Newton step."""

import jax
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from tests.unlearn.baselines.small_problem import LOSS, T, V, dataset, nll, outputs, params
from unlearn_jax.baselines import Training, pbrf
from unlearn_jax.baselines.pbrf import divergence
from unlearn_jax.dataset import Dataset
from unlearn_jax.edits import CorrectResponse, Remove
from unlearn_jax.loss import Loss, SquaredError

DAMPING, DECAY = 0.3, 0.05


def test_divergence_of_cross_entropy_is_kullback_leibler():
    reference, moved, example = params(0), params(1), {k: v[0] for k, v in dataset().items()}
    logp, logq = (jax.nn.log_softmax(outputs(p, example), axis=-1) for p in (reference, moved))
    expected = ((np.exp(logp) * (logp - logq)).sum(-1) * example["loss_mask"]).sum()
    total, weight = divergence(LOSS, reference, moved, example)
    np.testing.assert_allclose(total, expected, rtol=1e-10)
    assert weight == example["loss_mask"].sum() == T - 2
    np.testing.assert_allclose(divergence(LOSS, moved, moved, example)[0], 0, atol=1e-14)


def test_divergence_of_squares_is_half_the_squared_distance():
    loss = Loss(lambda params, example: example["x"] @ params, SquaredError("y"), mask=None)
    rng = np.random.default_rng(0)
    example = {"x": rng.normal(size=(4, 3)), "y": rng.normal(size=4)}
    one, two = rng.normal(size=(2, 3))
    np.testing.assert_allclose(divergence(loss, one, two, example)[0], 0.5 * ((example["x"] @ (one - two)) ** 2).sum())


@pytest.mark.parametrize(("edit", "reduction"), [("remove", "per_example"), ("correct", "per_token")])
def test_first_order_response_is_the_damped_gauss_newton_step(edit, reduction):
    """With an example of small weight eps the response is eps * (G + decay + damping)^-1 slope + O(eps^2)."""
    data, start, eps = dataset(), params(), 1e-4
    weights = np.ones(len(data["x"]))
    weights[2] = eps
    edits = {"remove": Remove([2]), "correct": CorrectResponse([2], {"labels": (data["labels"][2:3] + 1) % V})}[edit]
    steps = 120
    training = Training(
        optax.sgd(0.5),
        budget=steps * (len(data["x"]) - (edit == "remove")) * 4 / 3 + steps,
        batch=100,
        reduction=reduction,
        weight_decay=DECAY,
    )
    found = pbrf(LOSS, start, Dataset.of(data, weights), [edits], training, damping=DAMPING)
    assert len(found.values) == steps
    move = ravel_pytree(jax.tree.map(np.subtract, found.adapter, start))[0]

    after_weights = np.delete(weights, 2) if edit == "remove" else weights
    after = {k: np.delete(v, 2, axis=0) if edit == "remove" else v for k, v in data.items()}
    if edit == "correct":
        after = {
            **data,
            "labels": np.concatenate([data["labels"][:2], (data["labels"][2:3] + 1) % V, data["labels"][3:]]),
        }

    def objective(flat, data, weights):
        total, count = nll(unravel(flat), data)
        if reduction == "per_example":
            return (weights * total / count).sum() / weights.sum()
        return (weights * total).sum() / (weights * count).sum()

    flat, unravel = ravel_pytree(start)
    slope = jax.grad(objective)(flat, after, after_weights) - jax.grad(objective)(flat, data, weights)
    # The outputs are linear in the parameters, so the Hessian is the Gauss-Newton matrix.
    curvature = jax.hessian(objective)(flat, after, after_weights) + (DECAY + DAMPING) * np.eye(len(flat))
    expected = -np.linalg.solve(curvature, slope)
    assert np.linalg.norm(expected) > 1e-6
    np.testing.assert_allclose(move, expected, atol=3e-4 * np.abs(expected).max())


def test_no_edits_no_response():
    start = params()
    training = Training(optax.sgd(0.5), budget=24, batch=100)
    found = pbrf(LOSS, start, dataset(), [], training, damping=DAMPING)
    for name in start:
        np.testing.assert_allclose(found.adapter[name], start[name], atol=1e-14)


def test_a_large_removal_stays_near():
    """Half of the examples taken out: it forgets, and what is kept is held where it was."""
    data, start = dataset(12), params()
    training = Training(optax.adam(0.02), budget=4000, batch=100)
    found = pbrf(LOSS, start, data, [Remove(np.arange(6))], training, damping=0.01)
    before, after = (nll(p, data)[0] for p in (start, found.adapter))
    assert after[:6].mean() > before[:6].mean() + 0.1
    assert after[6:].mean() < before[6:].mean() + 0.1
