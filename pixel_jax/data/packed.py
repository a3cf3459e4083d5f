"""Rows for tuning: traces are grouped by size into a few static buckets, and several share a row where they fit.

Which traces a row has is decided before the first step, from the sizes of images and the lengths of texts. Pixels are read when
the row is needed.
"""

import collections
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from pixel_jax.data.batches import Batches, stack
from pixel_jax.data.buckets import BucketOrder
from pixel_jax.data.example import Example, ReadReport
from pixel_jax.data.shapes import PACKED, AutoShapes, cover, largest
from pixel_jax.data.traces import WAVE, TraceError, TraceRow, assemble, render, write_rows
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.models.inputs import Visual
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.prompts import Query
from pixel_jax.rollouts.shapes import BatchShape
from pixel_jax.rollouts.trajectory import Tables
from pixel_jax.training.batch import Batch, first_fit, from_trajectories, pack

WINDOW = 4096  # traces that first fit packs together: its time is quadratic
BY_HAND = "config.trace_tokens, config.trace_frames and config.trace_patches (of videos config.video_frames and \
config.video_patches) fix the shapes of rows; without them they are worked out"


class PackedRow(NamedTuple):
    """A packed row: its bucket, and the indices of its traces."""

    bucket: int
    traces: tuple[int, ...]


class RecordedOrder:
    """The packed rows that a run has read, in order: it ends where the run ended."""

    def __init__(self, rows: Sequence[PackedRow]):
        self.rows = rows

    def __getitem__(self, position: int) -> PackedRow:
        # Rows are read ahead also at the last step. No step uses these, so any row serves.
        return self.rows[min(int(position), len(self.rows) - 1)]


class PackedOrder(BucketOrder[PackedRow]):
    """The endless order of packed rows. Epoch e draws the orders of traces, of packed rows and of batches from (seed, e)."""

    def __init__(self, sizes: Sequence[BatchShape], buckets: Sequence[BatchShape], size: int, seed: int):
        """`sizes`: the shape that each trace needs. ValueError: one fits no bucket."""
        self.sizes, self.capacities = np.array(sizes), np.array(buckets)  # int [traces, 7], int [buckets, 7]
        fits = np.asarray((self.sizes[:, None] <= self.capacities).all(axis=-1))
        if not fits.any(axis=1).all():
            trace = int(np.argmin(fits.any(axis=1)))
            raise ValueError(f"trace {trace} takes {sizes[trace]}; {fits_no_shape(buckets)}")
        self.bucket = fits.argmax(axis=1)
        super().__init__(self.packed, size, seed)

    def packed(self, epoch: int) -> list[list[PackedRow]]:
        """The packed rows of an epoch's traces, by bucket."""
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.sizes))
        packed = []
        for bucket, capacity in enumerate(self.capacities):
            traces = order[self.bucket[order] == bucket]
            rows = []
            for start in range(0, len(traces), WINDOW):
                window = traces[start : start + WINDOW]
                bins = first_fit(self.sizes[window, :PACKED], capacity[:PACKED])
                rows += [PackedRow(bucket, tuple(int(window[i]) for i in row)) for row in bins]
            packed.append([rows[i] for i in random.permutation(len(rows))])
        return packed


def fits_no_shape(shapes: Sequence[BatchShape]) -> str:
    """Says that a trace fits none of the shapes, and what to do."""
    return f"there is room for {', or '.join(map(str, shapes))} ({BY_HAND})"


def fits_no_memory(need: BatchShape, auto: AutoShapes) -> str:
    """Says that a trace does not fit the memory, and what to do."""
    return (
        f"to tune on it would take {auto.row_bytes(need) / 2**30:.2f} GiB of a device that has {auto.memory / 2**30:.2f} "
        "(config.rollout.max_pixels, crop_max_pixels, select_max_pixels and video_max_pixels say how large pictures are shown; "
        "with config.trace_tokens, trace_frames and trace_patches given the device itself decides)"
    )


class Packing:
    """The traces of a data set as packed rows: their order, how a row is read, and how a batch is put together."""

    def __init__(
        self,
        examples: Sequence[Example],
        vocabulary: Vocabulary,
        tables: Tables,
        config: RolloutConfig,
        shapes: Sequence[BatchShape] | AutoShapes,
        *,
        size: int,
        seed: int,
        report: ReadReport,
    ):
        """Writes every trace out once, without its pixels.

        Args:
            examples: examples with turns.
            vocabulary: the vocabulary of the model.
            tables: the tables of the tokenizer and the tools.
            config: limits and pixel budgets of traces.
            shapes: the shapes of the rows; or how to work them out, so that they hold all traces that fit the memory.
            size: rows of a batch.
            seed: the seed of the order.
            report: notes the traces that are dropped: those that cannot be written, or fit no shape.

        Raises:
            TraceError: no trace is left; or, without `report.drop`, one would be dropped. The message names its example.
        """
        self.config, self.size, self.seed = config, size, seed
        self.examples: list[Example] = []
        self.rows: list[TraceRow] = []
        written = _written(examples, vocabulary, tables, config, report)
        auto = shapes if isinstance(shapes, AutoShapes) else None
        if isinstance(shapes, AutoShapes):
            needs = [row.shape for row in written if row is not None and shapes.row_bytes(row.shape) <= shapes.memory]
            shapes = cover(needs, shapes.cost, packed=True, least=size) if needs else ()
        self.buckets = tuple(shapes)
        for example, row in zip(examples, written, strict=True):
            if row is None:
                continue
            if not any(bucket.holds(row.shape) for bucket in self.buckets):
                remedy = fits_no_shape(self.buckets) if auto is None else fits_no_memory(row.shape, auto)
                why = f"{example.id} takes {row.shape}; {remedy}"
                if not report.drop:
                    raise TraceError(why)
                report.dropped.append(why)
                continue
            self.examples.append(example)
            self.rows.append(row)
        if not self.rows:
            raise TraceError(f"no trace is left. {report}")
        self.order = PackedOrder([row.shape for row in self.rows], self.buckets, size, seed)

    def load(self, packed: PackedRow) -> tuple[BatchShape, Batch[Visual]]:
        """Reads the pixels of a packed row: its shape, and a batch of one row with as many frames as its traces have."""
        rows = [self.rows[i] for i in packed.traces]
        frames = [render(row, self.examples[i].query().images) for row, i in zip(rows, packed.traces, strict=True)]
        shape = self.buckets[packed.bucket]
        alone = from_trajectories(assemble(rows, frames, self.config, largest([row.shape for row in rows])))
        return shape, pack(alone, length=shape.tokens, slices=shape.slices)

    def collate(self, rows: Iterator[tuple[BatchShape, Batch[Visual]]], count: int) -> Batch[Visual]:
        """Puts `count` packed rows of one shape together, as a batch of that shape."""
        shape, first = next(rows)

        def enlarge(like: Batch[Visual]) -> Batch[Visual]:
            assert like.visual is not None
            patches = like.visual.patches
            patches = jax.ShapeDtypeStruct((count, shape.images, shape.patches, patches.shape[-1]), patches.dtype)
            return like._replace(visual=like.visual._replace(patches=patches))

        return stack(itertools.chain([first], (batch for _, batch in rows)), count, enlarge)

    def batches(
        self, process_index: int, process_count: int, *, order: Sequence[PackedRow] | None = None, **reading: int
    ) -> Batches:
        """The endless batches of this process.

        Args:
            process_index: the index of this process.
            process_count: number of processes.
            order: the packed rows as a run has recorded them; None: drawn from the seed.
            reading: `threads` and `ahead` of `Batches`.
        """
        return Batches(
            self.order if order is None else RecordedOrder(order),
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
        """The number of batches in an epoch."""
        return sum(map(len, self.order.packed(0))) / self.size

    def padding(self) -> dict[str, float]:
        """Computes the shares of padding in an epoch.

        They are those of the tokens, of the patches that the vision tower encodes and, for comparison, of the tokens if every
        trace had a row of the largest bucket to itself.
        """
        rows = [len(bucket) for bucket in self.order.packed(0)]
        all_tokens = sum(count * bucket.tokens for count, bucket in zip(rows, self.buckets, strict=True))
        all_patches = sum(count * x.slices * x.patches for count, x in zip(rows, self.buckets, strict=True))
        tokens = self.order.sizes[:, 0]
        longest = max(bucket.tokens for bucket in self.buckets)
        shares = {"tokens": 1 - tokens.sum() / all_tokens}
        if all_patches:
            shares["patches"] = 1 - sum(row.patches for row in self.rows) / all_patches
        return shares | {"tokens without packing": 1 - tokens.mean() / longest}

    def __str__(self) -> str:
        rows = [len(x) for x in self.order.packed(0)]
        traces = np.bincount(self.order.bucket, minlength=len(rows))
        counts = [f"{a} traces in {b} rows of {c}" for a, b, c in zip(traces, rows, self.buckets, strict=True) if a]
        wasted = ", ".join(f"{share:.1%} of the {name}" for name, share in self.padding().items())
        return f"an epoch is {'; '.join(counts)}; padding is {wasted}"


def _written(
    examples: Sequence[Example], vocabulary: Vocabulary, tables: Tables, config: RolloutConfig, report: ReadReport
) -> list[TraceRow | None]:
    """Writes the row of every example, without pixels; None where it is dropped."""

    def write(indices: list[int], outlines: Sequence[Query]) -> None:
        try:
            traces = [examples[i].trace(outline) for i, outline in zip(indices, outlines, strict=True)]
            written = write_rows(traces, vocabulary, tables, config)
        except ValueError as error:  # a TraceError, a PromptError, sides that no size fits
            if len(indices) > 1:  # the error is about one of several traces, which is found by bisection
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

    rows: list[TraceRow | None] = [None] * len(examples)
    # Examples with equally many images are written together: their number is part of a compiled shape.
    alike = collections.defaultdict(list)
    with ThreadPoolExecutor() as pool:
        outlines = list(pool.map(lambda example: example.outline(), examples))
    for i, (example, outline) in enumerate(zip(examples, outlines, strict=True)):
        alike[example.video, len(outline.images)].append(i)
    for indices in alike.values():
        for start in range(0, len(indices), WAVE):
            wave = indices[start : start + WAVE]
            write(wave, [outlines[i] for i in wave])
    return rows
