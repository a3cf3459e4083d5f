"""The batches that training steps read: trajectories with an advantage and a weight for each row, packed or not."""

import dataclasses
from typing import Generic, NamedTuple, TypeVar

import jax
import numpy as np

from pixel_jax.arrays import AnyArray
from pixel_jax.config import positive
from pixel_jax.models.inputs import Visual
from pixel_jax.parallel.processes import all_gather
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


def first_fit(sizes: np.ndarray, room: np.ndarray) -> list[list[int]]:
    """Bins of at most `room` [k] for items of `sizes` [n, k]: the largest first, each into the first bin that has room."""
    bins: list[list[int]] = []
    free = np.zeros((len(sizes), len(room)), sizes.dtype)
    for item in np.argsort(-sizes[:, 0], kind="stable"):
        fits = np.flatnonzero((free[: len(bins)] >= sizes[item]).all(axis=1))
        if fits.size:
            place = int(fits[0])
            bins[place].append(int(item))
        else:
            place = len(bins)
            bins.append([int(item)])
            free[place] = room
        free[place] -= sizes[item]
    return bins


@dataclasses.dataclass(frozen=True)
class PackingConfig:
    """Packed rows of one static shape; how many there are is rounded up, so that few numbers of rows are ever compiled."""

    length: int  # tokens of a packed row
    slices: int  # temporal slices of a packed row (an image is one)
    rows: int = 8  # packed rows are filled up with empty ones to a multiple of this

    def __post_init__(self):
        positive(self, "length", "slices", "rows")


def pack_rows(batch: Batch, config: PackingConfig) -> Batch:
    """`pack` to the shape that `config` declares."""
    packed = pack(batch, length=config.length, slices=config.slices, frames=2 * config.slices)
    most = int(all_gather(len(packed.tokens)).max())  # processes with different rows share one program
    return pad_rows(packed, config.rows * -(-most // config.rows))


def pack(batch: Batch, *, length: int | None = None, slices: int | None = None, frames: int | None = None) -> Batch:
    """Host rows packed into rows of `length` tokens, `slices` temporal slices and room for `frames` frames of patches.

    None stands for the most that a row has (frames: that a packed row has), tokens rounded up to a multiple of 8.

    A packed row's tokens carry the number of their trace in `segments`, and traces do not see each other, so every token
    has the log-probability that it has alone. ValueError: a row that does not fit, or that has a weight (rows of padding
    are left out before packing, not after).
    """
    if np.any(batch.weight != 1):
        raise ValueError(
            f"rows of weight {batch.weight[batch.weight != 1][0]} cannot be packed: traces share a row's weight"
        )
    visual = batch.visual
    shown = visual.slices[..., 0] >= 0  # [R, S]
    items = visual.grids.any(axis=-1)  # [R, K], never more than slices
    sizes = np.stack([batch.valid.sum(axis=1), shown.sum(axis=1)], axis=1)
    room = np.array([length or 8 * -(-int(sizes[:, 0].max()) // 8), slices or sizes[:, 1].max()])
    if (sizes > room).any():
        row = int(np.argmax((sizes > room).any(axis=1)))
        raise ValueError(
            f"row {row} has {sizes[row, 0]} tokens and {sizes[row, 1]} slices, room is {room[0]} and {room[1]}"
        )
    bins = first_fit(sizes, room)
    used = visual.slices.max(axis=(1, 2)) + 1  # [R], frames that a row's slices use
    frames = frames or max(int(used[rows].sum()) for rows in bins)
    shape = (len(bins), int(room[0]))
    packed = Batch(
        tokens=np.zeros(shape, np.int32),
        valid=np.zeros(shape, bool),
        loss_mask=np.zeros(shape, bool),
        logprobs=np.zeros(shape, np.float32),
        old_logprobs=np.zeros(shape, np.float32),
        visual=Visual(
            patches=np.zeros((len(bins), frames, *visual.patches.shape[2:]), np.uint8),
            slices=np.full((len(bins), room[1], 2), -1, np.int32),
            grids=np.zeros((len(bins), room[1], 3), np.int32),
            seconds=np.zeros((len(bins), room[1]), np.float32),
        ),
        advantage=np.zeros(shape, np.float32),
        weight=np.ones(len(bins), np.float32),
        segments=np.zeros(shape, np.int32),
    )
    for i, rows in enumerate(bins):
        at = frame = place = item = 0
        for segment, row in enumerate(rows):
            kept = batch.valid[row]
            to = slice(at, at + int(kept.sum()))
            for name in ("tokens", "loss_mask", "logprobs", "old_logprobs"):
                getattr(packed, name)[i, to] = getattr(batch, name)[row, kept]
            packed.valid[i, to], packed.segments[i, to], packed.advantage[i, to] = True, segment, batch.advantage[row]
            own = visual.slices[row, shown[row]]
            packed.visual.slices[i, place : place + len(own)] = own + frame
            packed.visual.patches[i, frame : frame + used[row]] = visual.patches[row, : used[row]]
            grids = visual.grids[row, items[row]]
            packed.visual.grids[i, item : item + len(grids)] = grids
            packed.visual.seconds[i, item : item + len(grids)] = visual.seconds[row, items[row]]
            at, frame, place, item = to.stop, frame + used[row], place + len(own), item + len(grids)
    return packed
