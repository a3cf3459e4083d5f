"""The setup of the experiment: a base model, and adapters that are trained on facts about people whom it does not know."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from scipy.optimize import minimize
from scipy.sparse.linalg import LinearOperator, cg

from unlearn_jax.arrays import Params
from unlearn_jax.curvature import product
from unlearn_jax.dataset import Dataset
from unlearn_jax.experiment import invented_people, small_transformer
from unlearn_jax.loss import CrossEntropy, Loss
from unlearn_jax.objective import Objective, dataset_objective

MEMORY = 30  # pairs of L-BFGS
NEWTON_STEPS = 60


class Converged(NamedTuple):
    """The result of `minimise`."""

    params: Params
    norm: float  # of the gradient at params
    start: float  # of the gradient at the start


def minimise(objective: Objective, start: Params, *, tolerance: float, max_steps: int) -> Converged:
    """Minimises an objective to a small tolerance, so that the reference's own error does not matter to distances from it.

    SciPy's L-BFGS-B comes first, then its trust-region Newton method on exact Hessian products, which leaves saddle points, and
    finally Newton steps by its conjugate gradients. Of `unlearn_jax`, which is evaluated, only gradients and products are used.

    Args:
        objective: to be minimised.
        start: float64 parameters.
        tolerance: of the gradient's norm; rounding may end it earlier.
        max_steps: of L-BFGS.
    """
    flat, unravel = ravel_pytree(start)
    unravel = Partial(unravel)

    def value_and_gradient(x):
        value, gradient = _value_and_gradient(objective, unravel, x)
        return float(value), np.asarray(gradient, np.float64)

    def hessian_product(x, v):
        return np.asarray(_hessian_product(objective, unravel, x, v), np.float64)

    options = {"maxiter": max_steps, "maxfun": 2 * max_steps, "maxcor": MEMORY, "ftol": 0.0, "gtol": 0.1 * tolerance}
    first = np.asarray(flat, np.float64)
    first_norm = float(np.linalg.norm(value_and_gradient(first)[1]))
    result = minimize(value_and_gradient, first, jac=True, method="L-BFGS-B", options=options)
    options = {"maxiter": NEWTON_STEPS, "gtol": tolerance}
    result = minimize(
        value_and_gradient, result.x, jac=True, hessp=hessian_product, method="trust-ncg", options=options
    )
    x, gradient = result.x, result.jac
    # The trust-region method compares values and ends early by their rounding; the gradient's norm resolves further steps.
    while np.linalg.norm(gradient) > tolerance:
        hessian = _operator(x.size, functools.partial(hessian_product, x))
        step, _ = cg(hessian, -gradient, rtol=1e-6)
        new_gradient = value_and_gradient(x + step)[1]
        if not np.linalg.norm(new_gradient) < 0.5 * np.linalg.norm(gradient):
            break
        x, gradient = x + step, new_gradient
    return Converged(unravel(x), float(np.linalg.norm(gradient)), first_norm)


def _operator(size: int, product: Callable[[np.ndarray], np.ndarray]) -> LinearOperator:
    options: Any = {"matvec": product, "dtype": np.float64}  # arguments that SciPy's stubs do not know
    return LinearOperator((size, size), **options)


@jax.jit
def _value_and_gradient(objective, unravel, x):
    value, gradient = objective.value_and_gradient(unravel(x))
    return value, ravel_pytree(gradient)[0]


@jax.jit
def _hessian_product(objective, unravel, x, v):
    params = unravel(x)
    return ravel_pytree(product(objective, params, unravel(v), "hessian"))[0] + objective.weight_decay * v


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
class ExperimentConfig:
    """The numbers of the experiment."""

    people: int = 50  # who have four facts each
    width: int = 16
    layers: int = 2
    rank: int = 4
    strangers: int = 200  # whose facts the base model knows
    holdout: int = 20  # people whose facts nobody learns
    pretraining: int = 1000  # steps
    weight_decay: float = 2e-2  # with less, training does not converge in thousands of steps
    shares: tuple[float, ...] = (0.005, 0.01, 0.05, 0.1, 0.2, 0.4)
    seeds: int = 5
    rates: tuple[float, ...] = (1e-4, 1e-3, 3e-3, 1e-2)  # learning rates that are tried
    batch: int = 32
    micro_batch: int = 25
    tolerance: float = 1e-8  # of the gradient's norm, at which training has converged
    max_steps: int = 1000  # of L-BFGS, before Newton steps
    erasure: dict[str, Any] = dataclasses.field(default_factory=dict)  # fields of `ErasureConfig` but the weight decay
    methods: tuple[str, ...] = METHODS


class Setup(NamedTuple):
    """The base model, its loss and the names, which are the same for every seed."""

    setting: ExperimentConfig
    size: small_transformer.TransformerSize
    loss: Loss
    activations: Callable  # the residual stream after the first layer
    names: list[tuple[str, str]]  # of the people whose facts the base model does not know

    @classmethod
    def of(cls, setting: ExperimentConfig) -> "Setup":
        """Trains a base model on questions about other people, in both wordings."""
        names = invented_people.people(setting.strangers + setting.people + setting.holdout, seed=0)
        known = invented_people.facts(names[: setting.strangers], seed=0)
        both = {name: np.concatenate([x, known.paraphrased[name]]) for name, x in known.examples.items()}
        shape = {"width": setting.width, "layers": setting.layers, "rank": setting.rank}
        size = small_transformer.TransformerSize(len(invented_people.VOCABULARY), invented_people.LENGTH, **shape)
        base = small_transformer.pretrain(jax.random.key(0), size, both, steps=setting.pretraining)
        loss = Loss(Partial(_logits, base), CrossEntropy())
        return cls(setting, size, loss, Partial(_first_layer, base), names[setting.strangers :])

    def objective(self, like: Params, dataset: Dataset) -> Objective:
        """The training's objective over a dataset."""
        options = {"weight_decay": self.setting.weight_decay, "micro_batch": self.setting.micro_batch}
        return dataset_objective(self.loss, like, dataset, **options)

    def converge(self, start: Params, dataset: Dataset) -> Converged:
        """Minimises the training's objective over a dataset."""
        limits = {"tolerance": self.setting.tolerance, "max_steps": self.setting.max_steps}
        return minimise(self.objective(start, dataset), start, **limits)


class Run(NamedTuple):
    """The facts of a seed, and the adapter that has learned them."""

    seed: int
    facts: invented_people.Facts
    holdout: invented_people.Facts
    fresh: Params  # the adapter before training
    adapter: Params
    norm: float  # of the gradient after training, relative to that before it

    @classmethod
    def of(cls, setup: Setup, seed: int) -> "Run":
        """Draws the people of a seed, and trains an adapter on their facts."""
        names = [setup.names[i] for i in np.random.default_rng(seed).permutation(len(setup.names))]
        people = setup.setting.people
        seen, unseen = invented_people.facts(names[:people], seed), invented_people.facts(names[people:], seed)
        fresh = small_transformer.init_adapter(jax.random.key(seed), setup.size)
        found = setup.converge(fresh, Dataset.of(seen.examples))
        return cls(seed, seen, unseen, fresh, found.params, found.norm / found.start)


def _logits(base, adapter, example):
    return small_transformer.forward(base, adapter, example["tokens"])[0]


def _first_layer(base, adapter, example):
    return small_transformer.forward(base, adapter, example["tokens"])[1][0]
