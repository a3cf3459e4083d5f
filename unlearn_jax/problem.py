"""The objective before an edit and the one after it, and the difference of their gradients.

With R = sum over old and kept examples and R' over new and kept ones, divided by their own normalisers,

    grad R - grad R' = sum_old c_i g_i - sum_new c_i g_i + (N' / N - 1) sum_kept c_i g_i

where N and N' are the normalisers; the last sum follows from the pass over the edited data that is made in any case. The right
side of an edit is therefore exact, however few examples the curvature is computed on.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from unlearn_jax import tree
from unlearn_jax.arrays import Params
from unlearn_jax.config import ErasureConfig
from unlearn_jax.dataset import Dataset
from unlearn_jax.edits import affected
from unlearn_jax.objective import Objective, coefficients, normalizer, on_device

QUARTER, ENOUGH = 4, 100  # a quarter of the kept examples stands for all of them if it has at least 100 examples


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """The objectives of an edit: R before it, R' after it, and those that its steps need."""

    edited: Objective  # R', on new and kept examples: it is minimised, and every step is evaluated by it
    # The old examples with their coefficients c and the new ones with -c: R - R' apart from the normaliser. None: no edit.
    leaving: Objective | None
    entering: Objective | None  # the new examples with their coefficients c, the old ones with 0
    shrink: float  # N' / N
    first_order: Objective | None  # its gradient is the right side, for formulas other than "newton"
    # The objective whose curvature is used: R' or a sample of it; for formulas other than "newton", R on old and kept examples.
    curved: Objective
    # Builds R' from a quarter of the kept examples, weighted as all of them. None: too few examples, or `curved` is not R'.
    quarter: Callable[[], Objective] | None
    ids: list[Any]  # of the examples of `edited`
    touched_ids: list[Any]  # of the examples of `leaving` and `entering`
    sample: list[Any]  # ids of the kept examples of `curved`
    touched: int  # number of examples that the edit changes or removes
    examples: int  # number of examples before the edit, which are one epoch of the training

    def change(self, params: Params, gradient: Params) -> Params:
        """Computes grad R - grad R' from grad R' = `gradient`."""
        if self.leaving is None or self.entering is None:
            return tree.zeros_like(gradient)
        # One after the other: on CPUs two programs with collectives that run at the same time can deadlock.
        change = jax.block_until_ready(self.leaving.gradient(params))
        if self.shrink == 1:
            return change
        decay = float(self.edited.weight_decay)

        def of_kept(g, new, p):
            return g - new - decay * p.astype(g.dtype)

        rest = jax.tree.map(of_kept, gradient, jax.block_until_ready(self.entering.gradient(params)), params)
        return tree.add_scale(change, self.shrink - 1, rest)


def make_problem(
    loss: Callable,
    params: Params,
    before: Dataset,
    after: Dataset,
    config: ErasureConfig,
    mesh: Mesh | None = None,
    stand_in: Dataset | None = None,
) -> Problem:
    """Builds the objectives before and after an edit.

    Args:
        loss: as in `erase`.
        params: only their shapes are used.
        before: the data as it was.
        after: the data as it should have been, of the same source.
        config: reduction, weight decay, micro-batches, and the examples of the curvature.
        mesh: spreads the examples.
        stand_in: examples that replace those that the edit does not touch.
    """
    old, new, others = affected(before, after)
    old, new = before.select(old), after.select(new)
    order = np.random.default_rng(config.seed).permutation(others)
    kept = before.select(order) if stand_in is None else stand_in

    def normalizer_of(dataset):
        return normalizer(loss, params, dataset, config.reduction)

    def coefficients_of(dataset, total=None):
        return coefficients(loss, params, dataset, config.reduction, total)

    # Both objectives sum in the same order, so that they are bit-equal where nothing changes.
    rest = normalizer_of(before) - normalizer_of(old) if len(others) else 0.0
    total_before, total_after = rest + normalizer_of(old), rest + normalizer_of(new)
    c_old, c_new = (coefficients_of(data, total) for data, total in ((old, total_before), (new, total_after)))

    def scaled(dataset, total):
        return coefficients_of(dataset) * (rest / total) if len(dataset) else np.zeros(0)

    options = {"weight_decay": config.weight_decay, "micro_batch": config.micro_batch, "mesh": mesh}
    options["offload"] = config.offload

    def objective_of(first, second, c):
        """The objective of the examples of two datasets, one after the other, with coefficients c."""
        examples = jax.tree.map(lambda *x: np.concatenate(x), first.take(), second.take())
        return on_device(Objective.of(loss, examples, c, **options)).with_constants()

    edited = objective_of(new, kept, np.concatenate([c_new, scaled(kept, total_after)]))
    both = leaving = entering = first_order = None
    if len(old) + len(new):
        both = objective_of(old, new, np.zeros(len(old) + len(new)))
        leaving = both.weighted(np.concatenate([c_old, -c_new]))
        entering = both.weighted(np.concatenate([np.zeros(len(old)), c_new]))

    def stand_for_all(sampled):
        """R' with some of the kept examples, weighted as all of them."""
        shares = np.concatenate([c_new, scaled(sampled, total_after)])
        return objective_of(new, sampled, shares)

    curved, sampled, shrink = edited, kept, total_after / total_before
    if config.curvature_examples is not None and stand_in is None:
        sampled = kept.select(np.arange(min(config.curvature_examples, len(kept))))
    if config.formula != "newton":
        weights = np.concatenate([c_old, scaled(sampled, total_before)])
        curved = objective_of(old, sampled, weights)
        if both is not None:
            decay = config.weight_decay * (1 - shrink) * (config.formula == "influence")
            first_order = both.weighted(np.concatenate([c_old, -c_new * shrink]), decay)
    elif len(sampled) < len(kept):
        curved = stand_for_all(sampled)
    count = len(kept) // QUARTER
    quarter = None
    if curved is edited and count >= ENOUGH:
        quarter = lambda: stand_for_all(kept.select(np.arange(count)))  # `kept` is in a random order
    return Problem(
        edited=edited,
        leaving=leaving,
        entering=entering,
        shrink=shrink,
        first_order=first_order,
        curved=curved,
        quarter=quarter,
        ids=[*new.ids.tolist(), *kept.ids.tolist()],
        touched_ids=[*old.ids.tolist(), *new.ids.tolist()],
        sample=sampled.ids.tolist(),
        touched=len(set(old.rows.tolist()) | set(new.rows.tolist())),
        examples=len(before),
    )
