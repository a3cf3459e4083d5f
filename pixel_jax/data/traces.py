"""Makes rows to train on from written traces: the same `Trajectories` that a rollout returns.

A trace is a question and the assistant's turns as text. Its calls are read, carried out and answered by the functions of
the rollout (automaton, `execute`, observation assembler), so a trained row is what the model would have read had it
written those turns itself. Only the pixels are resized on the host, to the same bits.
"""

import array
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.models.inputs import Visual
from pixel_jax.rollouts import decode_loop
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.drawings import row_images
from pixel_jax.rollouts.images import Images
from pixel_jax.rollouts.operations import add_to_history, execute, record_calls
from pixel_jax.rollouts.prompts import Query, check_format, prompt_tokens
from pixel_jax.rollouts.shapes import BatchShape, RolloutShape
from pixel_jax.rollouts.trajectory import (
    NO_IMAGE,
    STOP_ANSWER,
    Calls,
    Tables,
    Trajectories,
    no_calls,
    shown_by,
)
from pixel_jax.rollouts.views import frame_patches
from pixel_jax.tools import Tool
from pixel_jax.tools.device import ImageHistory, Seen
from pixel_jax.tools.tool import Coordinates

WAVE = 256  # traces answered by one call of the device, so that one compilation serves all of them


class Turn(NamedTuple):
    """A turn of the assistant: pieces of text, each learned or only read."""

    parts: tuple[tuple[str, bool], ...]
    ends: bool = True  # `<|im_end|>` follows, learned if the last piece is; else the row stops within the turn
    executed: str | None = None  # the call that is carried out, if it is not the one that is written


class Trace(NamedTuple):
    """A question and the turns of the assistant."""

    query: Query
    turns: tuple[Turn, ...]
    answer: str  # the reference, for scoring


class TraceError(ValueError):
    """A trace that does not fit its row or does not read as it was meant to."""


def wrong(text: str) -> Turn:
    """A turn that shows a mistake: the model reads it and does not learn it."""
    return Turn(((text, False),))


def right(text: str) -> Turn:
    """A turn that the model learns."""
    return Turn(((text, True),))


class View(NamedTuple):
    """A frame that a row shows: a region of one of the query's images, or of a picture that a tool made, at a size (`Views`)."""

    image: int
    region: tuple[int, ...]  # x1 y1 x2 y2
    size: tuple[int, int]  # (height, width)
    patch_size: int  # pixels along a side of a patch

    @property
    def grid(self) -> tuple[int, int]:
        """Its height and width in patches."""
        return self.size[0] // self.patch_size, self.size[1] // self.patch_size

    @property
    def patches(self) -> int:
        """The number of patches of the frame."""
        return self.grid[0] * self.grid[1]


class TraceRow:
    """A row that is being written. Only the sizes of the trace's images are read: `render` cuts the pixels out."""

    def __init__(
        self, trace: Trace, index: int, vocabulary: Vocabulary, config: RolloutConfig, tools: tuple[Tool, ...]
    ):
        self.trace, self.index, self.tools, self.config = trace, index, tools, config
        query = trace.query
        # Compact: the rows of a whole data set are kept.
        self.ids = array.array("i", prompt_tokens(query, vocabulary, config, tools=tools))
        self.loss_mask = bytearray(len(self.ids))  # 1: the token is learned
        self.views: list[View] = []
        self.slices: list[tuple[int, int]] = []
        self.grids: list[tuple[int, int, int]] = []
        self.calls: list[Calls] = []  # each of one call
        limits = config.sizes("video" if query.is_video else "")
        sizes = [limits.of(*image.shape[:2]) for image in query.images]
        whole = [
            View(i, (0, 0, image.shape[1], image.shape[0]), size, config.patch_size)
            for i, (image, size) in enumerate(zip(query.images, sizes, strict=True))
        ]
        if query.is_video:
            last = len(query.images) - 1
            self.slices = [(i, min(i + 1, last)) for i in range(0, len(query.images), 2)]
            self.grids = [(len(self.slices), *whole[0].grid)]
            if config.split_videos:
                self.grids = [(1, *whole[0].grid)] * len(self.slices)
            self.views = whole
        else:
            for view in whole:
                self.show(view)

    def show(self, view: View) -> None:
        """Appends a still image."""
        self.slices.append((len(self.views), len(self.views)))
        self.grids.append((1, *view.grid))
        self.views.append(view)

    def write(self, turn: Turn, vocabulary: Vocabulary) -> list[int]:
        """Appends a turn; returns the ids of the turn that is carried out."""
        ids, loss_mask = [], []
        layout = vocabulary.layout
        parts = [[text, learned] for text, learned in turn.parts]
        if parts and layout.lead and not parts[0][0].startswith(layout.lead):
            parts[0][0] = layout.lead + parts[0][0]
        if parts and turn.ends and layout.tail and not parts[-1][0].endswith(layout.tail):
            parts[-1][0] += layout.tail
        for text, learned in parts:
            piece = vocabulary.encode(text)
            ids += piece
            loss_mask += [learned] * len(piece)
        if turn.ends:
            ids.append(vocabulary.im_end)
            loss_mask.append(loss_mask[-1])
        self.ids.extend(ids)
        self.loss_mask.extend(loss_mask)
        return ids if turn.executed is None else vocabulary.encode(turn.executed)

    @property
    def shape(self) -> BatchShape:
        """The shape that the row needs."""
        return BatchShape(
            len(self.ids), len(self.views), len(self.slices), max((view.patches for view in self.views), default=0)
        )

    @property
    def patches(self) -> int:
        """The patches of all slices, which the vision tower has to encode."""
        return sum(self.views[first].patches for first, _ in self.slices)


def render(row: TraceRow, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Cuts the row's frames out of `images`: those that it was written for, or others of the same sizes.

    Args:
        row: a row that has been written out.
        images: uint8 [h, w, 3] each.

    Returns:
        The patches of each frame, uint8 [P, 3 p p].
    """
    have = [image.shape for image in images]
    planned = [image.shape for image in row.trace.query.images]
    if have != planned:
        raise TraceError(f"a trace about {row.trace.query.question!r} has images {have}, it was planned for {planned}")
    buffers = row_images(Images(tuple(images)), row.calls, row.tools)
    return [frame_patches(buffers[view.image], view.region, view.size, row.config) for view in row.views]


@functools.partial(jax.jit, static_argnames=("config", "shape"))
def _respond(tables: Tables, turns, seen: Seen, number, config: RolloutConfig, shape: RolloutShape):
    """Computes the answers of the rollout to `turns`, int32 [WAVE, T] (-1: no token).

    `number` int32 [WAVE] counts the calls of each row so far.

    Returns:
        Whether the turn has a call, the call, what it shows, the ids and the length of the observation, and the image history
        after it.
    """
    state, _ = jax.lax.scan(
        lambda state, tokens: (tables.parser.step(tables.bytes, state, tokens), None), tables.parser.init(WAVE), turns.T
    )
    call = tables.parser.finish(state)
    result = execute(call, seen, tables, shape.views, config)
    length = decode_loop.observation_width(tables.observations, config, shape)
    ids, lengths = tables.observations.assemble(result.message, length)
    calls = record_calls(call, result, call.required, tables.tools)
    return call.required, calls, shown_by(calls, number), ids, lengths, add_to_history(seen.history, calls, number)


def _answer_calls(
    rows: list[TraceRow], turns: list[list[int]], histories, tables: Tables, config: RolloutConfig
) -> list:
    """Appends to every row of a wave the observation of the call it just wrote; returns the image histories after it."""
    most = max([1, *(len(row.trace.query.images) for row in rows)])
    videos = any(row.trace.query.is_video for row in rows)
    width = 1 << max(4, (max(map(len, turns)) - 1).bit_length())  # few widths: each is a compilation
    padded = np.full((WAVE, width), -1, np.int32)
    image_sizes = np.ones((WAVE, most, 2), np.int32)
    for i, (row, turn) in enumerate(zip(rows, turns, strict=True)):
        padded[i, : len(turn)] = turn
        for j, image in enumerate(row.trace.query.images):
            image_sizes[i, j] = image.shape[:2]

    def fill(values: list[int], dtype: type) -> np.ndarray:
        return np.resize(np.array(values, dtype), WAVE)

    history = jax.tree.map(lambda *xs: np.stack([xs[i % len(xs)] for i in range(WAVE)]), *histories)
    is_video = fill([row.trace.query.is_video for row in rows], bool)
    image_counts = fill([len(row.trace.query.images) for row in rows], np.int32)
    seen = Seen._make((history, is_video, image_sizes, image_counts, Coordinates.EITHER))
    number = fill([len(row.calls) for row in rows], np.int32)
    shape = RolloutShape(BatchShape(0, most, most, 0, video=videos), tables.tools, shards=1)
    answer = jax.tree.map(np.asarray, _respond(tables, padded, seen, number, config, shape))
    required, calls, shown, ids, lengths, history = answer
    for i, row in enumerate(rows):
        if not required[i]:
            raise TraceError(f"turn {len(row.calls) + 1} of a trace about {row.trace.query.question!r} is no call")
        if (tool := int(calls.tool[i])) >= 0 and tables.tools[tool].host:
            raise TraceError(
                f"a trace about {row.trace.query.question!r} calls {tables.tools[tool].name!r}, which runs on the host: its "
                "answer is not written"
            )
        row.ids.extend(ids[i, : lengths[i]].tolist())
        row.loss_mask.extend(bytes(int(lengths[i])))
        for image, region, size in zip(*(x[i].tolist() for x in shown), strict=True):
            if image != NO_IMAGE:
                row.show(View(image, tuple(region), tuple(size), config.patch_size))
        row.calls.append(jax.tree.map(lambda x: x[i], calls))  # noqa: B023
    return [ImageHistory(*(x[i] for x in history)) for i in range(len(rows))]


def _first_history(row: TraceRow, config: RolloutConfig, most: int) -> ImageHistory:
    """The images that `row` shows before its first call: `first_history`, without a compilation for each count of rows."""
    slots = config.max_images + most
    region, size = np.zeros((slots, 4), np.int32), np.zeros((slots, 2), np.int32)
    for i, view in enumerate(row.views):
        region[i], size[i] = view.region, view.size
    count = 1 if row.trace.query.is_video else len(row.views)
    images = np.minimum(np.arange(slots, dtype=np.int32), most - 1)
    return ImageHistory._make((images, region, size, np.asarray(count, np.int32)))


def write_rows(
    traces: Sequence[Trace], vocabulary: Vocabulary, tables: Tables, config: RolloutConfig
) -> list[TraceRow]:
    """Writes traces out as rows, in their order: tokens, and views of their images. No pixel is read.

    Every call is answered, except one in the last turn of its trace.
    """
    check_format(tables, config)
    rows = [TraceRow(trace, i, vocabulary, config, tables.tools) for i, trace in enumerate(traces)]
    most = max([1, *(len(trace.query.images) for trace in traces)])  # rows without images have one empty buffer
    histories = {row.index: _first_history(row, config, most) for row in rows}
    turn, active = 0, rows
    while active:
        written = {row.index: row.write(row.trace.turns[turn], vocabulary) for row in active}
        turn += 1
        active = [row for row in active if len(row.trace.turns) > turn]
        for start in range(0, len(active), WAVE):
            wave = active[start : start + WAVE]
            after = _answer_calls(
                wave, [written[row.index] for row in wave], [histories[row.index] for row in wave], tables, config
            )
            histories |= {row.index: history for row, history in zip(wave, after, strict=True)}
    return rows


def to_trajectories(
    traces: Sequence[Trace], vocabulary: Vocabulary, tables: Tables, config: RolloutConfig, shape: BatchShape
) -> Trajectories[Visual]:
    """Writes traces out and cuts their frames: one row a trace, in order, on the host."""
    rows = write_rows(traces, vocabulary, tables, config)
    with ThreadPoolExecutor() as pool:  # matrix products take most of the time, and release the interpreter's lock
        frames = list(pool.map(lambda row: render(row, row.trace.query.images), rows))
    return assemble(rows, frames, config, shape)


def assemble(
    rows: Sequence[TraceRow], frames: Sequence[Sequence[np.ndarray]], config: RolloutConfig, shape: BatchShape
) -> Trajectories[Visual]:
    """Puts rows and their rendered frames into arrays.

    Raises:
        TraceError: a row does not fit `shape`.
    """
    count, numbers = len(rows), config.max_calls + 1
    tokens = np.zeros((count, shape.tokens), np.int32)
    valid, loss_mask = np.zeros((2, count, shape.tokens), bool)
    visual = Visual(
        patches=np.zeros((count, shape.images, shape.patches, config.patch_bytes), np.uint8),
        slices=np.full((count, shape.slices, 2), -1, np.int32),
        grids=np.zeros((count, shape.slices, 3), np.int32),
        seconds=np.zeros((count, shape.slices), np.float32),
    )
    views = max((len(call.source.image) for row in rows for call in row.calls), default=1)
    calls = no_calls(count, numbers, views, rows[0].tools)
    for i, row in enumerate(rows):
        need = row.shape
        for name, have, capacity in (
            ("tokens", need.tokens, shape.tokens),
            ("pictures", need.images, shape.images),
            ("slices", need.slices, shape.slices),
            ("patches", need.patches, shape.patches),
            ("calls", len(row.calls), config.max_calls),
        ):
            if have > capacity:
                raise TraceError(f"trace {i} has {have} {name}, there is room for {capacity}")
        tokens[i, : len(row.ids)] = row.ids
        valid[i, : len(row.ids)] = True
        loss_mask[i, : len(row.ids)] = row.loss_mask
        for j, patches in enumerate(frames[i]):
            visual.patches[i, j, : len(patches)] = patches
        visual.slices[i, : len(row.slices)] = np.reshape(row.slices, (-1, 2))
        visual.grids[i, : len(row.grids)] = np.reshape(row.grids, (-1, 3))
        if row.trace.query.is_video:
            visual.seconds[i, 0] = row.trace.query.seconds
        for j, call in enumerate(row.calls):
            jax.tree.map(functools.partial(_put, (i, j)), calls, call)
    return Trajectories(
        tokens=tokens,
        valid=valid,
        loss_mask=loss_mask,
        logprobs=np.zeros(tokens.shape, np.float32),
        visual=visual,
        prompt=np.arange(count, dtype=np.int32),
        calls=calls,
        num_calls=np.array([len(row.calls) for row in rows], np.int32),
        stop=np.full(count, STOP_ANSWER, np.int32),
    )


def _put(index: tuple[int, int], record: np.ndarray, value: np.ndarray) -> None:
    """Writes `value` to an index of a record, which may hold more pictures than the value has."""
    record[(*index, *(slice(count) for count in np.shape(value)))] = value
