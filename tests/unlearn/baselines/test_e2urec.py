"""E2URec: its teacher and its terms by NumPy, and where it leads."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax, softmax

from unlearn_jax import CrossEntropy, Loss, Remove, baselines
from unlearn_jax.baselines.e2urec import held, taught

LOSS = Loss(lambda w, example: (example["x"] @ w)[None], CrossEntropy(), mask=None)


def make_data():
    random = np.random.default_rng(0)
    return {"x": random.normal(size=(20, 6)).astype("float32"), "labels": random.integers(0, 3, (20, 1))}


def test_the_terms_are_those_of_the_paper():
    random, example = np.random.default_rng(1), jax.tree.map(lambda x: x[0], make_data())
    trained, knows, now = (random.normal(size=(6, 3)).astype("float32") for _ in range(3))
    z, known, current = (example["x"] @ w for w in (trained, knows, now))
    teacher = softmax(z - 2 * np.maximum(known - z, 0))
    expected = np.sum(teacher * (np.log(teacher) - log_softmax(current)))
    found, weight = taught(LOSS, trained, knows, jnp.asarray(2.0), now, example)
    assert weight == 1 and found == pytest.approx(expected, rel=1e-5)
    p = softmax(z)
    kl, label = np.sum(p * (np.log(p) - log_softmax(current))), example["labels"][0]
    found, weight = held(LOSS, trained, now, example)
    assert weight == 1 and found == pytest.approx(kl - log_softmax(current)[label], rel=1e-5)


def test_the_forgotten_go_and_the_kept_stay():
    data, training = make_data(), baselines.Training(optax.adam(0.05), 4000, 20)
    trained = baselines.retrain(LOSS, jnp.zeros((6, 3)), data, [], training).adapter
    forget, kept = ({name: x[part] for name, x in data.items()} for part in (slice(0, 2), slice(2, None)))
    each = jax.vmap(lambda w, example: LOSS(w, example)[0], in_axes=(None, 0))
    loss = lambda w, rows: float(each(w, rows).mean())
    found = {
        weight: baselines.e2urec(LOSS, trained, data, [Remove([0, 1])], training, weight=weight)
        for weight in (0.0, 0.6, 0.99)
    }
    for trial in found.values():
        assert loss(trial.adapter, forget) > loss(trained, forget)
        assert 0.9 * training.budget < trial.gradients <= training.budget
    assert loss(found[0.0].adapter, forget) > loss(found[0.99].adapter, forget)
    assert loss(found[0.99].adapter, kept) < loss(found[0.0].adapter, kept)
