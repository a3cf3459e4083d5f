"""The curiosity reward (Pixel Reasoner §4.2) and the small choices around it."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.training.scorers import ScorerConfig

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """The paper's constants. Each switch names the released code's behaviour as its second value."""

    alpha: float = 0.5  # weight of curiosity
    beta: float = 0.05  # price of an operation beyond the budget
    threshold: float = 0.3  # H, the rate of pixel-space reasoning below which curiosity pays
    budget: int = 1  # N, operations that cost nothing
    form: Literal["paper", "released"] = "paper"  # of the sum: the paper's equation, or the released code's
    scorer: ScorerConfig = ScorerConfig()  # what makes an answer right
    unparsable: Literal[0, -1] = 0  # reward of a response without any answer
    count: Literal["executed", "requested"] = (
        "executed"  # operations that returned pixels, or every call, failed or not
    )
    zero_after_failure: bool = False  # no credit for an answer that directly follows a failed operation
    # DAPO's soft overlong punishment: nothing up to `length_limit - length_buffer` tokens that the policy chose, -1 from
    # `length_limit` on, a straight line between. 0: off.
    length_limit: int = 0
    length_buffer: int = 0  # tokens before `length_limit` from which on length costs

    def __post_init__(self):
        if not 0 <= self.length_buffer <= self.length_limit:
            raise ValueError(f"length_buffer {self.length_buffer} must lie in [0, length_limit = {self.length_limit}]")


class RewardParts(NamedTuple):
    """What a shaped reward is made of, each [groups, n]; `total` is what the policy is trained on."""

    correct: Array
    curiosity: Array
    penalty: Array  # of operations beyond the budget
    length: Array  # of overlong responses

    @property
    def total(self) -> Array:
        return (self.correct + self.curiosity + self.penalty + self.length).astype(np.float32)


def curiosity_reward(
    correct: Array,
    num_ops: Array,
    *,
    alpha: float = 0.5,
    beta: float = 0.05,
    threshold: float = 0.3,
    budget: int = 1,
    form: Literal["paper", "released"] = "paper",
    is_video: Array | None = None,
) -> Array:
    """The shaped reward of each rollout, float32 [groups, n], from its correctness and its number of visual operations.

        r' = r + alpha max(H - RaPR, 0) 1[n_vo > 0] + beta min(N - n_vo, 0)        RaPR: share of the group with n_vo > 0

    so among 8 rollouts a single one that looks closer gains .5 (.3 - 1/8) = .0875, and each operation beyond the first
    costs .05. The `released` code instead pays max(H - RaPR, 0) / RaPR x .25 / (1.5 for a video, 2 for an image), with
    alpha / 2 in the place of .25 here, so that the default is the same; it needs `is_video` bool [groups].
    Pure, for NumPy and (traced) JAX arrays.
    """
    correct, bonus, penalty = _curiosity(correct, num_ops, alpha, beta, threshold, budget, form, is_video)
    return (correct + bonus + penalty).astype(np.float32)


def _curiosity(correct, num_ops, alpha, beta, threshold, budget, form, is_video) -> tuple[Array, Array, Array]:
    """The three summands of `curiosity_reward`."""
    xp = jnp if any(isinstance(x, jax.Array) for x in (correct, num_ops, is_video)) else np
    correct, num_ops = xp.asarray(correct, xp.float32), xp.asarray(num_ops)
    if correct.ndim != 2 or correct.shape != num_ops.shape:
        raise ValueError(f"correct {correct.shape} and num_ops {num_ops.shape} must both be [groups, n]")
    looked = num_ops > 0
    rapr = xp.mean(looked.astype(xp.float32), axis=1, keepdims=True)
    bonus = xp.maximum(threshold - rapr, 0.0)
    if form == "paper":
        bonus = alpha * bonus
    elif form == "released":
        if is_video is None:
            raise ValueError("the released form of the reward needs is_video [groups]")
        divisor = xp.where(xp.asarray(is_video), 1.5, 2.0)[:, None]
        bonus = alpha / 2 * bonus / divisor / xp.maximum(rapr, 1e-6)
    else:
        raise ValueError(f"form must be 'paper' or 'released', not {form!r}")
    penalty = beta * xp.minimum(budget - num_ops, 0)
    return correct, xp.where(looked, bonus, 0.0), penalty


def overlong(lengths: Array, *, limit: int, buffer: int) -> Array:
    """The soft punishment of responses of `lengths` tokens, in [-1, 0], float32 (DAPO, arXiv:2503.14476, eq. 13)."""
    beyond = np.asarray(lengths, np.float32) - (limit - buffer)
    line = -beyond / max(buffer, 1)
    return np.where(beyond <= 0, 0.0, np.where(beyond > buffer, -1.0, line)).astype(np.float32)


def shape(
    correct: Array, num_ops: Array, failed_last: Array, is_video: Array, lengths: Array, config: RewardConfig
) -> RewardParts:
    """`curiosity_reward` in its parts, with everything `config` decides.

    `correct`, `num_ops` (already counted as `config.count` says), `failed_last` (the last operation before the answer
    returned an error) and `lengths` (tokens that the policy chose) are [groups, n], `is_video` [groups].
    """
    if config.zero_after_failure:
        correct = np.where((np.asarray(correct) > 0.5) & np.asarray(failed_last), 0.0, correct)
    parts = _curiosity(
        correct, num_ops, config.alpha, config.beta, config.threshold, config.budget, config.form, is_video
    )
    if config.length_limit:
        length = overlong(lengths, limit=config.length_limit, buffer=config.length_buffer)
    else:
        length = np.zeros(np.shape(correct), np.float32)
    return RewardParts(*parts, length)
