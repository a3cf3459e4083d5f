"""Training that can be repeated: to the last bit, from any checkpoint, with examples at weight zero."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unlearn_jax import CrossEntropy, Loss
from unlearn_jax.requests.replay import NOBODY, TrainingRecipe, beginning, last_before, train

COUNT = 13
RECIPE = TrainingRecipe(epochs=3, batch=4, learning_rate=0.05, decay=0.1, checkpoint_every=1, seed=3)


def outputs(params, example):
    return (example["x"] @ params["a"] @ params["b"])[None]


LOSS = Loss(outputs, CrossEntropy(), mask=None)


@pytest.fixture(scope="module")
def data():
    random = np.random.default_rng(0)
    x = random.normal(size=(COUNT, 5)).astype(np.float32)
    return {"x": x, "labels": random.integers(0, 3, (COUNT, 1))}


@pytest.fixture(scope="module")
def start():
    random = np.random.default_rng(1)
    return {"a": jnp.asarray(random.normal(size=(5, 2)), jnp.float32), "b": jnp.zeros((2, 3))}


@pytest.fixture(scope="module")
def trained(data, start, tmp_path_factory):
    """The adapter, and the directory of its checkpoints."""
    place = tmp_path_factory.mktemp("checkpoints")
    return train(RECIPE, LOSS, beginning(RECIPE, start), data, np.ones(COUNT), checkpoints=place), place


def test_every_epoch_sees_every_example_once():
    order = RECIPE.order(COUNT)
    assert order.shape == (3 * 4, 4)
    epochs = order.reshape(3, 16)
    for epoch in epochs:
        assert sorted(epoch[epoch != NOBODY].tolist()) == list(range(COUNT))
    assert (epochs[0] != epochs[1]).any()
    np.testing.assert_array_equal(RECIPE.order(COUNT), order)


def test_it_is_adamw_on_the_batches(data, start, trained):
    optimizer = optax.adamw(RECIPE.learning_rate, weight_decay=RECIPE.decay)
    params, state = start, optimizer.init(start)

    def loss(params, x, labels):
        logits = x @ params["a"] @ params["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    for rows in RECIPE.order(COUNT):
        rows = rows[rows != NOBODY]
        gradient = jax.grad(loss)(params, data["x"][rows], data["labels"][rows, 0])
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    for name in params:
        np.testing.assert_allclose(trained[0][name], params[name], atol=1e-5)


def test_a_replay_is_the_training_to_the_last_bit(data, start, trained):
    """From the beginning, and from the last checkpoint before an example was seen."""
    order = RECIPE.order(COUNT)[:4]
    firsts = {int(x): step for step, rows in enumerate(order) for x in rows if x != NOBODY}
    begins = set()
    for example, first in firsts.items():
        begin = last_before(RECIPE, COUNT, np.array([example]), start, trained[1])
        assert begin.step == first  # a checkpoint every step
        begins.add(begin.step)
        weights = np.ones(COUNT)
        weights[example] = 0
        again = train(RECIPE, LOSS, begin, data, weights)
        whole = train(RECIPE, LOSS, beginning(RECIPE, start), data, weights)
        for name in again:
            np.testing.assert_array_equal(again[name], whole[name])
        assert any((again[name] != trained[0][name]).any() for name in again)
    assert begins == {0, 1, 2, 3}
    same = train(RECIPE, LOSS, last_before(RECIPE, COUNT, np.array([], int), start, trained[1]), data, np.ones(COUNT))
    for name in same:
        np.testing.assert_array_equal(same[name], trained[0][name])


def test_weight_zero_is_not_there(data, start):
    """Whatever the example is: its loss may even be not finite."""
    weights = np.ones(COUNT)
    weights[2] = 0
    broken = {**data, "x": data["x"].copy()}
    broken["x"][2] = 1e30
    one, two = (train(RECIPE, LOSS, beginning(RECIPE, start), x, weights) for x in (data, broken))
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])


def test_without_checkpoints_it_is_the_beginning(start, tmp_path):
    assert last_before(RECIPE, COUNT, np.array([5]), start, tmp_path).step == 0
