"""What a training step reads: trajectories without their bookkeeping, plus one advantage and one weight a row."""

from typing import Generic, NamedTuple, TypeVar

import jax
import numpy as np

from pixel_jax.arrays import AnyArray
from pixel_jax.rollouts.materialize import VisualRecord
from pixel_jax.rollouts.trajectory import Shown, Trajectories

T = TypeVar("T")


class Batch(NamedTuple, Generic[Shown]):
    """R rows; on the host NumPy, in a step traced, and then a `Batch[Visual]`."""

    tokens: AnyArray  # int32 [R, L]
    valid: AnyArray  # bool [R, L]
    loss_mask: AnyArray  # bool [R, L], the tokens that carry loss
    logprobs: AnyArray  # float32 [R, L], the sampler's
    old_logprobs: AnyArray  # float32 [R, L], the denominator of the policy ratio
    visual: Shown | None  # None: text only
    advantage: AnyArray  # float32 [R]; in packed rows [R, L], of each token's trace
    weight: AnyArray  # float32 [R]; 0 marks a row of padding
    segments: AnyArray | None = None  # int32 [R, L], which of a packed row's traces a token belongs to; None: one a row


def from_trajectories(
    trajectories: Trajectories[Shown], advantage: AnyArray | None = None, old_logprobs: AnyArray | None = None
) -> Batch[Shown]:
    """The training view of `trajectories`; without `advantage` zeros, without `old_logprobs` the sampler's own."""
    rows = trajectories.tokens.shape[0]
    return Batch(
        tokens=trajectories.tokens,
        valid=trajectories.valid,
        loss_mask=trajectories.loss_mask,
        logprobs=trajectories.logprobs,
        old_logprobs=trajectories.logprobs if old_logprobs is None else old_logprobs,
        visual=trajectories.visual,
        advantage=np.zeros(rows, np.float32) if advantage is None else advantage,
        weight=np.ones(rows, np.float32),
    )


class Rows(NamedTuple):
    """R rows on the host that can be trained on, without their pixels: they are cut from the images when they are."""

    batch: Batch[VisualRecord]
    images: np.ndarray  # `Images` [R], those of each row's prompt


def take(rows: T, which) -> T:
    """The rows `which` (indices or a slice) of a `Batch` or of `Rows`."""
    return jax.tree.map(lambda x: x[which], rows)


def pad_rows(batch: Batch, rows: int) -> Batch:
    """A host batch of at most `rows` rows, filled up with copies of its first row that weigh nothing."""
    have = batch.tokens.shape[0]
    if not 0 < have <= rows:
        raise ValueError(f"cannot pad {have} rows to {rows}")
    index = np.arange(rows)
    padded = take(batch, np.where(index < have, index, 0))
    return padded._replace(weight=np.where(index < have, padded.weight, 0).astype(np.float32))
