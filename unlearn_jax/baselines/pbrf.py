"""The proximal Bregman response function, which influence functions approximate (Bae et al. 2022, arXiv:2209.05364)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from unlearn_jax.arrays import Example, Params
from unlearn_jax.baselines.training import LossTerm, Trained, Training, descend, split
from unlearn_jax.edits import Edit, affected
from unlearn_jax.loss import Loss, require_parts, sum_and_weight
from unlearn_jax.objective import FORWARD, coefficients


def divergence(loss: Loss, reference: Params, params: Params, example: Example) -> tuple[jax.Array, jax.Array]:
    """(sum, weight) over the elements of D(z, z_ref) = l(z) - l(z_ref) - <dl/dz (z_ref), z - z_ref>.

    The Bregman divergence of the criterion. For cross-entropy it is KL(p_ref || p), for half the squared error half the
    squared distance; its Hessian in z at z_ref is that of the criterion, so its Hessian in the parameters is Gauss-Newton's.
    """
    z = loss.z(params, example)
    fixed = jax.lax.stop_gradient(loss.z(reference, example))
    moved = jax.tree.map(jnp.subtract, z, fixed)
    value, slope = jax.jvp(lambda z: loss.criterion(z, example), (fixed,), (moved,))
    bregman = lambda z, example: loss.criterion(z, example) - value - slope
    return dataclasses.replace(loss, criterion=bregman).reduce(z, example)


def pbrf(
    loss: Loss, adapter: Params, dataset: Any, edits: Sequence[Edit], training: Training, *, damping: float
) -> Trained:
    """Descends D'(params) + (damping + weight_decay) / 2 |params - adapter|^2 + (R' - R)(params).

    D' is the divergence of the outputs from the trained adapter's on the edited data, R and R' are the objectives before
    and after the edits. To first order in R' - R the minimiser is adapter - (G' + weight_decay + damping)^-1 grad (R' - R),
    G' being the Gauss-Newton matrix: the damped edit that keeps the residual of training. Unlike that edit, the minimiser
    stays where the outputs are close to the original ones.
    """
    require_parts(loss, "the proximal Bregman objective")
    data = split(loss, dataset, edits)
    gone, new, kept = affected(data.before, data.after)
    old = coefficients(loss, adapter, data.before, training.reduction)
    now = coefficients(loss, adapter, data.after, training.reduction)
    change = np.ones(len(data.after))  # of an example's coefficient, relative to its new value; 1 for new examples
    same = np.setdiff1d(np.arange(len(data.after)), new)
    counts = now[same] > 0
    change[same] = np.where(counts, 1 - old[kept] / np.where(counts, now[same], 1), 0)
    near = Partial(nearby, loss, adapter)
    terms = [LossTerm(near, data.after, now, cost=1 + FORWARD, extra=change)]
    if len(gone):
        terms.append(LossTerm(loss, data.before.select(gone), old[gone], scale=-1.0))
    # The regulariser is in R and in R' and drops out of the difference; its own divergence is a squared distance.
    return descend(terms, adapter, training, proximal=damping + training.weight_decay)


def nearby(loss: Loss, reference: Params, params: Params, pair: tuple[Example, jax.Array]) -> jax.Array:
    """The divergence of one example and its share of R' - R, []."""
    example, change = pair
    moved, _ = divergence(loss, reference, params, example)
    total, _ = sum_and_weight(loss, params, example)
    return moved + change * total
