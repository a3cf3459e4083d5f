"""The queue of prompts: how a rollout of many rows uses few slots.

A group of `group_size` neighbouring slots works on one prompt: `refill` reads it once, and its rows share that cache. If there
are more prompts than groups, a slot whose row is done gets the next row of its group's prompt; if none is left, the group reads
the next prompt of the queue. A group has two prompts at a time, so that a long row does not hold up the others of its group: they
work on the next prompt. What a row has written is stored in `Queue.outputs` before its slot gets another row.

The batch has B prompts, known by their index. A prompt without tokens is empty. `admit` replaces prompts that are empty or
done by others, which are read in the order in which they came.

Each data shard has a queue of its own, and rows never leave it. A row's tokens follow from its key, not from its slot.
"""

import functools
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.arrays import AnyArray
from pixel_jax.dialog.call_parser import ParserState
from pixel_jax.models.decoder import KVCache, Prefix
from pixel_jax.models.inputs import Visual
from pixel_jax.models.model import Model, encode_visual
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.decode_loop import DONE, WRITING, RowState, rows_prompts
from pixel_jax.rollouts.materialize import VisualRecord, overviews, patch_source
from pixel_jax.rollouts.operations import first_history
from pixel_jax.rollouts.rows import Chunk, for_chunks
from pixel_jax.rollouts.shapes import RolloutShape, budgets
from pixel_jax.rollouts.trajectory import Calls, HostPrompts, Prompts, Trajectories, no_calls
from pixel_jax.rollouts.views import map_views, render
from pixel_jax.tools.device import ImageHistory

T = TypeVar("T")
Rows = TypeVar("Rows", bound="RowState | RowOutput | RowRecord")
# The most prompts, and the most of their tokens, that each data shard reads at once if all are read at the start. Eight prompts
# of 6,144 tokens, each with a picture of 20,480 patches, take 17 GiB in a 7B model in float32.
PROMPT_CHUNK, PROMPT_TOKENS = 8, 2**15


class RowOutput(NamedTuple):
    """The stored output of rows that are done; the fields are those of `RowState`."""

    tokens: jax.Array
    loss_mask: jax.Array
    logprobs: jax.Array
    length: jax.Array
    grids: jax.Array
    calls: Calls
    num_calls: jax.Array
    stop: jax.Array

    @classmethod
    def of(cls, state: RowState) -> "RowOutput":
        """Takes the fields from a state."""
        return cls(**{name: getattr(state, name) for name in cls._fields})


class RowRecord(NamedTuple):
    """R rows without their caches, which are enough to go on with them (`start`); the fields are those of `RowState`.

    They include those of `RowOutput`. A row of length 0 has not begun.
    """

    tokens: AnyArray
    loss_mask: AnyArray
    logprobs: AnyArray
    length: AnyArray
    turn_start: AnyArray
    status: AnyArray
    stop: AnyArray
    parser: ParserState
    history: ImageHistory
    num_images: AnyArray
    grids: AnyArray
    calls: Calls
    num_calls: AnyArray

    @classmethod
    def of(cls, state: RowState) -> "RowRecord":
        """Takes the fields from a state."""
        return cls(**{name: getattr(state, name) for name in cls._fields})

    @classmethod
    def empty(
        cls, rows: int, prompts: Prompts | HostPrompts, config: RolloutConfig, shape: RolloutShape
    ) -> "RowRecord":
        """Returns rows of `prompts` that have not begun."""
        zeros = lambda *sizes, dtype=jnp.int32: jnp.zeros((rows, *sizes), dtype)
        images = config.max_images + prompts.image_sizes.shape[1]
        return cls(
            tokens=zeros(config.max_response),
            loss_mask=zeros(config.max_response, dtype=bool),
            logprobs=zeros(config.max_response, dtype=jnp.float32),
            length=zeros(),
            turn_start=zeros(),
            status=jnp.full(rows, DONE, jnp.int32),
            stop=jnp.full(rows, -1, jnp.int32),
            parser=prompts.tables.parser.init(rows),
            history=ImageHistory(zeros(images), zeros(images, 4), zeros(images, 2), zeros()),
            num_images=zeros(),
            grids=zeros(config.max_calls, shape.views, 3),
            calls=no_calls(rows, config.max_calls + 1, shape.views, shape.tools, jnp),
            num_calls=zeros(),
        )


def read_together(width: int, *, from_queue: bool) -> int:
    """Returns how many prompts of `width` tokens each data shard reads together.

    From a queue it is one, because mostly one is needed, and a chunk takes as long as a full one.
    """
    return 1 if from_queue else max(1, min(PROMPT_CHUNK, PROMPT_TOKENS // width))


NOT_WAITING = np.iinfo(np.int32).max  # in `Queue.order`: a prompt that has been read, or is empty


class Queue(NamedTuple):
    """B prompts, in S data shards, and G groups of slots with E prompts each."""

    prefix: Prefix
    hidden: jax.Array  # [G, E, D], of the last token of each prompt
    next_pos: jax.Array  # int32 [G, E]
    prompt: jax.Array  # int32 [G, E], index in the data shard
    entry: jax.Array  # int32 [G], the index of the one of the E prompts that was read last
    left: jax.Array  # int32 [G], rows of that prompt that have not begun
    order: jax.Array  # int32 [B], of prompts that wait, the lowest of a shard is the next; NOT_WAITING for the others
    unread: jax.Array  # int32 [S], number of prompts that wait
    outputs: RowOutput | RowRecord | None  # of all rows; None if every row has a slot of its own
    # int32 [B, n], the rows of each prompt that are to be written, behind a -1 for each that is done: then `outputs` are records,
    # from which rows go on. None: all rows of a prompt begin, in order.
    members: jax.Array | None = None


def groups(prompts: Prompts, config: RolloutConfig) -> int:
    """Returns G, the number of prompts whose rows are written at the same time."""
    return min(config.in_flight or prompts.length.shape[0], prompts.length.shape[0])


def start(
    model: Model,
    prompts: Prompts,
    assistant_prefix: jax.Array,
    config: RolloutConfig,
    shape: RolloutShape,
    records: RowRecord | None = None,
) -> tuple[Queue, RowState]:
    """Returns the queue and the rows at the start: all prompts with rows to write wait, and all slots are free.

    With `records` of all rows, rows go on from there, and no row is written that is done.
    """
    batch, width = prompts.tokens.shape
    group, count = config.group_size, groups(prompts, config)
    entries = 1 if count == batch else 2
    slots, dim = count * group, model.config.text.hidden_size
    cache = model.empty_cache(count, entries * (width + assistant_prefix.shape[0]))
    pairs = jnp.zeros((count, entries), jnp.int32)
    waits, members = prompts.length > 0, None
    outputs = None if entries == 1 else RowOutput.of(_empty(model, batch * group, prompts, config, shape))
    if records is not None:
        done = records.stop.reshape(batch, group) >= 0
        members = jnp.argsort(~done, axis=1, stable=True).astype(jnp.int32)
        members = jnp.where(jnp.take_along_axis(done, members, axis=1), -1, members)
        waits, outputs = waits & ~jnp.all(done, axis=1), records
    order = jnp.where(waits, jnp.arange(batch, dtype=jnp.int32), NOT_WAITING)
    queue = Queue(
        prefix=Prefix(
            cache.k,
            cache.v,
            pairs,
            jnp.zeros(slots, jnp.int32),
            jax.tree.map(lambda x: jnp.repeat(x[:, None], entries, axis=1), cache.recurrent),
        ),
        hidden=jnp.zeros((count, entries, dim), model.dtype),
        next_pos=pairs,
        prompt=pairs,
        entry=jnp.full(count, entries - 1, jnp.int32),
        left=jnp.zeros(count, jnp.int32),
        order=order,
        unread=_unread(order, shape),
        outputs=outputs,
        members=members,
    )
    return queue, _empty(model, slots, prompts, config, shape)


def _unread(order: jax.Array, shape: RolloutShape) -> jax.Array:
    return jnp.sum(order.reshape(shape.shards, -1) < NOT_WAITING, axis=1, dtype=jnp.int32)


def _empty(model: Model, slots: int, prompts: Prompts, config: RolloutConfig, shape: RolloutShape) -> RowState:
    """Returns the state of free slots."""
    rows = prompts.length.shape[0] // shape.shards * config.group_size
    cache = model.empty_cache(slots, config.max_response)
    return RowState(
        row=jnp.full(slots, rows, jnp.int32),
        max_length=jnp.zeros(slots, jnp.int32),
        hidden=jnp.zeros((slots, model.config.text.hidden_size), model.dtype),
        next_pos=jnp.zeros(slots, jnp.int32),
        cache=cache.quantised() if config.caches == "int8" else cache,
        **RowRecord.empty(slots, prompts, config, shape)._asdict(),
    )


class FreeSlots(NamedTuple):
    """The slots that can take a new row, and the groups that must read a prompt for that."""

    takes: jax.Array  # bool [R]
    opens: jax.Array  # bool [G], groups that read another prompt
    rank: jax.Array  # int32 [G], the number of groups of the data shard that read an earlier prompt


def free_slots(queue: Queue, state: RowState, config: RolloutConfig, shape: RolloutShape) -> FreeSlots:
    """Returns what `refill` would do now. A group only reads a prompt if no row needs the one that it would overwrite.

    It is called at every token, so it does not sort the queue. Of a prompt that is opened it counts all rows, also those that are
    done already (`Queue.members`), to which `refill` gives no slot.
    """
    count, entries = queue.prompt.shape
    idle = (state.status == DONE).reshape(count, -1)
    other = (queue.entry + 1) % entries
    in_use = jnp.any(~idle & (queue.prefix.entry.reshape(count, -1) == other[:, None]), axis=1)
    wants = (jnp.sum(idle, axis=1) > queue.left) & ~in_use
    rank = _rank(wants.reshape(shape.shards, -1))
    if entries == 1:  # every prompt has a group of its own
        opens = wants & (queue.order < NOT_WAITING)
    else:
        opens = wants & (rank < queue.unread[:, None]).reshape(-1)
    takes = idle & (_rank(idle) < jnp.where(opens, config.group_size, queue.left)[:, None])
    return FreeSlots(takes.reshape(-1), opens, rank.reshape(-1))


def _rank(x: jax.Array) -> jax.Array:
    """Counts the true values before each one, along the second axis."""
    return jnp.cumsum(x, axis=1) - x


def _next_prompts(queue: Queue, rank: jax.Array, shape: RolloutShape) -> jax.Array:
    """Returns for each group the index in its data shard of the waiting prompt with `rank` (int32 [G]): int32 [G]."""
    order = queue.order.reshape(shape.shards, -1)
    if queue.prompt.shape[1] == 1:
        return jnp.tile(jnp.arange(order.shape[1], dtype=jnp.int32), shape.shards)
    ranks = jnp.minimum(rank.reshape(shape.shards, -1), order.shape[1] - 1)
    return jnp.take_along_axis(jnp.argsort(order, axis=1), ranks, axis=1).reshape(-1)


def refill(
    model: Model,
    prompts: Prompts,
    assistant_prefix: jax.Array,
    queue: Queue,
    state: RowState,
    config: RolloutConfig,
    shape: RolloutShape,
) -> tuple[Queue, RowState]:
    """Gives every slot that can take one a new row, which has written `assistant_prefix` (int32 [O], padded with -1)."""
    takes, opens, rank = free_slots(queue, state, config, shape)
    index = _next_prompts(queue, rank, shape)
    count, entries = queue.prompt.shape
    group = config.group_size
    left, taken = queue.left[:, None], takes.reshape(count, group)
    fresh = jnp.int32(group)  # rows of a new prompt
    if queue.members is not None:
        fresh = _of_prompts(jnp.sum(queue.members >= 0, axis=1, dtype=jnp.int32), index[:, None], shape)
        taken &= _rank(taken) < left + jnp.where(opens[:, None], fresh, 0)
        takes = taken.reshape(-1)
    queue = queue._replace(outputs=write_output(queue.outputs, state, takes, shape))
    queue = _read(model, prompts, assistant_prefix, queue, opens, index, config, shape)
    queue = queue._replace(left=queue.left + jnp.where(opens, fresh.reshape(-1), 0))

    rank = _rank(taken)
    # The remaining rows of the previous prompt begin first.
    new = rank >= left
    entry = jnp.where(opens[:, None] & ~new, (queue.entry[:, None] + 1) % entries, queue.entry[:, None])
    member = jnp.where(new, group - fresh + rank - left, group - left + rank)
    entry = jnp.where(taken, entry, queue.prefix.entry.reshape(count, group))
    prompt = jnp.take_along_axis(queue.prompt, entry, axis=1)
    if queue.members is not None:
        order = _of_prompts(queue.members, prompt, shape)  # [G, n, n]
        member = jnp.take_along_axis(order, jnp.clip(member, 0, group - 1)[..., None], axis=2)[..., 0]
    row = prompt * group + member
    queue = queue._replace(
        prefix=queue.prefix._replace(entry=entry.reshape(-1)), left=queue.left - jnp.sum(taken, axis=1)
    )

    begun = _begin(model, prompts, assistant_prefix, queue, row.reshape(-1), config, shape)
    if isinstance(queue.outputs, RowRecord):
        begun = _go_on(begun, queue.outputs, shape)
    return queue, _replace_slots(takes, begun, state)


def _of_prompts(values: jax.Array, prompt: jax.Array, shape: RolloutShape) -> jax.Array:
    """Takes the values [B, ...] of prompts with indices `prompt` (int32 [G, k], in the data shard): [G, k, ...]."""
    taken = Chunk(prompt.reshape(shape.shards, -1), values.shape[0]).take(values)
    return taken.reshape(*prompt.shape, *values.shape[1:])


def _go_on(fresh: RowState, records: RowRecord, shape: RolloutShape) -> RowState:
    """Returns slots that go on with the rows that they begin, if these were begun before. Their caches are still empty."""
    mine = jax.tree.map(_rows_of_slots(fresh, records.length.shape[0], shape).take, records)
    return fresh._replace(**_select(mine.length > 0, mine, RowRecord.of(fresh))._asdict())


def _select(which: jax.Array, new: T, old: T) -> T:
    """Selects between two trees of arrays [N, ...]: `new` where `which` (bool [N]), else `old`."""
    return jax.tree.map(lambda x, y: jnp.where(which.reshape(-1, *[1] * (y.ndim - 1)), x, y), new, old)


def _replace_slots(which: jax.Array, new: RowState, old: RowState) -> RowState:
    """Replaces the slots `which` (bool [R]) by `new`. Keys and values in their caches stay, beyond the new length."""
    cache = old.cache._replace(
        length=jnp.where(which, new.cache.length, old.cache.length),
        recurrent=_select(which, new.cache.recurrent, old.cache.recurrent),
    )
    return _select(which, new._replace(cache=None), old._replace(cache=None))._replace(cache=cache)


def _read(
    model, prompts: Prompts, assistant_prefix, queue: Queue, opens, index, config: RolloutConfig, shape: RolloutShape
) -> Queue:
    """Reads the prompts with `index` (int32 [G], in the data shard) for the groups that `opens` (bool [G])."""
    count, entries = queue.prompt.shape
    batch, arrays = prompts.length.shape[0], prompts._replace(tables=(), uid=())
    entry = jnp.where(opens, (queue.entry + 1) % entries, queue.entry)

    def body(chunk: Chunk, carry: Queue) -> Queue:
        reads = chunk.take(opens)
        at = chunk.take(index).reshape(chunk.at.shape)
        chosen = jax.tree.map(Chunk(jnp.minimum(at, batch // shape.shards - 1), batch).take, arrays)
        visual = None if model.config.vision is None else prompt_visual(chosen, config, shape)
        hidden, cache, next_pos = read_prompt(model, chosen, visual, assistant_prefix, config)
        here = reads[:, None] & (jnp.arange(entries) == chunk.take(entry)[:, None])

        def put(old, new):
            """Replaces one of a group's E values, [G, E, ...]."""
            before = chunk.take(old)
            where = here.reshape(*here.shape, *[1] * (before.ndim - 2))
            return chunk.put(old, jnp.where(where, new[:, None], before))

        def put_layer(old, new):
            by_entry = jnp.moveaxis(old.reshape(*old.shape[:2], entries, *new.shape[2:]), 2, 1)
            return jnp.moveaxis(put(by_entry, new), 1, 2).reshape(old.shape)

        prefix = carry.prefix
        return carry._replace(
            prefix=prefix._replace(
                k=tuple(map(put_layer, prefix.k, cache.k)),
                v=tuple(map(put_layer, prefix.v, cache.v)),
                length=put(prefix.length, cache.length),
                recurrent=jax.tree.map(put, prefix.recurrent, cache.recurrent),
            ),
            hidden=put(carry.hidden, hidden),
            next_pos=put(carry.next_pos, next_pos),
            prompt=put(carry.prompt, at.reshape(-1)),
        )

    outputs = queue.outputs
    size = read_together(prompts.tokens.shape[1], from_queue=entries > 1)
    with jax.named_scope("prompts"):
        queue = for_chunks(opens, shape.shards, size, body, queue._replace(outputs=None))
    unread = queue.unread - jnp.sum(opens.reshape(shape.shards, -1), axis=1, dtype=jnp.int32)
    now = Chunk(jnp.where(opens, index, batch).reshape(shape.shards, -1), batch)
    order = now.put(queue.order, jnp.full(count, NOT_WAITING))
    return queue._replace(entry=entry, order=order, unread=unread, outputs=outputs)


def prompt_visual(prompts: Prompts, config: RolloutConfig, shape: RolloutShape) -> Visual:
    """Cuts out the overview of every prompt: its images, or its video, two frames a slice."""
    seen = overviews(prompts, config)
    budget, _ = budgets(config, shape)
    view = jax.vmap(
        map_views(map_views(functools.partial(render, budget=budget), budget), budget)
    )  # of each data shard
    by_shard = lambda x: x.reshape(shape.shards, -1, *x.shape[1:])
    views = view(*map(by_shard, (prompts.buffers, seen.region, seen.size)))
    return Visual(views.reshape(-1, *views.shape[2:]), *prompt_items(prompts, config))


def prompt_items(prompts: Prompts, config: RolloutConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the `slices`, `grids` and `seconds` of every prompt's overview (`Visual`)."""
    seen = overviews(prompts, config)
    index, video = jnp.arange(seen.image.shape[1]), prompts.is_video[:, None, None]
    present = seen.image >= 0
    pairs = -(-prompts.image_counts // 2)
    pair = 2 * index[None, :, None] + jnp.arange(2)
    pair = jnp.minimum(pair, prompts.image_counts[:, None, None] - 1)
    slices = jnp.where(video, pair, index[None, :, None])
    slices = jnp.where(jnp.where(video[..., 0], index < pairs[:, None], present)[..., None], slices, -1)
    grid = seen.size // config.patch_size
    one = jnp.where(present, 1, 0)
    first = index == 0
    frames = jnp.where(
        video[..., 0],
        jnp.where(index < pairs[:, None], 1, 0) if config.split_videos else jnp.where(first, pairs[:, None], 0),
        one,
    )
    grids = jnp.where(frames[..., None] > 0, jnp.concatenate([frames[..., None], grid], axis=-1), 0)
    seconds = jnp.where(first, prompts.seconds[:, None], 0.0)
    return slices.astype(jnp.int32), grids, seconds


def read_prompt(
    model: Model, prompts: Prompts, visual: Visual | None, assistant_prefix: jax.Array, config: RolloutConfig
) -> tuple[jax.Array, KVCache, jax.Array]:
    """Reads each prompt and the assistant prefix; `visual` is what it shows, None for a model without a vision tower.

    Returns:
      The hidden state [B, D] of the last token, the cache, and the next position, int32 [B].
    """
    batch, width = prompts.tokens.shape
    extra, written = assistant_prefix.shape[0], jnp.sum(assistant_prefix >= 0)
    index = jnp.arange(width + extra) - prompts.length[:, None]
    tokens = jnp.where(
        index < 0,
        jnp.pad(prompts.tokens, ((0, 0), (0, extra))),
        jnp.maximum(assistant_prefix, 0)[jnp.clip(index, 0, extra - 1)],
    )
    valid = index < written
    features, grids, seconds = None, jnp.zeros((batch, 0, 3), jnp.int32), jnp.zeros((batch, 0), jnp.float32)
    if visual is not None:
        features = encode_visual(model, visual, implementation=config.implementation)
        grids, seconds = visual.grids, visual.seconds
    x = model.embed(tokens, features, grids)
    positions, next_pos = model.positions(tokens, valid, grids, seconds, jnp.zeros(batch, jnp.int32))
    hidden, cache = model.prefill(x, positions, valid, implementation=config.implementation)
    last = jnp.take_along_axis(hidden, (prompts.length + written)[:, None, None] - 1, axis=1)[:, 0]
    return last, cache, next_pos


def _begin(model, prompts: Prompts, assistant_prefix, queue: Queue, row, config, shape: RolloutShape) -> RowState:
    """Returns the state of slots that begin the rows `row` (int32 [R]); keys and values in its caches are not valid."""
    slots = row.shape[0]
    fresh = _empty(model, slots, prompts, config, shape)._replace(row=row)
    mine = rows_prompts(fresh, prompts, config, shape)
    sizes, is_video, counts, length = (
        mine.take(x) for x in (prompts.image_sizes, prompts.is_video, prompts.image_counts, prompts.length)
    )
    written = jnp.sum(assistant_prefix >= 0)
    history = first_history(sizes, counts, is_video, config)

    parser, _ = jax.lax.scan(
        lambda parser, token: (prompts.tables.parser.step(prompts.tables.bytes, parser, token[None]), None),
        prompts.tables.parser.init(1),
        assistant_prefix,
    )
    return fresh._replace(
        max_length=jnp.minimum(config.max_response, config.max_tokens - length),
        tokens=fresh.tokens.at[:, : assistant_prefix.shape[0]].set(
            jnp.maximum(assistant_prefix, 0)[: config.max_response]
        ),
        length=jnp.full(slots, written, jnp.int32),
        status=jnp.full(slots, WRITING, jnp.int32),
        hidden=queue.prefix.of_rows(queue.hidden),
        next_pos=queue.prefix.of_rows(queue.next_pos),
        cache=queue.prefix.continued(fresh.cache),
        parser=jax.tree.map(lambda x: jnp.broadcast_to(x, (slots, *x.shape[1:])), parser),
        history=history,
        num_images=history.length,
    )


def write_output(
    outputs: RowOutput | RowRecord | None, state: RowState, which: jax.Array, shape: RolloutShape
) -> RowOutput | RowRecord | None:
    """Stores the rows in the slots `which` (bool [R]); slots without a row are skipped."""
    if outputs is None:
        return None
    rows = outputs.length.shape[0]
    stored = _rows_of_slots(state._replace(row=jnp.where(which, state.row, rows)), rows, shape)
    return jax.tree.map(stored.put, outputs, outputs.of(state))


def admit(
    queue: Queue, state: RowState, indices: jax.Array, config: RolloutConfig, shape: RolloutShape
) -> tuple[Queue, RowState]:
    """Puts the prompts with `indices` (int32 [K], in the batch) at the end of the queue and removes all rows of the old ones."""
    queue, state = drop(queue, state, indices, config, shape)
    last = jnp.max(jnp.where(queue.order < NOT_WAITING, queue.order, -1))
    order = queue.order.at[indices].set(1 + last + jnp.arange(indices.shape[0], dtype=jnp.int32))
    return queue._replace(order=order, unread=_unread(order, shape)), state


def drop(
    queue: Queue, state: RowState, indices: jax.Array, config: RolloutConfig, shape: RolloutShape
) -> tuple[Queue, RowState]:
    """Removes the prompts with `indices` (int32 [K], in the batch) from the queue, and all their rows."""
    gone = jnp.zeros(queue.order.shape[0], bool).at[indices].set(True)
    of_rows = jnp.repeat(gone, config.group_size)
    order = jnp.where(gone, NOT_WAITING, queue.order)
    current = jnp.take_along_axis(queue.prompt, queue.entry[:, None], axis=1).reshape(shape.shards, -1)
    unbegun = jnp.take_along_axis(gone.reshape(shape.shards, -1), current, axis=1).reshape(-1)
    queue = queue._replace(
        order=order,
        unread=_unread(order, shape),
        left=jnp.where(unbegun, 0, queue.left),
        outputs=None if queue.outputs is None else _select(of_rows, _blank(queue.outputs, shape), queue.outputs),
        members=None
        if queue.members is None
        else jnp.where(gone[:, None], jnp.arange(config.group_size, dtype=jnp.int32), queue.members),
    )
    # Slots forget the old rows, which would otherwise be stored as rows of the new prompt.
    nothing = jnp.full_like(state.row, of_rows.shape[0] // shape.shards)
    free = _blank(state, shape)._replace(row=nothing, status=jnp.full_like(state.status, DONE))
    return queue, _replace_slots(_rows_of_slots(state, of_rows.shape[0], shape).take(of_rows), free, state)


def _rows_of_slots(state: RowState, rows: int, shape: RolloutShape) -> Chunk:
    """Returns the rows in the slots as a chunk of all `rows`."""
    return Chunk(state.row.reshape(shape.shards, -1), rows)


def _blank(rows: Rows, shape: RolloutShape) -> Rows:
    """Returns as many empty rows."""
    count, numbers = rows.calls.status.shape
    return jax.tree.map(jnp.zeros_like, rows)._replace(
        stop=jnp.full(count, -1, jnp.int32), calls=no_calls(count, numbers, shape.views, shape.tools, jnp)
    )


def finished(queue: Queue, state: RowState, config: RolloutConfig, shape: RolloutShape) -> jax.Array:
    """Says which prompts have no row left to write: bool [B]."""
    return jnp.all(_all_rows(queue, state, shape).stop.reshape(-1, config.group_size) >= 0, axis=1)


def _all_rows(queue: Queue, state: RowState, shape: RolloutShape) -> RowOutput | RowRecord:
    """Returns all rows: those in slots, and the stored output of the others.

    Rows are gathered from the slots, not scattered from them, because a gather of each field is one instruction, and a scatter
    compiles to a loop.
    """
    if queue.outputs is None:
        return RowOutput.of(state)
    here = queue.outputs.of(state)
    count, slots = queue.outputs.stop.shape[0], state.row.shape[0]
    local = jnp.arange(slots, dtype=jnp.int32) % (slots // shape.shards)
    slot = _rows_of_slots(state, count, shape).put(jnp.full(count, slots), local)
    fetched = jax.tree.map(Chunk(slot.reshape(shape.shards, -1), slots).take, here)
    return _select(slot < slots, fetched, queue.outputs)


def records(queue: Queue, state: RowState, shape: RolloutShape) -> RowRecord:
    """Returns the records of all rows of a rollout that began with records."""
    rows = _all_rows(queue, state, shape)
    assert isinstance(rows, RowRecord)
    return rows


def finish(
    prompts: Prompts, queue: Queue, state: RowState, config: RolloutConfig, shape: RolloutShape
) -> Trajectories[VisualRecord]:
    """Returns the trajectories of all rows: prompt and response side by side, and all images in order.

    A row that is not done (`stop` -1) has what it has written so far.
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
