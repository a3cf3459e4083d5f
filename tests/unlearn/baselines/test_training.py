"""Budgets are kept, batches are fair, mini-batches estimate what they stand for."""

import dataclasses
import itertools

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unlearn.baselines.small_problem import LOSS, N, dataset, nll, one_step, params
from unlearn_jax.baselines.training import LossTerm, Training, batches, descend, retained, split
from unlearn_jax.dataset import Dataset
from unlearn_jax.edits import CorrectResponse, Remove


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
def test_batches_are_fair(count, size, seed):
    size = min(size, count)
    drawn = np.concatenate(list(itertools.islice(batches(count, size, np.random.default_rng(seed)), count)))
    np.testing.assert_array_equal(np.bincount(drawn, minlength=count), size)


@pytest.mark.parametrize("reduction", ["per_example", "per_token"])
def test_mini_batches_estimate_the_objective(reduction):
    """Averaged over all batches of two, value and gradient are those of the whole."""
    training = dataclasses.replace(one_step(1), reduction=reduction, weight_decay=0.1)
    start, data = params(), dataset()
    term = retained(LOSS, start, Dataset.of(data, weights=np.arange(1.0, N + 1)), training)
    pairs = [np.array(pair) for pair in itertools.combinations(range(N), 2)]
    found = [term.objective(pair, 1).value_and_gradient(start) for pair in pairs]

    def whole(params):
        total, count = nll(params, data)
        w = np.arange(1.0, N + 1)
        mean = (
            (w * total / count).sum() / w.sum() if reduction == "per_example" else (w * total).sum() / (w * count).sum()
        )
        return mean + 0.05 * sum((x**2).sum() for x in params.values())

    np.testing.assert_allclose(np.mean([value for value, _ in found]), whole(start), rtol=1e-10)
    for name, expected in jax.grad(whole)(start).items():
        np.testing.assert_allclose(
            np.mean([slope[name] for _, slope in found], axis=0), expected, rtol=1e-8, atol=1e-12
        )


def test_the_budget_is_kept():
    start, data = params(), Dataset.of(dataset())
    training = Training(optax.sgd(0.01), budget=25, batch=3)
    terms = [retained(LOSS, start, data, training)]
    found = descend(terms, start, training)
    assert (found.gradients, found.values.shape) == (24, (8,))
    dear = dataclasses.replace(terms[0], cost=4 / 3, scale=0.5)
    assert descend([*terms, dear], start, training).gradients == pytest.approx(21)
    with pytest.raises(ValueError, match="one step costs 3 example-gradients, the budget is 2"):
        descend(terms, start, dataclasses.replace(training, budget=2))
    with pytest.raises(ValueError, match="batch 0"):
        Training(optax.sgd(0.01), budget=2, batch=0)


def test_micro_batches_change_nothing_and_seeds_the_order():
    start, data = params(), Dataset.of(dataset())
    training = Training(optax.adam(0.05), budget=40, batch=4)
    run = lambda **options: descend(
        [retained(LOSS, start, data, training)], start, dataclasses.replace(training, **options)
    )
    whole, parts, other = run(), run(micro_batch=2), run(seed=1)
    np.testing.assert_allclose(whole.adapter["w"], parts.adapter["w"], rtol=1e-10)
    assert np.abs(whole.adapter["w"] - other.adapter["w"]).max() > 1e-4
    np.testing.assert_array_equal(whole.adapter["w"], run().adapter["w"])


def test_scales_and_the_proximal_term():
    start, data = params(), Dataset.of(dataset())
    training = dataclasses.replace(one_step(2 * N), budget=2 * N)
    term = retained(LOSS, start, data, training)
    pulled = descend([dataclasses.replace(term, scale=-2.0)], start, training, proximal=3.0)

    def slope(x):
        return jax.grad(lambda p: -2 * (nll(p, dataset())[0] / nll(p, dataset())[1]).mean())(x)

    expected = start
    for _ in range(2):
        gradient = {k: slope(expected)[k] + 3 * (expected[k] - start[k]) for k in start}
        expected = {k: expected[k] - 0.1 * gradient[k] for k in start}
    for name in start:
        np.testing.assert_allclose(pulled.adapter[name], expected[name], rtol=1e-9)


def test_pairs_with_extra_arrays():
    start = params()
    loss = lambda params, pair: pair[1] * LOSS(params, pair[0])[0]
    data, extra = Dataset.of(dataset()), np.arange(float(N))
    term = LossTerm(loss, data, np.full(N, 0.5), extra=extra)
    np.testing.assert_allclose(
        term.objective(np.arange(N), 4).value(start), 0.5 * (extra * nll(start, dataset())[0]).sum()
    )


def test_divergence_of_training_is_an_error():
    with pytest.raises(FloatingPointError, match="learning rate"):
        start, data = params(), Dataset.of(dataset())
        training = Training(optax.sgd(-1e200), budget=60, batch=6)
        descend([retained(LOSS, start, data, training)], start, training)


def test_what_edits_take_back_is_in_its_old_form():
    data = dataset()
    new = np.roll(data["labels"][3:4], 1, axis=1)
    found = split(LOSS, data, [Remove([1]), CorrectResponse([3], {"labels": new})])
    assert found.forget.ids.tolist() == [1, 3] and found.after.ids.tolist() == [0, 2, 3, 4, 5]
    np.testing.assert_array_equal(found.forget.take()["labels"], data["labels"][[1, 3]])
    np.testing.assert_array_equal(found.after.example(2)["labels"], new[0])
