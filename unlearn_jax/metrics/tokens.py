"""Statistics of target tokens from a model's logits: the only metrics that run on the accelerator.

The element axis T follows `unlearn_jax.Loss`: `logits[t]` predicts `labels[t]` and `mask[t]` says whether t counts, so
nothing is shifted here. Everything downstream is NumPy on arrays [n, T].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unlearn_jax.arrays import AnyArray, Array, Example, HostArray, LossFunction, Params
from unlearn_jax.loss import Loss, require_parts
from unlearn_jax.objective import Objective


class TokenStatistics(NamedTuple):
    """Statistics [..., T] of target tokens under softmax(logits); zero and False where `mask` is zero."""

    logprob: Any  # log-probability of the label
    correct: Any  # bool, the label is the most likely token
    mask: Any  # bool, the token counts


def token_statistics(logits: AnyArray, labels: AnyArray, mask: AnyArray) -> TokenStatistics:
    """Statistics of target tokens, in float32 or the logits' dtype, the wider one.

    Args:
        logits: [..., T, V].
        labels: int [..., T]; where the mask is zero they may be anything (-100 for example).
        mask: [..., T].

    Returns:
        Arrays [..., T]. Ties of the most likely token go to the lowest id.
    """
    mask = mask != 0
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    safe = jnp.where(mask, labels, 0)
    logprob = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), safe[..., None], axis=-1)[..., 0]
    correct = jnp.argmax(logits, axis=-1) == safe
    return TokenStatistics(jnp.where(mask, logprob, 0), correct & mask, mask)


def token_kl(logits: AnyArray, other: AnyArray) -> Array:
    """KL(softmax(logits) || softmax(other)) of each position: [..., T, V] twice -> [..., T]."""
    dtype = jnp.promote_types(jnp.promote_types(logits.dtype, other.dtype), jnp.float32)
    logp, logq = (jax.nn.log_softmax(x.astype(dtype), axis=-1) for x in (logits, other))
    p = jnp.exp(logp)
    return jnp.sum(jnp.where(p > 0, p * (logp - logq), 0.0), axis=-1)


def score(
    loss: LossFunction, params: Params, examples: Example, *, micro_batch: int | None = 8, mesh: Mesh | None = None
) -> TokenStatistics:
    """Statistics of all examples.

    Args:
        loss: a `Loss` whose outputs are logits [T, V], and whose criterion knows the labels' field (`CrossEntropy`).
        params: the adapter.
        examples: fields [n, ...].
        micro_batch: examples that are computed at a time; None: all.
        mesh: spreads the examples, as in `erase`.

    Returns:
        Arrays [n, T] on the host.
    """
    return TokenStatistics(*_over(_statistics, loss, examples, micro_batch, mesh, params))


def kl_to(
    loss: LossFunction, params: Params, other: Params, examples: Example, *, micro_batch: int | None = 8
) -> HostArray:
    """Each example's mean over its target tokens of KL(p_params || p_other).

    With `params` the edited adapter and `other` the retrained one this is the distance that unlearning should close.

    Returns:
        [n] on the host.
    """
    return _over(_divergence, loss, examples, micro_batch, None, params, other)


def compare(
    loss: LossFunction, params: Params, other: Params, examples: Example, *, micro_batch: int | None = 8
) -> tuple[TokenStatistics, HostArray]:
    """`score` of `params` and its `kl_to` `other`, with one forward pass of each."""
    statistics, kl = _over(_comparison, loss, examples, micro_batch, None, params, other)
    return TokenStatistics(*statistics), kl


def _over(
    function: Callable[..., Any],
    loss: LossFunction,
    examples: Example,
    micro_batch: int | None,
    mesh: Mesh | None,
    *params: Params,
) -> Any:
    parts = require_parts(loss, "scoring tokens")
    parts.element_mask(examples)  # raises for negative labels that are not masked
    count = len(jax.tree.leaves(examples)[0])
    objective = Objective.of(parts, examples, np.ones(count), micro_batch=micro_batch, mesh=mesh)
    return jax.tree.map(np.asarray, function(objective, *params))


@jax.jit
def _statistics(objective: Objective, params: Params) -> TokenStatistics:
    def one(loss, example):
        logits = loss.z(params, example)
        return token_statistics(logits, example[loss.criterion.labels], _mask(loss, example, logits))

    statistics = objective.each(lambda part: jax.vmap(lambda example: one(part.loss, example))(part.examples))
    return jax.tree.map(objective.whole, statistics)


@jax.jit
def _divergence(objective: Objective, params: Params, other: Params) -> Array:
    def one(loss, example):
        return _mean_kl(loss, other, example, loss.z(params, example))

    return objective.whole(objective.each(lambda part: jax.vmap(lambda e: one(part.loss, e))(part.examples)))


@jax.jit
def _comparison(objective: Objective, params: Params, other: Params) -> tuple[TokenStatistics, Array]:
    def one(loss, example):
        logits = loss.z(params, example)
        statistics = token_statistics(logits, example[loss.criterion.labels], _mask(loss, example, logits))
        return statistics, _mean_kl(loss, other, example, logits)

    found = objective.each(lambda part: jax.vmap(lambda e: one(part.loss, e))(part.examples))
    return jax.tree.map(objective.whole, found)


def _mean_kl(loss: Loss, other: Params, example: Example, logits: Array) -> Array:
    mask = _mask(loss, example, logits)
    kl = jnp.where(mask != 0, token_kl(logits, loss.z(other, example)), 0.0)
    return jnp.sum(kl * mask) / jnp.sum(mask)


def _mask(loss: Loss, example: Example, logits: Array) -> Array:
    mask = loss.element_mask(example)
    return jnp.ones(logits.shape[:-1], jnp.float32) if mask is None else mask


def without_last(mask: HostArray) -> HostArray:
    """Removes the last token of each row from a mask bool [..., T]; it is the end of the answer and easy to predict.

    Scores of single tokens (extraction strength, exact memorisation, min-k) leave it out; sums over an answer keep it.
    """
    mask = np.asarray(mask) != 0
    after = np.cumsum(mask[..., ::-1], axis=-1)[..., ::-1]
    return mask & (after > 1)
