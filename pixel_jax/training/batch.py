"""The batches of training steps: trajectories with an advantage and a weight for each row; and packing of rows."""

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
    """A batch of R rows: NumPy arrays on the host; in a step traced arrays with pixels, a `Batch[Visual]`."""

    tokens: AnyArray  # int32 [R, L]
    valid: AnyArray  # bool [R, L]
    loss_mask: AnyArray  # bool [R, L], the tokens that carry loss
    logprobs: AnyArray  # float32 [R, L], by the sampler
    old_logprobs: AnyArray  # float32 [R, L], the denominator of the policy ratio
    visual: Shown | None  # None: text only
    advantage: AnyArray  # float32 [R]; in packed rows [R, L], of each token's trace
    weight: AnyArray  # float32 [R]; 0 marks a row of padding
    # int32 [R, L], the number of each token's trace in its packed row; None: every row holds one trace.
    segments: AnyArray | None = None


def from_trajectories(
    trajectories: Trajectories[Shown], advantage: AnyArray | None = None, old_logprobs: AnyArray | None = None
) -> Batch[Shown]:
    """Makes the batch of `trajectories`. By default advantages are zero, and `old_logprobs` are the sampler's."""
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
    """R rows on the host without their pixels, which are computed from the images when the rows are trained on."""

    batch: Batch[VisualRecord]
    images: np.ndarray  # `Images` [R], of each row's prompt


def take(rows: T, which: int | slice | np.ndarray) -> T:
    """Selects rows of a `Batch` or of `Rows` by an index, indices or a slice."""
    return jax.tree.map(lambda x: x[which], rows)


def pad_rows(batch: Batch, rows: int) -> Batch:
    """Fills a host batch up to `rows` rows with copies of its first row of weight 0."""
    count = batch.tokens.shape[0]
    if not 0 < count <= rows:
        raise ValueError(f"cannot pad {count} rows to {rows}")
    index = np.arange(rows)
    padded = take(batch, np.where(index < count, index, 0))
    return padded._replace(weight=np.where(index < count, padded.weight, 0).astype(np.float32))


def first_fit(sizes: np.ndarray, capacity: np.ndarray) -> list[list[int]]:
    """Packs items of `sizes` [n, k] into bins of `capacity` [k]: the largest first, each into the first bin that it fits.

    Returns:
        The indices of the items in each bin.
    """
    bins: list[list[int]] = []
    free = np.zeros((len(sizes), len(capacity)), sizes.dtype)
    for item in np.argsort(-sizes[:, 0], kind="stable"):
        fits = np.flatnonzero((free[: len(bins)] >= sizes[item]).all(axis=1))
        if fits.size:
            index = int(fits[0])
            bins[index].append(int(item))
        else:
            index = len(bins)
            bins.append([int(item)])
            free[index] = capacity
        free[index] -= sizes[item]
    return bins


@dataclasses.dataclass(frozen=True)
class PackingConfig:
    """The static shape of packed rows. Their number is rounded up, so that few numbers of rows are compiled."""

    length: int  # tokens of a packed row
    slices: int  # temporal slices of a packed row (an image is one)
    rows: int = 8  # packed rows are filled up with empty ones to a multiple of this

    def __post_init__(self):
        positive(self, "length", "slices", "rows")


def pack_rows(batch: Batch, config: PackingConfig) -> Batch:
    """Packs rows to the shape that `config` declares, with rows of padding."""
    packed = pack(batch, length=config.length, slices=config.slices, frames=2 * config.slices)
    most = int(all_gather(len(packed.tokens)).max())  # the shape must be the same in all processes
    return pad_rows(packed, config.rows * -(-most // config.rows))


def pack(
    batch: Batch[Visual], *, length: int | None = None, slices: int | None = None, frames: int | None = None
) -> Batch:
    """Packs host rows into fewer rows.

    `segments` has the number of each token's trace in its packed row. Traces do not attend to each other, so that every token
    has the same log-probability as in an unpacked row.

    Args:
        batch: on the host, with its pixels.
        length: tokens of a packed row; None: those of the longest row, rounded up to a multiple of 8.
        slices: temporal slices of a packed row; None: the most that any row has.
        frames: frames of patches of a packed row; None: the most that any packed row uses.

    Raises:
        ValueError: a row does not fit, or has a weight other than 1 (rows of padding are left out before packing).
    """
    if np.any(batch.weight != 1):
        raise ValueError(
            f"rows of weight {batch.weight[batch.weight != 1][0]} cannot be packed: traces share a row's weight"
        )
    assert batch.visual is not None
    visual: Visual = jax.tree.map(np.asarray, batch.visual)
    shown = np.asarray(visual.slices[..., 0] >= 0)  # bool [R, S]
    items = np.asarray(visual.grids.any(axis=-1))  # bool [R, K], never more than slices
    sizes = np.stack([batch.valid.sum(axis=1), shown.sum(axis=1)], axis=1)
    capacity = np.array([length or 8 * -(-int(sizes[:, 0].max()) // 8), slices or sizes[:, 1].max()])
    if (sizes > capacity).any():
        row = int(np.argmax((sizes > capacity).any(axis=1)))
        raise ValueError(
            f"row {row} has {sizes[row, 0]} tokens and {sizes[row, 1]} slices, the capacity is {capacity[0]} and {capacity[1]}"
        )
    bins = first_fit(sizes, capacity)
    used = visual.slices.max(axis=(1, 2), initial=-1) + 1  # [R], frames that a row's slices use
    frames = frames or max(int(used[rows].sum()) for rows in bins)
    shape = (len(bins), int(capacity[0]))
    pixels = Visual(
        patches=np.zeros((len(bins), frames, *visual.patches.shape[2:]), np.uint8),
        slices=np.full((len(bins), capacity[1], 2), -1, np.int32),
        grids=np.zeros((len(bins), capacity[1], 3), np.int32),
        seconds=np.zeros((len(bins), capacity[1]), np.float32),
    )
    segments = np.zeros(shape, np.int32)
    packed = Batch(
        tokens=np.zeros(shape, np.int32),
        valid=np.zeros(shape, bool),
        loss_mask=np.zeros(shape, bool),
        logprobs=np.zeros(shape, np.float32),
        old_logprobs=np.zeros(shape, np.float32),
        visual=pixels,
        advantage=np.zeros(shape, np.float32),
        weight=np.ones(len(bins), np.float32),
        segments=segments,
    )
    for i, rows in enumerate(bins):
        position = frame = first_slice = item = 0
        for segment, row in enumerate(rows):
            valid = batch.valid[row]
            to = slice(position, position + int(valid.sum()))
            for name in ("tokens", "loss_mask", "logprobs", "old_logprobs"):
                getattr(packed, name)[i, to] = getattr(batch, name)[row, valid]
            packed.valid[i, to], segments[i, to], packed.advantage[i, to] = True, segment, batch.advantage[row]
            row_slices = visual.slices[row, shown[row]]
            pixels.slices[i, first_slice : first_slice + len(row_slices)] = row_slices + frame
            pixels.patches[i, frame : frame + used[row]] = visual.patches[row, : used[row]]
            grids = visual.grids[row, items[row]]
            pixels.grids[i, item : item + len(grids)] = grids
            pixels.seconds[i, item : item + len(grids)] = visual.seconds[row, items[row]]
            position, frame = to.stop, frame + used[row]
            first_slice, item = first_slice + len(row_slices), item + len(grids)
    return packed
