"""Log-probabilities, and losses over the tokens of the loss mask.

A loss is a sum and a denominator, so that accumulation over micro-batches is exact.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from pixel_jax.arrays import AnyArray

Normalizer = Literal["row", "token"]  # of SFT: the mean of the rows' means, or the mean of all tokens


class LossSum(NamedTuple):
    """The loss `total / denominator`; totals and denominators of micro-batches add up to those of the batch."""

    total: jax.Array  # float32 []
    denominator: jax.Array  # float32 []
    rows: jax.Array  # float32 [R], each row's loss before its weight, which shows the rows of a NaN
    sums: dict[str, jax.Array]  # float32 [], sums over counted tokens; divided by `sums["tokens"]` they are the metrics


class Predictions(NamedTuple):
    """The token that the hidden state at each position predicts. Padding may lie between the two."""

    target: jax.Array  # int32 [R, L], the token at the next valid position (any token where there is none)
    source: jax.Array  # int32 [R, L], the valid position before each: where its token was predicted (0: nowhere)
    known: jax.Array  # bool [R, L], valid and preceded by a valid position


def predictions(tokens: AnyArray, valid: AnyArray) -> Predictions:
    """Pairs every position with the token that it predicts: tokens, or any array, [R, L], valid bool [R, L].

    In:  tokens a b . . c d   valid 1 1 0 0 1 1
    Out: target b c . . d .   source . 0 . . 1 4   known 0 1 0 0 1 1
    """
    tokens, valid, length = jnp.asarray(tokens), jnp.asarray(valid), tokens.shape[1]
    index = jnp.arange(length, dtype=jnp.int32)[None]
    last = jax.lax.cummax(jnp.where(valid, index, -1), axis=1)
    source = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    first = jax.lax.cummin(jnp.where(valid, index, length), axis=1, reverse=True)
    following = jnp.pad(first[:, 1:], ((0, 0), (0, 1)), constant_values=length)
    target = jnp.take_along_axis(tokens, jnp.minimum(following, length - 1), axis=1)
    return Predictions(target, jnp.maximum(source, 0), valid & (source >= 0))


def turn_temperature(
    loss_mask: AnyArray, first: float, later: float | None, segments: AnyArray | None = None
) -> jax.Array:
    """The temperature at which each token was sampled, float32 [R, L]: `first` in the first turn of a trace, then `later`.

    Turns are runs of true in the loss mask, bool [R, L], because the observations between them carry no loss.
    """
    if later is None or later == first:
        return jnp.full(loss_mask.shape, first, jnp.float32)
    starts = loss_mask & ~jnp.pad(loss_mask[:, :-1], ((0, 0), (1, 0)))
    turn = jnp.cumsum(starts, axis=1)
    if segments is not None:  # turns are counted from the first token of a trace, which is never in the loss mask
        begins = segments != jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        turn -= jax.lax.cummax(jnp.where(begins, turn, 0), axis=1)
    return jnp.where(turn <= 1, first, later).astype(jnp.float32)


def token_logprobs(
    logits: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    target: jax.Array,
    *,
    temperature: jax.Array | float = 1.0,
    chunk: int = 256,
) -> tuple[jax.Array, jax.Array]:
    """The log-probability of `target` and the entropy of softmax(logits(hidden) / temperature), both float32 [R, L].

    Positions are taken `chunk` at a time and recomputed in the backward pass: no [R, L, V] array exists in either (unless
    L <= chunk). The target's logit is picked by a masked sum, which splits over a sharded vocabulary and has no scatter in its
    gradient. No gradient flows through the entropy.

    Args:
        logits: maps [..., D] to float32 [..., V].
        hidden: [R, L, D].
        target: int32 [R, L].
        temperature: a number or float32 [R, L].
        chunk: positions whose logits exist at once.
    """
    rows, length, _ = hidden.shape
    vocabulary = jax.eval_shape(logits, hidden).shape[-1]
    xs = (hidden, target) if jnp.ndim(temperature) == 0 else (hidden, target, jnp.asarray(temperature)[..., None])

    def piece(hidden, target, temperature=temperature):
        index, zero = jnp.arange(vocabulary, dtype=jnp.int32), jnp.float32(0)
        # The barrier makes them depend on the piece. Otherwise XLA widens them before the loop to arrays as large as the logits
        # (an SFT step of 4 rows of 512 tokens, 35 M parameters, 8,192 words: 420 MB of temporaries instead of 365).
        hidden, index, zero = jax.lax.optimization_barrier((hidden, index, zero))
        scaled = logits(hidden).astype(jnp.float32) / temperature
        peak = jax.lax.stop_gradient(jnp.max(scaled, axis=-1, keepdims=True))
        shifted = scaled - peak
        weights = jnp.exp(shifted)
        norm = jnp.sum(weights, axis=-1)
        logprob = jnp.sum(jnp.where(index == target[..., None], shifted, zero), axis=-1) - jnp.log(norm)
        # The lower bound avoids 0 x -inf; exp of it is 0 in float32.
        entropy = jnp.log(norm) - jnp.sum(weights * jnp.maximum(shifted, -1e4), axis=-1) / norm
        return logprob, jax.lax.stop_gradient(entropy)

    if length <= chunk:
        return piece(*xs)
    pieces = -(-length // chunk)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, pieces * chunk - length)] + [(0, 0)] * (x.ndim - 2), mode="edge")
        return jnp.moveaxis(x.reshape(rows, pieces, chunk, *x.shape[2:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(rows, pieces * chunk)[:, :length]

    _, (logprob, entropy) = jax.lax.scan(
        lambda carry, x: (carry, jax.checkpoint(piece)(*x)), None, tuple(map(split, xs))
    )
    return join(logprob), join(entropy)


@dataclasses.dataclass(frozen=True)
class PolicyLossConfig:
    """The clipped policy gradient, with the released code's constants. `pixel_jax.training.algorithms` has others by name."""

    # The ratio that is clipped: each token's (PPO, GRPO), their geometric mean over a trace (GSPO), or their product over a
    # trace, which is the ratio of the whole response (RLOO).
    ratio: Literal["token", "sequence", "product"] = "token"
    clip_low: float = 0.2  # how far below 1 the ratio counts
    clip_high: float = 0.35  # DAPO's clip-higher
    # `constant`: the sum over tokens divided by `constant` times the number of traces, so that long answers are not discounted
    # (Dr. GRPO); `token`: divided by the number of tokens in the loss mask (DAPO); `row`: the mean over traces of each trace's
    # mean (GRPO). For traces whose tokens are all masked see `masked_traces`.
    # The released code divides each micro-batch of 2 or 4 rows by 200 (100 or 50 a row).
    normalizer: Literal["constant", "token", "row"] = "constant"
    constant: float = 200.0  # the divisor of the normalizer `constant`, for each trace
    # Whether a trace without tokens in the loss mask (`mask_unfinished`) counts in the denominators of `constant` and `row`.
    # `counted`: like any other trace; eq. 3 of GRPO and of Dr. GRPO divide by all G answers, as do TRL, and verl with its
    # `global_batch_size`. `left_out`: it does not count, so that the others weigh more, as in verl without that setting.
    masked_traces: Literal["counted", "left_out"] = "counted"
    kl: float = 0.0  # weight of the divergence from the network without its adapters
    # With a negative advantage the loss is at most this x |advantage| (dual clip, Ye et al. 2020, arXiv:1912.09729, eq. 5), so
    # that a ratio far above 1 does not dominate the step. verl's default is 3. None: no such bound, as in the papers above.
    dual_clip: float | None = None
    # Importance sampling: each token's loss is weighted by p(trainer, before the update) / p(sampler), up to this cap. The ratio
    # is a token's, or the product over its trace; above the cap the weight is the cap (truncated) or 0 (masked). None: all
    # weights are 1. TRL's default, `sequence_mask`, is importance_cap 3, "sequence" and "masked".
    importance_cap: float | None = None
    importance_level: Literal["token", "sequence"] = "token"  # whether the ratio is a token's or its trace's
    importance_above: Literal["truncated", "masked"] = "truncated"  # the treatment of a weight above `importance_cap`

    def __post_init__(self):
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be above 1, where a ratio that has not moved is: {self.dual_clip}")
        for name in ("clip_low", "clip_high", "kl", "constant", "importance_cap"):
            value = getattr(self, name)
            if value is not None and (value < 0 or value == 0 and name in ("constant", "importance_cap")):
                raise ValueError(f"{name} must be positive: {value}")


def masked(x: jax.Array, mask: jax.Array) -> jax.Array:
    """`x` where `mask` holds, else zero. Unlike a product it removes infinities of padding, in values and gradients."""
    return jnp.where(mask, x, 0.0)


def trace_sums(x: jax.Array, segments: AnyArray | None) -> jax.Array:
    """For each token, the sum of `x` float32 [R, L] over its trace: [R, L], or [R, 1] where a row holds one trace."""
    if segments is None:
        return jnp.sum(x, axis=1, keepdims=True)
    length = x.shape[1]
    return jax.vmap(lambda x, segment: jax.ops.segment_sum(x, segment, num_segments=length)[segment])(x, segments)


def trace_number(counted: jax.Array, segments: AnyArray | None, *, every: bool) -> jax.Array:
    """The number of traces of each row, float32 [R]: of all with `every`, or of those with a token in `counted` bool [R, L]."""
    if every:
        if segments is None:
            return jnp.ones(counted.shape[0], jnp.float32)
        return 1.0 + jnp.max(segments, axis=1).astype(jnp.float32)  # traces are numbered from 0
    if segments is None:
        return jnp.any(counted, axis=1).astype(jnp.float32)
    length = counted.shape[1]
    tokens = jax.vmap(lambda x, segment: jax.ops.segment_sum(x, segment, num_segments=length))
    return jnp.sum(tokens(counted.astype(jnp.int32), segments) > 0, axis=1).astype(jnp.float32)


# Bounds in nats of the logarithms of ratios, as in verl; beyond them gradients are zero. In float32 exp(89) is infinite.
LARGEST_LOG_RATIO = {"token": (-20.0, 20.0), "sequence": (-jnp.inf, 10.0), "product": (-20.0, 20.0)}
LARGEST_DIVERGENCE = 10.0  # nats, of one token


def divergence(log_ratio: jax.Array) -> jax.Array:
    """Schulman's k3 estimator of a divergence, exp(d) - d - 1 of d = log(reference / policy), bounded as in verl."""
    log_ratio = jnp.clip(log_ratio, -20.0, 20.0)
    return jnp.minimum(jnp.exp(log_ratio) - log_ratio - 1.0, LARGEST_DIVERGENCE)


def sft_loss(
    logprobs: AnyArray,
    entropy: AnyArray,
    loss_mask: AnyArray,
    weight: AnyArray,
    *,
    normalizer: Normalizer,
    segments: AnyArray | None = None,
) -> LossSum:
    """Computes the negative log-likelihood of the tokens in the loss mask.

    Args:
        logprobs: float32 [R, L].
        entropy: float32 [R, L], for the metrics.
        loss_mask: bool [R, L].
        weight: float32 [R]; 0 marks a row of padding.
        normalizer: `row`: the mean over traces of each trace's mean (as in the released code, which accumulates single rows);
            `token`: the mean over all tokens in the loss mask of the batch.
        segments: int32 [R, L], the number of each token's trace within its row; None: a row holds one trace.
    """
    logprobs, entropy, loss_mask, weight = map(jnp.asarray, (logprobs, entropy, loss_mask, weight))
    rows = -jnp.sum(masked(logprobs, loss_mask), axis=1)
    if normalizer == "row":
        share = masked(1.0 / jnp.maximum(trace_sums(loss_mask.astype(jnp.float32), segments), 1.0), loss_mask)
    else:
        share = loss_mask.astype(jnp.float32)
    total = -jnp.sum(masked(jnp.sum(masked(logprobs * share, loss_mask), axis=1) * weight, weight > 0))
    denominator = jnp.sum(jnp.sum(share, axis=1) * weight)
    counted = loss_mask & (weight > 0)[:, None]
    sums = {
        "tokens": jnp.sum(counted).astype(jnp.float32),
        "nll": -jnp.sum(masked(logprobs, counted)),
        "entropy": jnp.sum(masked(entropy, counted)),
    }
    return LossSum(total, denominator, rows, jax.lax.stop_gradient(sums))


def bounded_ratio(
    log_ratio: jax.Array, count: jax.Array, config: PolicyLossConfig, segments: AnyArray | None
) -> jax.Array:
    """exp(`log_ratio`) of each token or of its trace, float32 [R, L]; `count` has the number of counted tokens of a trace."""
    bounds = LARGEST_LOG_RATIO[config.ratio]
    if config.ratio == "token":
        return jnp.exp(jnp.clip(log_ratio, *bounds))
    whole = trace_sums(log_ratio, segments)
    whole = jnp.clip(whole / count if config.ratio == "sequence" else whole, *bounds)
    return jnp.broadcast_to(jnp.exp(whole), log_ratio.shape)


def capped_importance(
    mismatch: jax.Array, config: PolicyLossConfig, cap: float, segments: AnyArray | None
) -> tuple[jax.Array, jax.Array]:
    """Importance weights exp(`mismatch`) of tokens or traces up to the cap, float32 [R, L]; and which were above, bool."""
    shape = mismatch.shape
    if config.importance_level == "sequence":
        mismatch = trace_sums(mismatch, segments)
    importance = jnp.broadcast_to(jnp.exp(jnp.clip(mismatch, *LARGEST_LOG_RATIO["token"])), shape)
    above = importance > cap
    return jnp.where(above, cap if config.importance_above == "truncated" else 0.0, importance), above


def policy_denominator(
    counted: jax.Array, weight: AnyArray, config: PolicyLossConfig, segments: AnyArray | None
) -> jax.Array:
    """The denominator of the policy loss, float32 []."""
    if config.normalizer == "token":
        return jnp.sum(weight * jnp.sum(counted, axis=1))
    traces = jnp.sum(weight * trace_number(counted, segments, every=config.masked_traces == "counted"))
    return config.constant * traces if config.normalizer == "constant" else traces


def policy_loss(
    logprobs: jax.Array,
    entropy: jax.Array,
    old_logprobs: AnyArray,
    sampler_logprobs: AnyArray,
    advantage: AnyArray,
    loss_mask: AnyArray,
    weight: AnyArray,
    config: PolicyLossConfig,
    *,
    reference_logprobs: jax.Array | None = None,
    segments: AnyArray | None = None,
) -> LossSum:
    """Computes PPO's clipped objective over the tokens of the loss mask.

    All arrays are float32 [R, L] except `weight` [R], `loss_mask` bool [R, L], and `advantage`, which is [R], or [R, L] in packed
    rows (`segments` int32 [R, L]).

        max(-ratio A, -clip(ratio, 1 - low, 1 + high) A) w + kl (exp(d) - d - 1)
        ratio = exp(logprobs - old_logprobs), of a token or of its trace        d = reference_logprobs - logprobs
        w = min(exp(old_logprobs - sampler_logprobs), importance_cap), or 1

    The paper has neither a KL term nor an entropy bonus. The estimator of the divergence is Schulman's k3, as in GRPO
    (arXiv:2402.03300, eq. 4). Truncated importance sampling is that of Yao et al. 2025, Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training. The metric `sampler_trainer_mismatch` is the mean of
    |log p(trainer, before the update) - log p(sampler)|.
    Every exponent is bounded (`LARGEST_LOG_RATIO`), so that a token that is 100 nats off does not make the loss infinite.
    """
    old_logprobs, sampler_logprobs, advantage = map(jnp.asarray, (old_logprobs, sampler_logprobs, advantage))
    loss_mask, weight = jnp.asarray(loss_mask), jnp.asarray(weight)
    counted = loss_mask & (weight > 0)[:, None]
    count = jnp.maximum(trace_sums(counted.astype(jnp.float32), segments), 1.0)
    log_ratio = masked(logprobs - old_logprobs, counted)
    ratio = bounded_ratio(log_ratio, count, config, segments)
    clipped = jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
    advantage = advantage.reshape(len(weight), -1)
    tokens = jnp.maximum(-ratio * advantage, -clipped * advantage)
    mismatch = masked(old_logprobs - sampler_logprobs, counted)
    sums = {
        "tokens": jnp.sum(counted).astype(jnp.float32),
        "entropy": jnp.sum(masked(entropy, counted)),
        "ratio": jnp.sum(masked(ratio, counted)),
        "clip_fraction": jnp.sum(masked((-clipped * advantage > -ratio * advantage).astype(jnp.float32), counted)),
        "kl": jnp.sum(masked(divergence(log_ratio), counted)),  # from the policy before the update
        "sampler_trainer_mismatch": jnp.sum(jnp.abs(mismatch)),
    }
    if config.dual_clip is not None:
        bound = -config.dual_clip * advantage
        above = (advantage < 0) & (tokens > bound)
        tokens = jnp.where(above, bound, tokens)
        sums["dual_clip_fraction"] = jnp.sum(masked(above.astype(jnp.float32), counted))
    if config.importance_cap is not None:
        importance, above = capped_importance(mismatch, config, config.importance_cap, segments)
        tokens = tokens * importance
        sums["importance_capped"] = jnp.sum(masked(above.astype(jnp.float32), counted))
    if config.kl:
        if reference_logprobs is None:
            raise ValueError(f"kl {config.kl} needs the log-probabilities of the reference")
        from_reference = divergence(masked(reference_logprobs - logprobs, counted))
        tokens = tokens + config.kl * from_reference
        sums["kl_reference"] = jnp.sum(from_reference)
    if config.normalizer == "row":
        tokens = tokens / count
    rows = jnp.sum(masked(tokens, counted), axis=1)
    total = jnp.sum(masked(rows * weight, weight > 0))
    return LossSum(total, policy_denominator(counted, weight, config, segments), rows, jax.lax.stop_gradient(sums))
