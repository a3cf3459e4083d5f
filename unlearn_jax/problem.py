"""The objective before an edit and the one after it, on the examples that the edit touches and some of the others.

The others count alike in both but for the normaliser, so a sample of them is enough: its error enters the right side only
times the share of edited examples, and the curvature as that of any curvature from a sample.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from unlearn_jax.config import ErasureConfig
from unlearn_jax.dataset import Dataset
from unlearn_jax.edits import affected
from unlearn_jax.loss import Params
from unlearn_jax.objective import Objective, coefficients, normalizer, on_device


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """R: the objective before the edit, R': after it."""

    after: Objective  # R', on old, new and other examples, those of the old ones counting nothing
    change: Objective  # R - R', on the same: one compiled program gives both gradients
    first_order: (
        Objective | None
    )  # the derivative of `change` in the share of edited examples: another formula's right side
    edited: Objective  # R' on new and other examples alone
    curved: Objective  # whose curvature is taken: `edited`, or R on old and other examples for another formula
    ids: list[Any]  # of the examples of `after` and `change`
    touched: int  # examples that the edit touches
    sampled: int  # examples that it does not, and that are looked at
    whole: bool  # those are all


def make_problem(
    loss: Callable,
    params: Params,
    before: Dataset,
    after: Dataset,
    config: ErasureConfig,
    mesh: Mesh | None = None,
    stand_in: Dataset | None = None,
) -> Problem:
    """`stand_in`: examples that take the place of those that the edit does not touch."""
    old, new, others = affected(before, after)
    old, new = before.select(old), after.select(new)
    sample = np.random.default_rng(config.seed).permutation(others)[: config.curvature_examples]
    kept = before.select(sample) if stand_in is None else stand_in
    mass = lambda dataset: normalizer(loss, params, dataset, config.reduction)
    weigh = lambda dataset, total=None: coefficients(loss, params, dataset, config.reduction, total)
    # Sums in one order for both, so that they are equal to the last bit where nothing changes.
    rest = mass(before) - mass(old) if len(others) else 0.0
    total_before, total_after = rest + mass(old), rest + mass(new)
    c_old, c_new = (weigh(data, total) for data, total in ((old, total_before), (new, total_after)))
    c_kept = weigh(kept) * rest if len(kept) else np.zeros(0)

    options = {"weight_decay": config.weight_decay, "micro_batch": config.micro_batch, "mesh": mesh}
    build = lambda examples, c: on_device(Objective.of(loss, examples, c, **options))
    parts = [old.take(), new.take(), kept.take()]
    c_before = np.concatenate([c_old, np.zeros(len(new)), c_kept / total_before])
    c_after = np.concatenate([np.zeros(len(old)), c_new, c_kept / total_after])
    join = lambda parts: jax.tree.map(lambda *x: np.concatenate(x), *parts)
    union = build(join(parts), c_after)
    edited = build(join(parts[1:]), c_after[len(old) :])
    curved, first_order = edited, None
    if config.formula != "newton":
        curved = build(join([parts[0], parts[2]]), np.concatenate([c_old, c_kept / total_before]))
        shrink = total_after / total_before
        c_first = np.concatenate([c_old, -c_new * shrink, np.zeros(len(kept))])
        first_order = union.weighted(c_first, config.weight_decay * (1 - shrink) * (config.formula == "influence"))
    return Problem(
        after=union,
        change=union.weighted(c_before - c_after),
        first_order=first_order,
        curved=curved,
        edited=edited,
        ids=[*old.ids.tolist(), *new.ids.tolist(), *kept.ids.tolist()],
        touched=len(set(old.rows.tolist()) | set(new.rows.tolist())),
        sampled=len(kept),
        whole=len(kept) == len(others),
    )
