"""Adapters as people have them: AdamW, stopped early, held against retrains by the same recipe, over five seeds."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

from unlearn_jax import CrossEntropy, Loss, Remove, erase
from unlearn_jax.experiment import invented_people, small_transformer

SEEDS = 5
STRANGERS = 100  # people whose facts the base model knows


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A LoRA transformer of two layers learns four facts about each of some people, with AdamW."""

    people: int
    width: int
    rank: int
    epochs: int
    removed: int  # of the facts, drawn at random
    learning_rate: float
    decay: float = 0.01
    batch: int = 20

    @property
    def size(self) -> small_transformer.TransformerSize:
        return small_transformer.TransformerSize(
            len(invented_people.VOCABULARY), invented_people.LENGTH, width=self.width, rank=self.rank
        )


FIFTY_EPOCHS = Recipe(people=50, width=32, rank=4, epochs=50, removed=2, learning_rate=3e-3)
MANY_PARAMETERS = Recipe(
    people=20, width=64, rank=16, epochs=40, removed=4, learning_rate=1e-3
)  # 8,192 against 80 facts


def logits(base, adapter, example):
    return small_transformer.forward(base, adapter, example["tokens"])[0]


def batches(recipe: Recipe, facts: int, seed: int) -> np.ndarray:
    """int [steps, batch], each epoch in an order of its own."""
    random = np.random.default_rng(seed)
    return np.concatenate([random.permutation(facts).reshape(-1, recipe.batch) for _ in range(recipe.epochs)])


@functools.partial(jax.jit, static_argnums=0)
def train(recipe, base, start, data, counts, order):
    """counts [n]: 0 for what is left out of its batches, otherwise 1. A batch is the mean of what is left in it."""
    optimizer = optax.adamw(recipe.learning_rate, weight_decay=recipe.decay)

    def loss(adapter, rows):
        nll = lambda x: optax.softmax_cross_entropy_with_integer_labels(logits(base, adapter, x), x["labels"])
        each = jax.vmap(lambda x: jnp.sum(nll(x) * x["loss_mask"]) / jnp.sum(x["loss_mask"]))
        return counts[rows] @ each(jax.tree.map(lambda x: x[rows], data)) / counts[rows].sum()

    def step(carry, rows):
        adapter, state = carry
        updates, state = optimizer.update(jax.grad(loss)(adapter, rows), state, adapter)
        return (optax.apply_updates(adapter, updates), state), None

    return jax.lax.scan(step, (start, optimizer.init(start)), order)[0][0]


@jax.jit
def divergences(base, reference, adapter, data):
    """[n]: KL of the answers' tokens, in thousandths, from `reference` to `adapter`"""

    def of(x):
        p, q = (jax.nn.log_softmax(logits(base, which, x)) for which in (reference, adapter))
        return jnp.sum(jnp.sum(jnp.exp(p) * (p - q), -1) * x["loss_mask"]) / jnp.sum(x["loss_mask"])

    return 1e3 * jax.vmap(of)(data)


def compare(recipe: Recipe) -> dict[str, np.ndarray]:
    """name -> [seeds, 2]: divergence on removed and kept facts from the retrain with the same order of batches.

    Prints the means: `pytest -s --all tests/unlearn/test_same_recipe.py`.
    """
    names = invented_people.people(STRANGERS + recipe.people, seed=0)
    known = invented_people.facts(names[:STRANGERS], seed=0)
    both = {name: np.concatenate([x, known.paraphrased[name]]) for name, x in known.examples.items()}
    base = small_transformer.pretrain(jax.random.key(0), recipe.size, both, steps=500)
    loss = Loss(Partial(logits, base), CrossEntropy())
    found: dict[str, list] = {}
    for seed in range(SEEDS):
        data = invented_people.facts(names[STRANGERS:], seed=1 + seed).examples
        n = len(data["tokens"])
        removed = np.sort(np.random.default_rng(seed).permutation(n)[: recipe.removed])
        start, kept = small_transformer.init_adapter(jax.random.key(1 + seed), recipe.size), np.ones(n)
        kept[removed] = 0
        learn = functools.partial(train, recipe, base, start, data)
        order, other = batches(recipe, n, seed), batches(recipe, n, 100 + seed)
        trained, retrained, again = learn(np.ones(n), order), learn(kept, order), learn(kept, other)
        adapters = {"before": trained, "retrain in another order": again}
        for name, config in (("default", {}), ("training_epochs", {"training_epochs": recipe.epochs})):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "training had not converged")
                erasure = erase(loss, trained, data, [Remove(removed)], {"micro_batch": n, **config})
            adapters[name], report = erasure.adapter, erasure.report
            found.setdefault(f"epochs, {name}", []).append(report.epochs)
            found.setdefault(f"unfinished, {name}", []).append(report.unfinished)
        for name, adapter in adapters.items():
            each = np.asarray(divergences(base, retrained, adapter, data))
            found.setdefault(name, []).append((each[removed].mean(), each[kept > 0].mean()))
    arrays = {name: np.array(values) for name, values in found.items()}
    changes = {f"change by {name}": arrays[name] - arrays["before"] for name in ("default", "training_epochs")}
    for name, values in {**arrays, **changes}.items():
        mean, error = np.mean(values, 0), np.std(values, 0, ddof=1) / SEEDS**0.5
        print(f"{name}: {np.round(mean, 2)} (standard error {np.round(error, 2)})")
    return arrays


def nearer_to_the_retrain(recipe: Recipe) -> None:
    """In the mean over seeds; what a retrain in another order is away measures the noise."""
    found = compare(recipe)
    before, noise = found["before"].mean(0), found["retrain in another order"].mean(0)
    for name in ("default", "training_epochs"):
        edited = found[name].mean(0)
        assert edited[0] < before[0]
        assert edited[1] < before[1] + 0.05 * noise[1]
        assert found[f"epochs, {name}"].max() <= recipe.epochs / 4


@pytest.mark.slow
def test_a_lora_trained_for_fifty_epochs():
    nearer_to_the_retrain(FIFTY_EPOCHS)


@pytest.mark.slow
def test_a_lora_of_many_more_parameters_than_examples():
    nearer_to_the_retrain(MANY_PARAMETERS)
