"""Prompts that wait, and rows that begin: how a rollout of many rows goes through few slots.

A group of `group_size` neighbouring slots works on one prompt: `refill` reads it once, its rows share that cache. Where there are
more prompts than groups, a slot whose row is done gets the next row of its group's prompt, and if that has none left the group
reads the next prompt of the queue. A group keeps two prompts, so that a row which takes long holds up nobody: the others
of its group are at the prompt after. What a row has written is put on record before its slot is given away.

A prompt has a *place*, its index in the batch, and so have its rows. A place whose prompt has no tokens is empty. `admit` gives
places that are empty or done to other prompts, which are read in the order in which they came.

Each part of the mesh has a queue of its own, and rows never leave it. A row's tokens follow from its key, not from its slot.
"""

import functools
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.models.decoder import KVCache, Prefix
from pixel_jax.models.inputs import Visual
from pixel_jax.models.model import Model, encode_visual
from pixel_jax.models.rope import mrope_positions
from pixel_jax.rollouts.config import PATCH, RolloutConfig
from pixel_jax.rollouts.decode_loop import DONE, WRITING, RowState, rows_prompts
from pixel_jax.rollouts.materialize import VisualRecord, overviews, patch_source
from pixel_jax.rollouts.operations import first_history
from pixel_jax.rollouts.rows import Chunk, for_chunks
from pixel_jax.rollouts.shapes import RolloutShape, budgets
from pixel_jax.rollouts.trajectory import Calls, Prompts, Trajectories, no_calls
from pixel_jax.rollouts.views import each, render
from pixel_jax.tools.looking import ImageHistory

T = TypeVar("T")
Rows = TypeVar("Rows", RowState, "Record")
PROMPT_CHUNK = 8  # prompts that each part of the mesh reads together at most, where all are read at the start
PROMPT_TOKENS = (
    2**15
)  # of them: eight of 6,144, with as many pictures of 20,480 patches, take 17 GiB in a 7B in float32


class Record(NamedTuple):
    """What rows leave behind; the fields are those of `State`."""

    tokens: jax.Array
    loss_mask: jax.Array
    logprobs: jax.Array
    length: jax.Array
    grids: jax.Array
    calls: Calls
    num_calls: jax.Array
    stop: jax.Array

    @classmethod
    def of(cls, state: RowState) -> "Record":
        return cls(**{name: getattr(state, name) for name in cls._fields})


def read_together(width: int, *, from_queue: bool) -> int:
    """How many prompts of so many tokens each part of the mesh reads together: from a queue one at a time, for mostly one is
    wanted, and a chunk takes as long as if it were full.
    """
    return 1 if from_queue else max(1, min(PROMPT_CHUNK, PROMPT_TOKENS // width))


READ = np.iinfo(np.int32).max  # in `Queue.line`: a prompt that has been read, or a place that is empty


class Queue(NamedTuple):
    """B prompts, S parts of the mesh that they are split over, G groups of slots with E prompts each."""

    prefix: Prefix
    hidden: jax.Array  # [G, E, D], of the last token of each prompt
    next_pos: jax.Array  # int32 [G, E]
    prompt: jax.Array  # int32 [G, E], place in the part of the mesh
    entry: jax.Array  # int32 [G], which of the E was read last
    left: jax.Array  # int32 [G], rows of that one that have not begun
    line: jax.Array  # int32 [B], of prompts that have not been read the lowest of a part is the next; else READ
    unread: jax.Array  # int32 [S], how many those are
    records: Record | None  # of all rows; None where every row has a slot of its own


def groups(prompts: Prompts, config: RolloutConfig) -> int:
    """G, prompts whose rows are written at the same time."""
    return min(config.in_flight or prompts.length.shape[0], prompts.length.shape[0])


def start(
    model: Model, prompts: Prompts, assistant_prefix: jax.Array, config: RolloutConfig, shape: RolloutShape
) -> tuple[Queue, RowState]:
    """Nothing is read and all slots are free."""
    batch, width = prompts.tokens.shape
    group, count = config.group_size, groups(prompts, config)
    entries = 1 if count == batch else 2
    slots, dim = count * group, model.config.text.hidden_size
    cache = model.empty_cache(count, entries * (width + assistant_prefix.shape[0]))
    pairs = jnp.zeros((count, entries), jnp.int32)
    line = jnp.where(prompts.length > 0, jnp.arange(batch, dtype=jnp.int32), READ)
    queue = Queue(
        prefix=Prefix(cache.k, cache.v, pairs, jnp.zeros(slots, jnp.int32)),
        hidden=jnp.zeros((count, entries, dim), model.language_model.embed_tokens.weight.dtype),
        next_pos=pairs,
        prompt=pairs,
        entry=jnp.full(count, entries - 1, jnp.int32),
        left=jnp.zeros(count, jnp.int32),
        line=line,
        unread=_unread(line, shape),
        records=None if entries == 1 else Record.of(_empty(model, batch * group, prompts, config, shape)),
    )
    return queue, _empty(model, slots, prompts, config, shape)


def _unread(line: jax.Array, shape: RolloutShape) -> jax.Array:
    return jnp.sum(line.reshape(shape.shards, -1) < READ, axis=1, dtype=jnp.int32)


def _empty(model: Model, slots: int, prompts: Prompts, config: RolloutConfig, shape: RolloutShape) -> RowState:
    """Rows that have written nothing, in slots that are free."""
    numbers, most = config.max_calls + 1, prompts.image_sizes.shape[1]
    zeros = lambda *sizes, dtype=jnp.int32: jnp.zeros((slots, *sizes), dtype)
    rows = prompts.length.shape[0] // shape.shards * config.group_size
    images = config.max_images + most
    return RowState(
        row=jnp.full(slots, rows, jnp.int32),
        room=zeros(),
        tokens=zeros(config.max_response),
        loss_mask=zeros(config.max_response, dtype=bool),
        logprobs=zeros(config.max_response, dtype=jnp.float32),
        length=zeros(),
        turn_start=zeros(),
        status=jnp.full(slots, DONE, jnp.int32),
        stop=jnp.full(slots, -1, jnp.int32),
        hidden=zeros(model.config.text.hidden_size, dtype=model.language_model.embed_tokens.weight.dtype),
        next_pos=zeros(),
        cache=model.empty_cache(slots, config.max_response),
        parser=prompts.tables.parser.init(slots),
        history=ImageHistory(zeros(images), zeros(images, 4), zeros(images, 2), zeros()),
        num_images=zeros(),
        grids=zeros(config.max_calls, shape.views, 3),
        calls=no_calls(slots, numbers, shape.views, shape.tools, jnp),
        num_calls=zeros(),
    )


class FreeSlots(NamedTuple):
    """Which slots can be given a row, and what has to be read for that."""

    takes: jax.Array  # bool [R]
    opens: jax.Array  # bool [G], groups that read another prompt
    rank: jax.Array  # int32 [G], how many groups of their part of the mesh read one that comes before


def free_slots(queue: Queue, state: RowState, config: RolloutConfig, shape: RolloutShape) -> FreeSlots:
    """What `refill` would do now. A group reads on only if no row is left that looks at the prompt it would write over.

    It is asked at every token: the queue is not sorted here.
    """
    count, entries = queue.prompt.shape
    idle = (state.status == DONE).reshape(count, -1)
    other = (queue.entry + 1) % entries
    in_use = jnp.any(~idle & (queue.prefix.entry.reshape(count, -1) == other[:, None]), axis=1)
    wants = (jnp.sum(idle, axis=1) > queue.left) & ~in_use
    rank = _rank(wants.reshape(shape.shards, -1))
    if entries == 1:  # every place has a group of its own
        opens = wants & (queue.line < READ)
    else:
        opens = wants & (rank < queue.unread[:, None]).reshape(-1)
    takes = idle & (_rank(idle) < jnp.where(opens, config.group_size, queue.left)[:, None])
    return FreeSlots(takes.reshape(-1), opens, rank.reshape(-1))


def _rank(x: jax.Array) -> jax.Array:
    """How many are true before each one, along the second axis."""
    return jnp.cumsum(x, axis=1) - x


def _next_places(queue: Queue, rank: jax.Array, shape: RolloutShape) -> jax.Array:
    """Of each group the place, in its part of the mesh, that comes after `rank` (int32 [G]) others: int32 [G]."""
    line = queue.line.reshape(shape.shards, -1)
    if queue.prompt.shape[1] == 1:
        return jnp.tile(jnp.arange(line.shape[1], dtype=jnp.int32), shape.shards)
    ranks = jnp.minimum(rank.reshape(shape.shards, -1), line.shape[1] - 1)
    return jnp.take_along_axis(jnp.argsort(line, axis=1), ranks, axis=1).reshape(-1)


def refill(
    model: Model,
    prompts: Prompts,
    assistant_prefix: jax.Array,
    queue: Queue,
    state: RowState,
    config: RolloutConfig,
    shape: RolloutShape,
) -> tuple[Queue, RowState]:
    """Every slot that can be given a row is: it has written `assistant_prefix` and nothing else.

    `assistant_prefix` int32 [O] ends with -1 where it is shorter.
    """
    takes, opens, rank = free_slots(queue, state, config, shape)
    place = _next_places(queue, rank, shape)
    count, entries = queue.prompt.shape
    group = config.group_size
    queue = queue._replace(records=write_output(queue.records, state, takes, shape))
    left = queue.left[:, None]
    queue = _read(model, prompts, assistant_prefix, queue, opens, place, config, shape)

    taken = takes.reshape(count, group)
    rank = _rank(taken)
    # The rows that the prompt before has left are begun first.
    new = rank >= left
    entry = jnp.where(opens[:, None] & ~new, (queue.entry[:, None] + 1) % entries, queue.entry[:, None])
    member = jnp.where(new, rank - left, group - left + rank)
    entry = jnp.where(taken, entry, queue.prefix.entry.reshape(count, group))
    row = jnp.take_along_axis(queue.prompt, entry, axis=1) * group + member
    queue = queue._replace(
        prefix=queue.prefix._replace(entry=entry.reshape(-1)), left=queue.left - jnp.sum(taken, axis=1)
    )

    return queue, _given(takes, _begin(model, prompts, assistant_prefix, queue, row.reshape(-1), config, shape), state)


def _select(which: jax.Array, new: T, old: T) -> T:
    """Of two trees of arrays [N, ...], `new` where `which` (bool [N]), else `old`."""
    return jax.tree.map(lambda x, y: jnp.where(which.reshape(-1, *[1] * (y.ndim - 1)), x, y), new, old)


def _given(which: jax.Array, new: RowState, old: RowState) -> RowState:
    """The slots `which` (bool [R]) hold what `new` says. Keys and values of the row before stay, beyond the cache's length."""
    cache = old.cache._replace(length=jnp.where(which, new.cache.length, old.cache.length))
    return _select(which, new._replace(cache=None), old._replace(cache=None))._replace(cache=cache)


def _read(
    model, prompts: Prompts, assistant_prefix, queue: Queue, opens, place, config: RolloutConfig, shape: RolloutShape
) -> Queue:
    """The groups that `opens` (bool [G]) have the prompts at `place` (int32 [G]) read."""
    count, entries = queue.prompt.shape
    batch, arrays = prompts.length.shape[0], prompts._replace(tables=(), uid=())
    entry = jnp.where(opens, (queue.entry + 1) % entries, queue.entry)

    def body(chunk: Chunk, carry: Queue) -> Queue:
        reads = chunk.take(opens)
        at = chunk.take(place).reshape(chunk.at.shape)
        chosen = jax.tree.map(Chunk(jnp.minimum(at, batch // shape.shards - 1), batch).take, arrays)
        visual = prompt_visual(chosen, config, shape)
        hidden, cache, next_pos = read_prompt(model, chosen, visual, assistant_prefix, config)
        here = reads[:, None] & (jnp.arange(entries) == chunk.take(entry)[:, None])

        def put(old, new):
            """One of a group's E values, [G, E, ...]."""
            before = chunk.take(old)
            where = here.reshape(*here.shape, *[1] * (before.ndim - 2))
            return chunk.put(old, jnp.where(where, new[:, None], before))

        def put_layer(old, new):
            apart = jnp.moveaxis(old.reshape(*old.shape[:2], entries, *new.shape[2:]), 2, 1)
            return jnp.moveaxis(put(apart, new), 1, 2).reshape(old.shape)

        prefix = carry.prefix
        return carry._replace(
            prefix=prefix._replace(
                k=tuple(map(put_layer, prefix.k, cache.k)),
                v=tuple(map(put_layer, prefix.v, cache.v)),
                length=put(prefix.length, cache.length),
            ),
            hidden=put(carry.hidden, hidden),
            next_pos=put(carry.next_pos, next_pos),
            prompt=put(carry.prompt, at.reshape(-1)),
        )

    records = queue.records
    size = read_together(prompts.tokens.shape[1], from_queue=entries > 1)
    with jax.named_scope("prompts"):
        queue = for_chunks(opens, shape.shards, size, body, queue._replace(records=None))
    unread = queue.unread - jnp.sum(opens.reshape(shape.shards, -1), axis=1, dtype=jnp.int32)
    now = Chunk(jnp.where(opens, place, batch).reshape(shape.shards, -1), batch)
    line = now.put(queue.line, jnp.full(count, READ))
    left = queue.left + jnp.where(opens, config.group_size, 0)
    return queue._replace(entry=entry, left=left, line=line, unread=unread, records=records)


def prompt_visual(prompts: Prompts, config: RolloutConfig, shape: RolloutShape) -> Visual:
    """The overview of every prompt: its images, or its video two frames a slice."""
    seen = overviews(prompts, config)
    budget, _ = budgets(config, shape)
    view = jax.vmap(each(each(functools.partial(render, budget=budget), budget), budget))  # of each part of the mesh
    by_shard = lambda x: x.reshape(shape.shards, -1, *x.shape[1:])
    views = view(*map(by_shard, (prompts.buffers, seen.region, seen.size)))
    return Visual(views.reshape(-1, *views.shape[2:]), *prompt_items(prompts, config))


def prompt_items(prompts: Prompts, config: RolloutConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The `slices`, `grids` and `seconds` of every prompt's overview (`Visual`)."""
    seen = overviews(prompts, config)
    index, video = jnp.arange(seen.image.shape[1]), prompts.is_video[:, None, None]
    present = seen.image >= 0
    pairs = -(-prompts.image_counts // 2)
    pair = 2 * index[None, :, None] + jnp.arange(2)
    pair = jnp.minimum(pair, prompts.image_counts[:, None, None] - 1)
    slices = jnp.where(video, pair, index[None, :, None])
    slices = jnp.where(jnp.where(video[..., 0], index < pairs[:, None], present)[..., None], slices, -1)
    grid = seen.size // PATCH
    one = jnp.where(present, 1, 0)
    first = index == 0
    frames = jnp.where(video[..., 0], jnp.where(first, pairs[:, None], 0), one)
    grids = jnp.where(frames[..., None] > 0, jnp.concatenate([frames[..., None], grid], axis=-1), 0)
    seconds = jnp.where(first, prompts.seconds[:, None], 0.0)
    return slices.astype(jnp.int32), grids, seconds


def read_prompt(
    model: Model, prompts: Prompts, visual: Visual, assistant_prefix: jax.Array, config: RolloutConfig
) -> tuple[jax.Array, KVCache, jax.Array]:
    """Each prompt and, since all rows begin alike, the assistant prefix: the last hidden state [B, D], the cache and the next
    position.
    """
    batch, width = prompts.tokens.shape
    room, written = assistant_prefix.shape[0], jnp.sum(assistant_prefix >= 0)
    index = jnp.arange(width + room) - prompts.length[:, None]
    tokens = jnp.where(
        index < 0,
        jnp.pad(prompts.tokens, ((0, 0), (0, room))),
        jnp.maximum(assistant_prefix, 0)[jnp.clip(index, 0, room - 1)],
    )
    valid = index < written
    features = encode_visual(model, visual, implementation=config.implementation)
    x = model.embed(tokens, features, visual.grids)
    positions, next_pos = mrope_positions(
        model.is_visual(tokens), valid, visual.grids, visual.seconds, jnp.zeros(batch, jnp.int32), model.config
    )
    hidden, cache = model.prefill(x, positions, valid, implementation=config.implementation)
    last = jnp.take_along_axis(hidden, (prompts.length + written)[:, None, None] - 1, axis=1)[:, 0]
    return last, cache, next_pos


def _begin(model, prompts: Prompts, assistant_prefix, queue: Queue, row, config, shape: RolloutShape) -> RowState:
    """The state of slots that begin the rows `row` (int32 [R]); their caches are not to be looked at."""
    slots = row.shape[0]
    fresh = _empty(model, slots, prompts, config, shape)._replace(row=row)
    mine = rows_prompts(fresh, prompts, config, shape)
    sizes, is_video, buffers, length = (
        mine.take(x) for x in (prompts.image_sizes, prompts.is_video, prompts.image_counts, prompts.length)
    )
    written = jnp.sum(assistant_prefix >= 0)
    history = first_history(sizes, buffers, is_video, config)
    of_prompt = lambda x: jnp.take_along_axis(
        jnp.repeat(x, config.group_size, axis=0),
        queue.prefix.entry.reshape(slots, 1, *[1] * (x.ndim - 2)),
        axis=1,
    )[:, 0]
    parser, _ = jax.lax.scan(
        lambda parser, token: (prompts.tables.parser.step(prompts.tables.bytes, parser, token[None]), None),
        prompts.tables.parser.init(1),
        assistant_prefix,
    )
    return fresh._replace(
        room=jnp.minimum(config.max_response, config.max_tokens - length),
        tokens=fresh.tokens.at[:, : assistant_prefix.shape[0]].set(
            jnp.maximum(assistant_prefix, 0)[: config.max_response]
        ),
        length=jnp.full(slots, written, jnp.int32),
        status=jnp.full(slots, WRITING, jnp.int32),
        hidden=of_prompt(queue.hidden),
        next_pos=of_prompt(queue.next_pos),
        parser=jax.tree.map(lambda x: jnp.broadcast_to(x, (slots, *x.shape[1:])), parser),
        history=history,
        num_images=history.count,
    )


def write_output(records: Record | None, state: RowState, which: jax.Array, shape: RolloutShape) -> Record | None:
    """What the slots `which` (bool [R]) hold, in the rows' places; of slots that hold none, nothing."""
    if records is None:
        return None
    rows = records.length.shape[0]
    held = _held(state._replace(row=jnp.where(which, state.row, rows)), rows, shape)
    return jax.tree.map(held.put, records, Record.of(state))


def admit(
    queue: Queue, state: RowState, places: jax.Array, config: RolloutConfig, shape: RolloutShape
) -> tuple[Queue, RowState]:
    """The prompts at `places` (int32 [K], of the whole batch) are new, last in the line; nothing of those before is left."""
    new = jnp.zeros(queue.line.shape[0], bool).at[places].set(True)
    of_rows = jnp.repeat(new, config.group_size)
    last = jnp.max(jnp.where(queue.line < READ, queue.line, -1))
    line = queue.line.at[places].set(1 + last + jnp.arange(places.shape[0], dtype=jnp.int32))
    queue = queue._replace(
        line=line,
        unread=_unread(line, shape),
        records=None if queue.records is None else _select(of_rows, _blank(queue.records, shape), queue.records),
    )
    # Slots let go of the rows before: those would be put on record where the new prompt's rows belong.
    nothing = jnp.full_like(state.row, of_rows.shape[0] // shape.shards)
    free = _blank(state, shape)._replace(row=nothing, status=jnp.full_like(state.status, DONE))
    return queue, _given(_held(state, of_rows.shape[0], shape).take(of_rows), free, state)


def _held(state: RowState, rows: int, shape: RolloutShape) -> Chunk:
    """The places of the rows in the slots, among all `rows`."""
    return Chunk(state.row.reshape(shape.shards, -1), rows)


def _blank(rows: Rows, shape: RolloutShape) -> Rows:
    """As many rows that have written nothing."""
    count, numbers = rows.calls.status.shape
    return jax.tree.map(jnp.zeros_like, rows)._replace(
        stop=jnp.full(count, -1, jnp.int32), calls=no_calls(count, numbers, shape.views, shape.tools, jnp)
    )


def finished(queue: Queue, state: RowState, config: RolloutConfig, shape: RolloutShape) -> jax.Array:
    """Prompts whose rows are all done: bool [B]."""
    return jnp.all(_all_rows(queue, state, shape).stop.reshape(-1, config.group_size) >= 0, axis=1)


def _all_rows(queue: Queue, state: RowState, shape: RolloutShape) -> Record:
    """Of rows that are in slots what those hold, of the others what is on record.

    Fetched, not put: of what a row leaves behind each part is one instruction then, where to put it is a loop to compile.
    """
    here = Record.of(state)
    if queue.records is None:
        return here
    count, slots = queue.records.stop.shape[0], state.row.shape[0]
    local = jnp.arange(slots, dtype=jnp.int32) % (slots // shape.shards)
    slot = _held(state, count, shape).put(jnp.full(count, slots), local)
    fetched = jax.tree.map(Chunk(slot.reshape(shape.shards, -1), slots).take, here)
    return _select(slot < slots, fetched, queue.records)


def finish(
    prompts: Prompts, queue: Queue, state: RowState, config: RolloutConfig, shape: RolloutShape
) -> Trajectories[VisualRecord]:
    """The trajectories of all rows: prompt and response side by side, everything they saw in order.

    Of a row that is not done (`stop` -1) they are what it has so far.
    """
    rows = _all_rows(queue, state, shape)
    count, group = rows.length.shape[0], config.group_size
    spread = lambda x: jnp.repeat(x, group, axis=0)
    beside = lambda x, y: jnp.concatenate([x, y], axis=1)
    prompt_tokens = spread(prompts.tokens)
    blank = jnp.zeros(prompt_tokens.shape, bool)
    prompt_slices, prompt_grids, prompt_seconds = map(spread, prompt_items(prompts, config))
    grids = rows.grids.reshape(count, -1, 3)
    first = prompts.image_sizes.shape[1]
    frame = first + jnp.arange(grids.shape[1])
    still = jnp.where(grids[..., :1] > 0, jnp.stack([frame, frame], axis=-1), -1)
    slices = beside(prompt_slices, still)
    present_first = jnp.argsort(slices[..., :1] < 0, axis=1, stable=True)
    return Trajectories(
        tokens=beside(prompt_tokens, rows.tokens),
        valid=beside(
            jnp.arange(prompt_tokens.shape[1]) < spread(prompts.length)[:, None],
            jnp.arange(config.max_response) < rows.length[:, None],
        ),
        loss_mask=beside(blank, rows.loss_mask),
        logprobs=beside(blank.astype(jnp.float32), jnp.where(rows.loss_mask, rows.logprobs, 0.0)),
        visual=VisualRecord(
            source=patch_source(prompts, rows.calls, config, shape),
            slices=jnp.take_along_axis(slices, present_first, axis=1),
            grids=beside(prompt_grids, grids),
            seconds=beside(prompt_seconds, jnp.zeros(grids.shape[:2], jnp.float32)),
        ),
        prompt=jnp.repeat(jnp.arange(prompts.tokens.shape[0]), group),
        calls=rows.calls,
        num_calls=rows.num_calls,
        stop=rows.stop,
    )
