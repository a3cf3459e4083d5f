"""Rows for tuning: traces grouped by length into a few static buckets, and several to a row where they fit.

All is decided before the first step, from the sizes of images and the words of the traces; pixels are read when a row's turn
comes.
"""

import collections
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from pixel_jax.data.batches import Batches, stack
from pixel_jax.data.buckets import BucketOrder
from pixel_jax.data.example import Example, Report
from pixel_jax.data.traces import WAVE, Row, Shape, TraceError, assemble, render, write_rows
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.rollout.config import RolloutConfig
from pixel_jax.rollout.prompts import Query
from pixel_jax.rollout.trajectory import Tables
from pixel_jax.training.batch import Batch, from_trajectories
from pixel_jax.training.packing import first_fit, pack

WINDOW = 4096  # traces that first fit looks at together: its work is quadratic
PATCHES_PER_TOKEN = 8  # at most: four, and a video's token covers two frames


def bucket_shapes(lengths: Sequence[int], largest: Shape) -> tuple[Shape, ...]:
    """A room for every length, shortest first, the last being `largest`; ValueError unless they rise towards it.

    A frame takes tokens in proportion to its patches, so short rows need no room for large ones.
    """
    rising = (*lengths, largest.length)
    if list(rising) != sorted(set(rising)) or rising[0] < 1:
        raise ValueError(f"buckets {tuple(lengths)} must rise and stay under the room of a trace, {largest.length}")
    return tuple(
        largest._replace(length=length, patches=min(largest.patches, PATCHES_PER_TOKEN * length)) for length in rising
    )


class Place(NamedTuple):
    """One packed row: its bucket, and the traces in it."""

    bucket: int
    traces: tuple[int, ...]


class PackedOrder(BucketOrder[Place]):
    """The endless order of packed rows. Epoch e draws the order of traces, of packed rows and of batches from (seed, e)."""

    def __init__(self, sizes: Sequence[Shape], buckets: Sequence[Shape], size: int, seed: int):
        """`sizes`: what each trace takes; ValueError if one fits no bucket."""
        self.sizes, self.room = np.array(sizes), np.array(buckets)  # [traces, 4], [buckets, 4]
        fits = (self.sizes[:, None] <= self.room).all(axis=-1)
        if not fits.any(axis=1).all():
            trace = int(np.argmin(fits.any(axis=1)))
            raise ValueError(
                f"trace {trace} takes {Shape(*sizes[trace])}, the buckets have {', '.join(map(str, buckets))}"
            )
        self.bucket = fits.argmax(axis=1)
        super().__init__(self.packed, size, seed)

    def packed(self, epoch: int) -> list[list[Place]]:
        """The packed rows of an epoch's traces, by bucket."""
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.sizes))
        found = []
        for bucket, room in enumerate(self.room):
            traces = order[self.bucket[order] == bucket]
            rows = []
            for start in range(0, len(traces), WINDOW):
                part = traces[start : start + WINDOW]
                bins = first_fit(self.sizes[part, :3], room[:3])  # tokens, frames and slices add up; patches do not
                rows += [Place(bucket, tuple(int(part[i]) for i in row)) for row in bins]
            found.append([rows[i] for i in random.permutation(len(rows))])
        return found


class Packing:
    """The traces of a data set as rows: which there are (`order`), how one is read, how a batch is put together."""

    def __init__(
        self,
        examples: Sequence[Example],
        vocabulary: Vocabulary,
        tables: Tables,
        config: RolloutConfig,
        buckets: Sequence[Shape],
        *,
        size: int,
        seed: int,
        report: Report,
    ):
        """Every trace is written out once. One that cannot be, or fits no bucket, is an error that names its example, or
        is dropped and counted in `report`."""
        self.config, self.buckets, self.size, self.seed = config, tuple(buckets), size, seed
        self.examples: list[Example] = []
        self.rows: list[Row] = []
        for example, row in zip(examples, _written(examples, vocabulary, tables, config, report), strict=True):
            if row is None:
                continue
            if not any((np.array(row.shape) <= bucket).all() for bucket in self.buckets):
                why = f"{example.id} takes {row.shape}, the buckets have {', '.join(map(str, self.buckets))}"
                if not report.drop:
                    raise TraceError(why)
                report.dropped.append(why)
                continue
            row.ids, row.chosen = (
                np.array(row.ids, np.int32),
                np.array(row.chosen, bool),
            )  # a tenth of the lists' memory
            self.examples.append(example)
            self.rows.append(row)
        if not self.rows:
            raise TraceError(f"no trace is left. {report}")
        self.order = PackedOrder([row.shape for row in self.rows], self.buckets, size, seed)

    def load(self, place: Place) -> Batch:
        """The traces of a packed row with their pixels: a batch of one row, its frames no more than it has."""
        rows = [self.rows[i] for i in place.traces]
        frames = [render(row, self.examples[i].query().images) for row, i in zip(rows, place.traces, strict=True)]
        tight = Shape(*np.max([row.shape for row in rows], axis=0).tolist())
        room = self.buckets[place.bucket]
        alone = from_trajectories(assemble(rows, frames, self.config, tight))
        return pack(alone, length=room.length, slices=room.slices)

    def collate(self, rows: Iterator[Batch], count: int) -> Batch:
        """`count` packed rows of one bucket as a batch of that bucket's shape."""

        def room(like: Batch) -> Batch:
            shape = next(
                shape
                for shape in self.buckets
                if (shape.length, shape.slices) == (like.tokens.shape[1], like.visual.slices.shape[1])
            )
            patches = like.visual.patches
            patches = jax.ShapeDtypeStruct((count, shape.frames, shape.patches, patches.shape[-1]), patches.dtype)
            return like._replace(visual=like.visual._replace(patches=patches))

        return stack(rows, count, room)

    def batches(self, process_index: int, process_count: int, **reading: int) -> Batches:
        """The endless batches; `reading`: `threads` and `ahead` of `Batches`."""
        return Batches(
            self.order,
            self.load,
            self.collate,
            self.size,
            same={"seed": self.seed},
            process_index=process_index,
            process_count=process_count,
            **reading,
        )

    @property
    def epoch(self) -> float:
        """Batches that the rows of an epoch make."""
        return sum(map(len, self.order.packed(0))) / self.size

    def padding(self) -> tuple[float, float]:
        """Shares of padding among the tokens of an epoch: packed, and with every trace in a row of the largest bucket."""
        tokens = self.order.sizes[:, 0]
        packed = sum(len(rows) * room.length for rows, room in zip(self.order.packed(0), self.buckets, strict=True))
        return 1 - tokens.sum() / packed, 1 - tokens.mean() / self.buckets[-1].length

    def __str__(self) -> str:
        rows = [len(x) for x in self.order.packed(0)]
        traces = np.bincount(self.order.bucket, minlength=len(rows))
        parts = [
            f"{a} traces in {b} rows of {c.length}" for a, b, c in zip(traces, rows, self.buckets, strict=True) if a
        ]
        packed, alone = self.padding()
        return f"an epoch is {', '.join(parts)} tokens: {packed:.1%} padding, {alone:.1%} without packing"


def _written(
    examples: Sequence[Example], vocabulary: Vocabulary, tables: Tables, config: RolloutConfig, report: Report
) -> list[Row | None]:
    """Every example's row, without pixels; None: it is dropped."""

    def write(indices: list[int], outlines: Sequence[Query]) -> None:
        try:
            traces = [examples[i].trace(outline) for i, outline in zip(indices, outlines, strict=True)]
            written = write_rows(traces, vocabulary, tables, config)
        except ValueError as error:  # a TraceError, a PromptError, sides that no size fits
            if len(indices) > 1:  # one of them
                half = len(indices) // 2
                write(indices[:half], outlines[:half])
                write(indices[half:], outlines[half:])
                return
            why = f"{examples[indices[0]].id}: {error}"
            if not report.drop:
                raise TraceError(why) from error
            report.dropped.append(why)
            return
        for i, row in zip(indices, written, strict=True):
            rows[i] = row

    rows: list[Row | None] = [None] * len(examples)
    # Together go examples with as many images: how many there are is part of a compiled shape.
    alike = collections.defaultdict(list)
    with ThreadPoolExecutor() as pool:
        outlines = list(pool.map(lambda example: example.outline(), examples))
    for i, (example, outline) in enumerate(zip(examples, outlines, strict=True)):
        alike[example.video, len(outline.images)].append(i)
    for indices in alike.values():
        for start in range(0, len(indices), WAVE):
            part = indices[start : start + WAVE]
            write(part, [outlines[i] for i in part])
    return rows
