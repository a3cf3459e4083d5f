"""The setting: a base model, people it has never heard of, and adapters that have learnt about them to convergence."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial

from unlearn_jax import facts, testbed
from unlearn_jax.dataset import Dataset
from unlearn_jax.experiment.minimise import Minimum, minimise
from unlearn_jax.loss import CrossEntropy, Loss, Params
from unlearn_jax.objective import Objective, dataset_objective

METHODS = (
    "L-BFGS",
    "fine-tune",
    "gradient ascent",
    "GradDiff",
    "GradDiff-KL",
    "NPO",
    "SimNPO",
    "RMU",
    "PBRF",
    "SISA",
)
UNTUNED = ("L-BFGS",)  # without a learning rate


@dataclasses.dataclass(frozen=True)
class Setting:
    people: int = 50  # four facts each
    width: int = 16
    layers: int = 2
    rank: int = 4
    strangers: int = 200  # whose facts the base model knows
    holdout: int = 20  # people nobody was told about
    pretraining: int = 1000  # steps
    weight_decay: float = 2e-2  # with less, training does not converge in thousands of steps
    shares: tuple[float, ...] = (0.005, 0.01, 0.05, 0.1, 0.2, 0.4)
    seeds: int = 5
    rates: tuple[float, ...] = (1e-4, 1e-3, 3e-3, 1e-2)  # learning rates that are tried
    batch: int = 32
    micro_batch: int = 25
    tolerance: float = 1e-8  # of the gradient's norm where training has converged
    max_steps: int = 1000  # of L-BFGS, before Newton steps
    erasure: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the config, besides the weight decay
    methods: tuple[str, ...] = METHODS


class World(NamedTuple):
    """The same for every seed."""

    setting: Setting
    size: testbed.Size
    loss: Loss
    activations: Callable  # the residual stream after the first layer
    names: list[tuple[str, str]]  # of those whose facts the base model does not know

    @classmethod
    def of(cls, setting: Setting) -> "World":
        """With a base model that knows how questions are asked and answered, in both wordings."""
        names = facts.people(setting.strangers + setting.people + setting.holdout, seed=0)
        known = facts.facts(names[: setting.strangers], seed=0)
        both = {name: np.concatenate([x, known.paraphrased[name]]) for name, x in known.examples.items()}
        shape = {"width": setting.width, "layers": setting.layers, "rank": setting.rank}
        size = testbed.Size(len(facts.VOCABULARY), facts.LENGTH, **shape)
        base = testbed.pretrain(jax.random.key(0), size, both, steps=setting.pretraining)
        loss = Loss(Partial(_logits, base), CrossEntropy())
        return cls(setting, size, loss, Partial(_first_layer, base), names[setting.strangers :])

    def objective(self, like: Params, dataset: Dataset) -> Objective:
        options = {"weight_decay": self.setting.weight_decay, "micro_batch": self.setting.micro_batch}
        return dataset_objective(self.loss, like, dataset, **options)

    def converge(self, start: Params, dataset: Dataset) -> Minimum:
        limits = {"tolerance": self.setting.tolerance, "max_steps": self.setting.max_steps}
        return minimise(self.objective(start, dataset), start, **limits)


class Trial(NamedTuple):
    """One seed."""

    seed: int
    facts: facts.Facts
    holdout: facts.Facts
    fresh: Params  # the adapter before training
    adapter: Params
    norm: float  # of the gradient after training, relative to what it was before

    @classmethod
    def of(cls, world: World, seed: int) -> "Trial":
        names = [world.names[i] for i in np.random.default_rng(seed).permutation(len(world.names))]
        people = world.setting.people
        told, untold = facts.facts(names[:people], seed), facts.facts(names[people:], seed)
        fresh = testbed.init_adapter(jax.random.key(seed), world.size)
        found = world.converge(fresh, Dataset.of(told.examples))
        return cls(seed, told, untold, fresh, found.params, found.norm / found.start)


def _logits(base, adapter, example):
    return testbed.forward(base, adapter, example["tokens"])[0]


def _first_layer(base, adapter, example):
    return testbed.forward(base, adapter, example["tokens"])[1][0]
