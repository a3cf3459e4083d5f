"""E2URec (arXiv:2403.03536): distillation from a teacher that knows the forgotten less, and training on the kept examples."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from unlearn_jax.arrays import Example, Params
from unlearn_jax.baselines.pbrf import divergence
from unlearn_jax.baselines.training import LossTerm, Trained, Training, descend, forgotten, retained, split
from unlearn_jax.edits import Edit
from unlearn_jax.loss import Loss, require_parts
from unlearn_jax.objective import FORWARD, coefficients

MEMORIZE = 0.1  # share of the budget for the model that knows the forgotten too well


def e2urec(
    loss: Loss,
    adapter: Params,
    dataset: Any,
    edits: Sequence[Edit],
    training: Training,
    *,
    weight: float = 0.6,
    alpha: float = 2.0,
) -> Trained:
    """Minimises weight (retained loss + KL(trained || params)) + (1 - weight) KL(teacher || params) on the forgotten.

    The teacher's logits are z - alpha relu(z_known - z): z are those of the trained adapter, z_known those of an adapter that was
    trained further on the forgotten examples alone. As in the released code, an epoch of the second term alone comes first. The
    three trainings together keep to the budget.
    """
    require_parts(loss, "E2URec")
    data = split(loss, dataset, edits)
    forget = forgotten(data.forget, edits)
    spend = lambda terms, start, budget: descend(terms, start, dataclasses.replace(training, budget=budget))
    memory = retained(loss, adapter, forget, training)
    step = min(training.batch, len(forget))
    knows = spend([memory], adapter, max(step, MEMORIZE * training.budget))
    shares = coefficients(loss, adapter, forget, training.reduction)
    teacher = Partial(taught, loss, adapter, knows.adapter, jnp.asarray(alpha))
    away = LossTerm(teacher, forget, shares, scale=1 - weight, cost=1 + 2 * FORWARD)
    first = spend([away], adapter, max(step, len(forget)) * away.cost)
    term = retained(loss, adapter, data.after, training)
    stay = LossTerm(Partial(held, loss, adapter), data.after, term.coefficients, scale=weight, cost=1 + FORWARD)
    left = training.budget - knows.gradients - first.gradients
    last = spend([away, stay], first.adapter, left)
    return last._replace(gradients=knows.gradients + first.gradients + last.gradients)


def taught(
    loss: Loss, trained: Params, knows: Params, alpha: jax.Array, params: Params, example: Example
) -> tuple[jax.Array, jax.Array]:
    """(sum, weight) over the elements of KL(teacher || params)."""
    z, known = (jax.lax.stop_gradient(loss.z(x, example)) for x in (trained, knows))
    logp = jax.nn.log_softmax(z - alpha * jax.nn.relu(known - z))
    kl = lambda logits, _: jnp.sum(jnp.exp(logp) * (logp - jax.nn.log_softmax(logits)), axis=-1)
    return dataclasses.replace(loss, criterion=kl)(params, example)


def held(loss: Loss, trained: Params, params: Params, example: Example) -> tuple[jax.Array, jax.Array]:
    """(sum, weight) over the elements of the loss and of KL(trained || params)."""
    kl, weight = divergence(loss, trained, params, example)
    return kl + loss(params, example)[0], weight
