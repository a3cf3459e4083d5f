"""Optimisers: AdamW or Muon, with a schedule and clipping."""

import dataclasses
from typing import Any, Literal

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from pixel_jax.arrays import Params
from pixel_jax.config import positive


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser; by default that of the released RL recipe (lr 1e-6, warm-up 3 %, cosine down to half)."""

    kind: Literal["adamw", "muon"] = "adamw"  # Muon updates matrices, and NAdamW the other weights
    learning_rate: float = 1e-6  # the highest, after the warm-up
    schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up
    final_fraction: float = 0.5  # of the learning rate, where the cosine ends
    warmup: float = 0.03  # share of all steps
    b1: float = 0.9  # decay of the mean of the gradients
    b2: float = 0.95  # decay of the mean of their squares
    eps: float = 1e-8  # added to the root of that mean
    weight_decay: float = 0.0  # decoupled; multiplied by the learning rate
    clip: float = 1.0  # global norm of the gradient

    def __post_init__(self):
        for name in ("warmup", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share, in [0, 1]: {getattr(self, name)}")
        positive(self, "learning_rate", "eps", "clip")


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Makes a schedule from step to learning rate: linear warm-up from zero, then `config.schedule` over the other steps."""
    warmup = round(config.warmup * total_steps)
    rest = max(total_steps - warmup, 1)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, rest, alpha=config.final_fraction)
    else:
        after = optax.constant_schedule(config.learning_rate)
    if warmup == 0:
        return after

    def ramp(step: Any) -> Any:
        return config.learning_rate * (step + 1) / (warmup + 1)  # not zero at step 0: the first step has an effect

    return optax.join_schedules([ramp, after], [warmup])


def stacked_matrices(params: Params) -> Params:
    """Selects the matrices [out, in] of the stacked layers for Muon. NAdamW updates the rest (embeddings, norms)."""
    spec = MuonDimensionNumbers(reduction_axis=2, output_axis=1)
    return jax.tree.map(lambda x: spec if x.ndim == 3 else None, params)


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Makes an optimiser: clipping by global norm, then AdamW, or Muon with updates of root mean square 1, as AdamW's."""
    rate = learning_rate(config, total_steps)
    if config.kind == "muon":
        update = muon(
            rate,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=config.weight_decay,
            consistent_rms=1.0,
            muon_weight_dimension_numbers=stacked_matrices,
        )
    else:
        update = optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip), update)
