"""What a model says about target tokens, from its logits: the one step of the metrics that runs on the accelerator.

The element axis T follows `unlearn_jax.Loss`: `logits[t]` predicts `labels[t]` and `mask[t]` says whether t counts, so
nothing is shifted here. Everything downstream is NumPy on arrays [n, T].
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unlearn_jax.loss import Example, Loss, Params, require_parts
from unlearn_jax.objective import Objective


class TokenStatistics(NamedTuple):
    """Of each target token under softmax(logits); zero and False where `mask` is zero. All [..., T]."""

    logprob: Any  # log-probability of the label
    mean: Any  # expected log-probability over the vocabulary (minus the entropy)
    variance: Any  # its variance over the vocabulary
    correct: Any  # bool, the label is the most likely token
    mask: Any  # bool, the token counts


def token_statistics(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> TokenStatistics:
    """logits [..., T, V], labels int [..., T], mask [..., T]; computed in float32 or the logits' dtype, the wider one.

    Labels where the mask is zero may be anything (-100 for example). Ties of the most likely token go to the lowest id.
    """
    mask = mask != 0
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    logp = jax.nn.log_softmax(logits, axis=-1)
    p = jnp.exp(logp)
    finite = jnp.where(p > 0, logp, 0.0)  # a token of probability zero adds nothing, though its logarithm is infinite
    mean = jnp.sum(p * finite, axis=-1)
    # Centred: E[x^2] - E[x]^2 loses everything to cancellation where the distribution is flat.
    variance = jnp.sum(p * jnp.square(finite - mean[..., None]), axis=-1)
    safe = jnp.where(mask, labels, 0)
    logprob = jnp.take_along_axis(logp, safe[..., None], axis=-1)[..., 0]
    correct = jnp.argmax(logits, axis=-1) == safe
    keep = lambda x: jnp.where(mask, x, jnp.zeros((), x.dtype))
    return TokenStatistics(keep(logprob), keep(mean), keep(variance), keep(correct), mask)


def token_kl(logits: jax.Array, other: jax.Array) -> jax.Array:
    """KL(softmax(logits) || softmax(other)) of each position: [..., T, V] twice -> [..., T]."""
    dtype = jnp.promote_types(jnp.promote_types(logits.dtype, other.dtype), jnp.float32)
    logp, logq = (jax.nn.log_softmax(x.astype(dtype), axis=-1) for x in (logits, other))
    p = jnp.exp(logp)
    return jnp.sum(jnp.where(p > 0, p * (logp - logq), 0.0), axis=-1)


def score(loss: Loss, params: Params, examples: Example, *, micro_batch: int | None = 8) -> TokenStatistics:
    """Statistics [n, T] on the host of examples [n, ...].

    The outputs of `loss` are logits [T, V], its criterion knows the labels' field (`CrossEntropy`).
    """
    return TokenStatistics(*_over(_statistics, loss, examples, micro_batch, params))


def kl_to(loss: Loss, params: Params, other: Params, examples: Example, *, micro_batch: int | None = 8) -> np.ndarray:
    """Each example's mean over its target tokens of KL(p_params || p_other), [n] on the host.

    With `params` the edited adapter and `other` the retrained one this is the distance that unlearning should close.
    """
    return _over(_divergence, loss, examples, micro_batch, params, other)


def _over(function, loss, examples, micro_batch, *params):
    require_parts(loss, "scoring tokens").element_mask(examples)  # refuses what does not count and is not masked
    count = len(jax.tree.leaves(examples)[0])
    objective = Objective.of(require_parts(loss, "scoring tokens"), examples, np.ones(count), micro_batch=micro_batch)
    join = lambda x: np.asarray(x).reshape(-1, *x.shape[2:])[:count]  # what is beyond is padding
    return jax.tree.map(join, function(objective, *params))


@jax.jit
def _statistics(objective, params):
    def one(loss, example):
        logits = loss.z(params, example)
        return token_statistics(logits, example[loss.criterion.labels], _mask(loss, example, logits))

    return objective.each(lambda part: jax.vmap(lambda example: one(part.loss, example))(part.examples))


@jax.jit
def _divergence(objective, params, other):
    def one(loss, example):
        logits = loss.z(params, example)
        mask = _mask(loss, example, logits)
        kl = jnp.where(mask != 0, token_kl(logits, loss.z(other, example)), 0.0)
        return jnp.sum(kl * mask) / jnp.sum(mask)

    return objective.each(lambda part: jax.vmap(lambda example: one(part.loss, example))(part.examples))


def _mask(loss, example, logits):
    mask = loss.element_mask(example)
    return jnp.ones(logits.shape[:-1], jnp.float32) if mask is None else mask


def without_last(mask: np.ndarray) -> np.ndarray:
    """bool [..., T]: the mask less its last token of each row, which is the end of the answer and easy to predict.

    The scores of single tokens (extraction strength, exact memorisation, min-k, min-k++) leave it out; sums keep it.
    """
    mask = np.asarray(mask) != 0
    after = np.cumsum(mask[..., ::-1], axis=-1)[..., ::-1]
    return mask & (after > 1)
