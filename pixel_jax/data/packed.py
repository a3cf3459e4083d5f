"""Rows for tuning: traces grouped by length into a few static buckets, and several to a row where they fit.

All is decided before the first step, from the sizes of images and the words of the traces; pixels are read when a row's turn
comes.
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
from pixel_jax.data.shapes import PACKED, AutoShapes, cover
from pixel_jax.data.traces import WAVE, Row, TraceError, assemble, render, write_rows
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.prompts import Query
from pixel_jax.rollouts.shapes import BatchShape
from pixel_jax.rollouts.trajectory import Tables
from pixel_jax.training.batch import Batch, first_fit, from_trajectories, pack

WINDOW = 4096  # traces that first fit looks at together: its work is quadratic
BY_HAND = "config.trace_tokens, config.trace_frames and config.trace_patches (of videos config.video_frames and \
config.video_patches) say how much room there is; without them it is worked out"


class PackedRow(NamedTuple):
    """One packed row: its bucket, and the traces in it."""

    bucket: int
    traces: tuple[int, ...]


class PackedOrder(BucketOrder[PackedRow]):
    """The endless order of packed rows. Epoch e draws the order of traces, of packed rows and of batches from (seed, e)."""

    def __init__(self, sizes: Sequence[BatchShape], buckets: Sequence[BatchShape], size: int, seed: int):
        """`sizes`: what each trace takes; ValueError if one fits no bucket."""
        self.sizes, self.room = np.array(sizes), np.array(buckets)  # [traces, 7], [buckets, 7]
        fits = (self.sizes[:, None] <= self.room).all(axis=-1)
        if not fits.any(axis=1).all():
            trace = int(np.argmin(fits.any(axis=1)))
            raise ValueError(f"trace {trace} takes {sizes[trace]}; {no_room(buckets)}")
        self.bucket = fits.argmax(axis=1)
        super().__init__(self.packed, size, seed)

    def packed(self, epoch: int) -> list[list[PackedRow]]:
        """The packed rows of an epoch's traces, by bucket."""
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.sizes))
        found = []
        for bucket, room in enumerate(self.room):
            traces = order[self.bucket[order] == bucket]
            rows = []
            for start in range(0, len(traces), WINDOW):
                part = traces[start : start + WINDOW]
                bins = first_fit(self.sizes[part, :PACKED], room[:PACKED])
                rows += [PackedRow(bucket, tuple(int(part[i]) for i in row)) for row in bins]
            found.append([rows[i] for i in random.permutation(len(rows))])
        return found


def no_room(shapes: Sequence[BatchShape]) -> str:
    return f"there is room for {', or '.join(map(str, shapes))} ({BY_HAND})"


def no_memory(need: BatchShape, by: AutoShapes) -> str:
    return (
        f"to tune on it would take {by.row_bytes(need) / 2**30:.2f} GiB of a device that has {by.memory / 2**30:.2f} "
        "(config.rollout.max_pixels, crop_max_pixels, select_max_pixels and video_max_pixels say how large pictures are shown; "
        "with config.trace_tokens, trace_frames and trace_patches given the device itself decides)"
    )


class Packing:
    """The traces of a data set as rows: which there are (`order`), how one is read, how a batch is put together."""

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
        """Every trace is written out once. One that cannot be, or fits no shape, is an error that names its example, or
        is dropped and counted in `report`.

        shapes: those of the rows; or by what they are worked out, to hold all traces that the memory has room for.
        """
        self.config, self.size, self.seed = config, size, seed
        self.examples: list[Example] = []
        self.rows: list[Row] = []
        written = _written(examples, vocabulary, tables, config, report)
        refused = lambda _: no_room(self.buckets)
        if isinstance(shapes, AutoShapes):
            by, refused = shapes, lambda need: no_memory(need, by)
            needs = [row.shape for row in written if row is not None and by.row_bytes(row.shape) <= by.memory]
            shapes = cover(needs, by.cost, packed=True, least=size) if needs else ()
        self.buckets = tuple(shapes)
        for example, row in zip(examples, written, strict=True):
            if row is None:
                continue
            if not any(bucket.holds(row.shape) for bucket in self.buckets):
                why = f"{example.id} takes {row.shape}; {refused(row.shape)}"
                if not report.drop:
                    raise TraceError(why)
                report.dropped.append(why)
                continue
            row.ids, row.loss_mask = (
                np.array(row.ids, np.int32),
                np.array(row.loss_mask, bool),
            )  # a tenth of the lists' memory
            self.examples.append(example)
            self.rows.append(row)
        if not self.rows:
            raise TraceError(f"no trace is left. {report}")
        self.order = PackedOrder([row.shape for row in self.rows], self.buckets, size, seed)

    def load(self, place: PackedRow) -> tuple[BatchShape, Batch]:
        """The traces of a packed row with their pixels: its shape, and a batch of one row, its frames no more than it has."""
        rows = [self.rows[i] for i in place.traces]
        frames = [render(row, self.examples[i].query().images) for row, i in zip(rows, place.traces, strict=True)]
        tight = BatchShape(*np.max([row.shape for row in rows], axis=0).tolist())
        shape = self.buckets[place.bucket]
        alone = from_trajectories(assemble(rows, frames, self.config, tight))
        return shape, pack(alone, length=shape.tokens, slices=shape.slices)

    def collate(self, rows: Iterator[tuple[BatchShape, Batch]], count: int) -> Batch:
        """`count` packed rows of one shape as a batch of that shape."""
        shape, first = next(rows)

        def room(like: Batch) -> Batch:
            patches = like.visual.patches
            patches = jax.ShapeDtypeStruct((count, shape.images, shape.patches, patches.shape[-1]), patches.dtype)
            return like._replace(visual=like.visual._replace(patches=patches))

        return stack(itertools.chain([first], (batch for _, batch in rows)), count, room)

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

    def padding(self) -> dict[str, float]:
        """Shares of padding in an epoch: among the tokens, among the patches that the vision tower is given, and among the
        tokens if every trace had a row of the largest bucket to itself.
        """
        rows = [len(places) for places in self.order.packed(0)]
        room = lambda side: sum(count * side(bucket) for count, bucket in zip(rows, self.buckets, strict=True))
        tokens = self.order.sizes[:, 0]
        longest = max(bucket.tokens for bucket in self.buckets)
        return {
            "tokens": 1 - tokens.sum() / room(lambda bucket: bucket.tokens),
            "patches": 1 - sum(row.patches for row in self.rows) / room(lambda bucket: bucket.slices * bucket.patches),
            "tokens without packing": 1 - tokens.mean() / longest,
        }

    def __str__(self) -> str:
        rows = [len(x) for x in self.order.packed(0)]
        traces = np.bincount(self.order.bucket, minlength=len(rows))
        parts = [f"{a} traces in {b} rows of {c}" for a, b, c in zip(traces, rows, self.buckets, strict=True) if a]
        wasted = ", ".join(f"{share:.1%} of the {name}" for name, share in self.padding().items())
        return f"an epoch is {'; '.join(parts)}; padding is {wasted}"


def _written(
    examples: Sequence[Example], vocabulary: Vocabulary, tables: Tables, config: RolloutConfig, report: ReadReport
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
