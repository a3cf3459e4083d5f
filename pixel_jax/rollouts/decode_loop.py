"""The decode loop: pure functions in which rows write tokens and are answered.

`decode` adds one token to every row that is writing; `observe` carries out the calls of rows that wait; `queue.py` reads prompts
and begins rows. `loop.py` composes them, and `rollout.py` describes the whole.

A row is *writing*, *waiting* (its turn has ended), *asking* (a host tool) or *done*. The rows of a prompt share the cache of the
prompt; each slot has a cache for the tokens behind it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.arrays import AnyArray
from pixel_jax.dialog.call_parser import CallParser, ParserState
from pixel_jax.dialog.observations import Observations
from pixel_jax.models.decoder import KVCache, Prefix
from pixel_jax.models.model import Model
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.drawings import ReturnedPictures, drawings
from pixel_jax.rollouts.operations import add_to_history, execute, record_calls
from pixel_jax.rollouts.rows import Chunk, for_chunks, fullest
from pixel_jax.rollouts.sampling import sample
from pixel_jax.rollouts.shapes import RolloutShape, budget_of
from pixel_jax.rollouts.trajectory import (
    NO_IMAGE,
    STOP_ANSWER,
    STOP_CALLS,
    STOP_IMAGES,
    STOP_TOKENS,
    STOP_TURN_LENGTH,
    Calls,
    CallStatus,
    Prompts,
    Views,
    made_by,
    shown_by,
)
from pixel_jax.rollouts.views import features_if_any, show, visible_buffers
from pixel_jax.tools.device import ImageHistory, Seen, whole

WRITING, WAITING, ASKING, DONE = range(4)  # below ASKING, the device can go on with the row

# Tokens of a row that are computed at a time: of an observation, and of what a row without a cache reads again.
READ_CHUNK, REREAD_CHUNK = 32, 128


class Shared(NamedTuple):
    """The values that decoding and observing read but do not change."""

    prompts: Prompts
    prefix: Prefix  # the cache of prompts and assistant prefix
    temperature: jax.Array  # float32 [R, 2], of the first turn and of later ones
    keys: jax.Array  # keys [R], see `row_keys`
    pictures: ReturnedPictures | None = None  # of host tools


class RowState(NamedTuple):
    """The state of R slots, each with one row.

    `Lr` is `RolloutConfig.max_response`, N is one more than `max_calls`, V is `RolloutShape.views`.
    """

    row: jax.Array  # int32 [R], index of the slot's row in its data shard; one past the last: none
    max_length: jax.Array  # int32 [R], tokens that may follow the prompt
    tokens: jax.Array  # int32 [R, Lr], everything behind the prompt
    loss_mask: jax.Array  # bool [R, Lr]
    logprobs: jax.Array  # float32 [R, Lr]
    length: jax.Array  # int32 [R]
    turn_start: jax.Array  # int32 [R], index of the first token of the current turn
    status: jax.Array  # int32 [R]
    stop: jax.Array  # int32 [R], -1 while not done
    hidden: jax.Array  # [R, D], of the last token
    next_pos: jax.Array  # int32 [R]
    cache: KVCache
    parser: ParserState
    history: ImageHistory
    num_images: jax.Array  # int32 [R], a video counts as one
    grids: jax.Array  # int32 [R, N - 1, V, 3]
    calls: Calls
    num_calls: jax.Array  # int32 [R]


def rows_prompts(state: RowState, prompts: Prompts, config: RolloutConfig, shape: RolloutShape) -> Chunk:
    """Returns a chunk that takes the prompt of every slot's row: [B, ...] -> [R, ...]."""
    indices = (state.row // config.group_size).reshape(shape.shards, -1)
    last = prompts.length.shape[0] // shape.shards - 1
    return Chunk(jnp.minimum(indices, last), prompts.length.shape[0])


def row_keys(
    key: jax.Array, state: RowState, prompts: Prompts, config: RolloutConfig, shape: RolloutShape
) -> jax.Array:
    """Returns the random keys [R] of the rows, which follow from the `uid` of their prompt and their index in its group."""
    uid = rows_prompts(state, prompts, config, shape).take(prompts.uid)
    of_row = lambda uid, member: functools.reduce(jax.random.fold_in, [*uid.reshape(-1), member], key)
    return jax.vmap(of_row)(uid, state.row % config.group_size)


def append(
    model: Model,
    layers,
    shared: Shared,
    state: RowState,
    ids: jax.Array,
    lengths: jax.Array,
    images: tuple[jax.Array, jax.Array] | None = None,
    *,
    piece: int = READ_CHUNK,
) -> RowState:
    """Appends ids to the rows, which read them into their caches.

    Args:
      model: that reads them.
      layers: its decoder layers, unstacked.
      shared: prefixes of the rows.
      state: of R rows.
      ids: int32 [R, T].
      lengths: int32 [R], how many of its ids a row reads; may be 0.
      images: features [R, V, P//4, D] and grids int32 [R, V, 3] of the images among the ids, in order; None: there are none.
      piece: how many tokens of each row to compute at a time.
    """
    rows, width = ids.shape
    valid = jnp.arange(width) < lengths[:, None]
    if images is None:
        x = model.embed(ids)
        grids = jnp.zeros((rows, 1, 3), jnp.int32)
    else:
        features, grids = images
        x = model.embed(ids, features, grids)
    positions, next_pos = model.positions(ids, valid, grids, jnp.zeros(grids.shape[:2], jnp.float32), state.next_pos)
    last, cache = read(model, layers, x, positions, lengths, state.hidden, state.cache, shared.prefix, most=piece)
    position = jnp.where(valid, state.length[:, None] + jnp.arange(width), state.tokens.shape[1])
    return state._replace(
        tokens=state.tokens.at[jnp.arange(rows)[:, None], position].set(ids, mode="drop"),
        length=state.length + lengths,
        hidden=last,
        next_pos=next_pos,
        cache=cache,
    )


def read(model: Model, layers, x, positions, lengths, hidden, cache: KVCache, prefix: Prefix, *, most: int):
    """Appends the first `lengths` (int32 [R]) of the embeddings `x` [R, T, D] to the caches of the rows.

    It computes `most` tokens at a time for as long as any row has more, because T is that of the longest possible
    observation, and most are much shorter.

    Returns:
      The hidden state [R, D] of the last token of each row (`hidden` for rows that read nothing), and the cache.
    """

    def piece(start, width, hidden, cache):
        index = start + jnp.arange(width)
        out, cache = model.step(
            layers,
            jax.lax.dynamic_slice_in_dim(x, start, width, axis=1),
            jax.lax.dynamic_slice_in_dim(positions, start, width, axis=2),
            index < lengths[:, None],
            cache,
            prefix,
        )
        last = lengths - 1 - start
        here = (last >= 0) & (last < width)
        out = jnp.take_along_axis(out, jnp.clip(last, 0, width - 1)[:, None, None], axis=1)[:, 0]
        return jnp.where(here[:, None], out, hidden), cache

    if x.shape[1] == 1:
        return piece(0, 1, hidden, cache)
    width = min(most, x.shape[1])
    spare = -x.shape[1] % width
    x, positions = jnp.pad(x, ((0, 0), (0, spare), (0, 0))), jnp.pad(positions, ((0, 0), (0, 0), (0, spare)))
    longest = jnp.max(lengths)
    with jax.named_scope("pieces"):
        _, hidden, cache = jax.lax.while_loop(
            lambda carry: carry[0] < longest,
            lambda carry: (carry[0] + width, *piece(carry[0], width, *carry[1:])),
            (jnp.int32(0), hidden, cache),
        )
    return hidden, cache


def decode(model: Model, layers, shared: Shared, state: RowState, config: RolloutConfig) -> RowState:
    """Lets every row that is writing choose one token and read it."""
    rows = state.status.shape[0]
    writing = state.status == WRITING
    temperature = jnp.where(state.num_calls > 0, shared.temperature[:, 1], shared.temperature[:, 0])
    keys = jax.vmap(jax.random.fold_in)(shared.keys, state.length)
    logits = model.logits(state.hidden)

    def mask_of(ids) -> jax.Array:
        return jnp.zeros(logits.shape[1], bool).at[jnp.asarray(ids)].set(True)

    early = state.length - state.turn_start < config.min_tokens
    # If the policy wrote a pad token, it would be replaced by the features of a later image.
    banned = mask_of(np.array(model.config.visual_tokens, np.int32))
    banned |= early[:, None] & mask_of(shared.prompts.tables.stop)
    token, logprob = sample(
        logits,
        keys,
        temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        banned=banned,
    )
    at = (jnp.arange(rows), jnp.where(writing, state.length, state.tokens.shape[1]))
    tables = shared.prompts.tables
    parser = tables.parser.step(tables.bytes, state.parser, jnp.where(writing, token, -1))
    state = state._replace(
        loss_mask=state.loss_mask.at[at].set(True, mode="drop"),
        logprobs=state.logprobs.at[at].set(logprob, mode="drop"),
        parser=parser,
    )
    state = append(model, layers, shared, state, token[:, None], writing.astype(jnp.int32))

    ended = writing & jnp.any(token[:, None] == shared.prompts.tables.stop, axis=1)
    full = state.length >= state.max_length
    long = state.length - state.turn_start >= config.max_new_tokens
    status = jnp.where(ended, WAITING, jnp.where(writing & (full | long), DONE, state.status))
    stop = jnp.where(writing & ~ended & (full | long), jnp.where(long, STOP_TURN_LENGTH, STOP_TOKENS), state.stop)
    return state._replace(status=status, stop=stop)


def decode_while(
    condition: Callable[[RowState], jax.Array],
    state: RowState,
    decode_one: Callable[[RowState], RowState],
    left: jax.Array | None,
) -> tuple[RowState, jax.Array | None]:
    """Decodes tokens while the condition holds and some are `left` (int32 []; None: no limit)."""
    if left is None:
        return jax.lax.while_loop(condition, decode_one, state), None
    return jax.lax.while_loop(
        lambda carry: condition(carry[0]) & (carry[1] > 0),
        lambda carry: (decode_one(carry[0]), carry[1] - 1),
        (state, left),
    )


def decode_turns(
    model: Model,
    layers,
    shared: Shared,
    state: RowState,
    takes: Callable[[RowState], jax.Array],
    left: jax.Array | None,
    config: RolloutConfig,
    shape: RolloutShape,
) -> tuple[RowState, jax.Array | None, jax.Array]:
    """Lets rows write until enough of them have ended their turns.

    Args:
      model: that writes.
      layers: its decoder layers, unstacked.
      shared: the values that are not changed.
      state: of R rows.
      takes: from a state to bool [R], the slots that could take new rows.
      left: int32 [], the most tokens to decode; None: no limit.
      config: of the rollout.
      shape: of the rollout.

    Returns:
      The state, the tokens that are left, and bool []: whether they ran out, so that decoding must go on before anything else.
    """
    condition = lambda state: writes_on(state, takes(state), config, shape)
    with jax.named_scope("tokens"):
        decode_one = lambda state: decode(model, layers, shared, state, config)
        state, left = decode_while(condition, state, decode_one, left)
    if config.tail_rows is not None:
        state, left = decode_tail(model, layers, shared, state, left, config, shape)
        condition = lambda state: jnp.any(state.status == WRITING)
    return state, left, jnp.bool_(False) if left is None else condition(state)


def decode_tail(
    model: Model,
    layers,
    shared: Shared,
    state: RowState,
    left: jax.Array | None,
    config: RolloutConfig,
    shape: RolloutShape,
) -> tuple[RowState, jax.Array | None]:
    """Lets the rows that are writing, at most `config.tail_rows` of each shard, end their turns; `left` as in `decode_turns`.

    They are copied into a smaller batch, with their caches and prefixes, and back at the end. Turns differ in length, and where
    decoding is bound by computation, a token of few rows takes less time.
    """
    rows = state.status.shape[0]
    busy = (state.status == WRITING).reshape(shape.shards, -1)
    tail = Chunk(jnp.argsort(~busy, axis=1)[:, : config.tail_rows], rows)
    # Decoding does not change these.
    others = {"grids": None, "calls": None, "history": None, "num_images": None}
    mine = state._replace(**others)
    taken = (mine, shared.prefix, shared.temperature, jax.random.key_data(shared.keys))
    few, prefix, temperature, keys = jax.tree.map(tail.take, taken)
    keys = jax.random.wrap_key_data(keys, impl=jax.random.key_impl(shared.keys))
    shared = shared._replace(prefix=prefix, temperature=temperature, keys=keys)
    writing = lambda few: jnp.any(few.status == WRITING)
    decode_one = lambda few: decode(model, layers, shared, few, config)
    with jax.named_scope("tail"):
        few, left = decode_while(writing, few, decode_one, left)
    done = jax.tree.map(tail.put, mine, few)
    return done._replace(**{name: getattr(state, name) for name in others}), left


def observe(
    model: Model, layers, shared: Shared, state: RowState, config: RolloutConfig, shape: RolloutShape
) -> RowState:
    """Answers every row that waits, with a result or an error, or ends it; calls of host tools are left to the host."""
    prompts = shared.prompts
    mine = rows_prompts(state, prompts, config, shape)
    call = prompts.tables.parser.finish(state.parser)
    waiting = state.status == WAITING
    if hosts := [index for index, tool in enumerate(shape.tools) if tool.host]:
        asking = waiting & call.required & jnp.isin(call.tool, jnp.array(hosts)) & (state.num_calls < config.max_calls)
        waiting &= ~asking
        state = state._replace(status=jnp.where(asking, ASKING, state.status))
    asks = waiting & call.required
    spent = asks & (state.num_calls >= config.max_calls)
    seen = Seen(state.history, *(mine.take(x) for x in (prompts.is_video, prompts.image_sizes, prompts.image_counts)))
    result = execute(call, seen, prompts.tables, shape.views, config)
    crowded = asks & ~spent & (state.num_images + result.num_images > config.max_images)
    ids, lengths = prompts.tables.observations.assemble(
        result.message, observation_width(prompts.tables.observations, config, shape)
    )
    long = asks & ~spent & ~crowded & (state.length + lengths >= state.max_length)
    run = asks & ~spent & ~crowded & ~long

    done = record_calls(call, result, run, shape.tools)
    answers = RowAnswers(asks, run, done, result.num_images, jnp.where(run, lengths, 0), ids)
    state = answer(model, layers, shared, state, answers, config, shape)
    state = drop_last_turn(state, crowded, config)
    stop = jnp.select(
        [waiting & ~call.required, spent, crowded, long],
        [STOP_ANSWER, STOP_CALLS, STOP_IMAGES, STOP_TOKENS],
        state.stop,
    )
    state = state._replace(stop=stop, status=jnp.where(waiting, DONE, state.status))
    return resume(state, run, shared.prompts.tables.parser)


class RowAnswers(NamedTuple):
    """The answers to the calls of R rows."""

    asks: jax.Array  # bool [R], rows that called
    run: jax.Array  # bool [R], those of them whose calls are carried out; calls past the limit are only counted
    done: Calls  # [R, ...], for the record
    num_images: jax.Array  # int32 [R], images that they show
    lengths: jax.Array  # int32 [R], of `ids`; zero where nothing is read
    ids: jax.Array  # int32 [R, T], the observations


def answer(
    model: Model,
    layers,
    shared: Shared,
    state: RowState,
    answers: RowAnswers,
    config: RolloutConfig,
    shape: RolloutShape,
) -> RowState:
    """Records the answers and lets the rows read them: ids, and the images among them."""
    asks, run, done, count, lengths, ids = answers
    row, number = jnp.arange(state.status.shape[0]), state.num_calls
    at = (row, jnp.where(asks, number, config.max_calls + 1))
    calls = jax.tree.map(lambda record, x: record.at[at].set(x, mode="drop"), state.calls, done)
    view, showing = shown_by(done, number), run & (count > 0)
    grids = view_grids(view, config)
    shown = jnp.where(showing, number, config.max_calls)
    state = state._replace(
        calls=calls,
        num_calls=number + asks,
        history=add_to_history(state.history, done, number),
        num_images=state.num_images + jnp.where(run, count, 0),
        grids=state.grids.at[row, shown].set(grids, mode="drop"),
    )
    buffers = visible_buffers(shared.prompts.buffers, config, shared.pictures)
    prompt = rows_prompts(state, shared.prompts, config, shape).at.reshape(-1)
    rows = (ids, lengths, view, grids, showing, calls, prompt, shared.prefix)

    # Pixels and features exist for a few rows at a time: those of all rows would take as much memory as a tenth of their caches.
    def body(chunk: Chunk, read_so_far: RowState) -> RowState:
        mine, few = jax.tree.map(chunk.take, (rows, read_so_far))
        ids, lengths, view, grids, showing, calls, prompt, prefix = mine
        images = None
        if model.config.vision is not None:
            drawn = drawings(calls, shape.tools, config)
            shown = functools.partial(show, model, buffers, prompt, view, drawn, config, shape, shared.pictures)
            features = features_if_any(showing, lambda: shown()[1])
            images = features, grids
        few = append(model, layers, shared._replace(prefix=prefix), few, ids, lengths, images)
        return jax.tree.map(chunk.put, read_so_far, few)

    urgency = (lengths > 0).astype(jnp.int32) + showing  # rows with images first: few chunks need the vision tower
    with jax.named_scope("readers"):
        read_rows = for_chunks(urgency, shape.shards, config.observe_chunk, body, only_read(state))
    return state._replace(**{name: getattr(read_rows, name) for name in READ_FIELDS})


READ_FIELDS = ("tokens", "length", "hidden", "next_pos", "cache")  # of a `RowState`: what `append` reads and changes


def only_read(state: RowState) -> RowState:
    """Returns the state with nothing but `READ_FIELDS`."""
    return state._replace(**{name: None for name in RowState._fields if name not in READ_FIELDS})


def view_grids(view: Views, config: RolloutConfig) -> jax.Array:
    """Returns the grids of views [..., V], in patches: int32 [..., V, 3], zeros for no view."""
    return jnp.concatenate([(view.size[..., :1] > 0).astype(jnp.int32), view.size // config.patch_size], axis=-1)


def drop_last_turn(state: RowState, crowded: jax.Array, config: RolloutConfig) -> RowState:
    """Removes the last turn of the rows `crowded` (bool [R]), whose calls would show too many images, as in the released code."""
    return state._replace(
        length=jnp.where(crowded, state.turn_start, state.length),
        loss_mask=state.loss_mask
        & ~(crowded[:, None] & (jnp.arange(config.max_response) >= state.turn_start[:, None])),
    )


class HostAnswers(NamedTuple):
    """The answers of host tools to R rows, for the device."""

    ids: AnyArray  # int32 [R, T], the observations
    lengths: AnyArray  # int32 [R], of `ids`; zero for rows without an answer
    outcome: AnyArray  # int32 [R], index of the kind of observation
    status: AnyArray  # int32 [R], a `CallStatus`
    drawn: AnyArray  # int32 [R, 2], (height, width) of the picture that was returned; zeros: none
    size: AnyArray  # int32 [R, 2], (height, width) at which it is shown
    picture: AnyArray | None  # uint32 [R, 8], its digest; None: no tool returns any


def answer_host_calls(
    model: Model,
    layers,
    shared: Shared,
    state: RowState,
    replies: HostAnswers,
    config: RolloutConfig,
    shape: RolloutShape,
) -> RowState:
    """Lets rows read the answers of host tools and go on writing. An answer beyond a limit of tokens or images ends its row."""
    arrays = jax.tree.map(jnp.asarray, replies)
    answered, count = arrays.lengths > 0, (arrays.drawn[:, 0] > 0).astype(jnp.int32)
    crowded = answered & (state.num_images + count > config.max_images)
    long = answered & ~crowded & (state.length + arrays.lengths >= state.max_length)
    run = answered & ~crowded & ~long
    showing = run & (count > 0)
    call = shared.prompts.tables.parser.finish(state.parser)
    first = showing[:, None] & (jnp.arange(shape.views) == 0)  # a call returns one picture at most
    spread = lambda x: jnp.where(first[..., None], x[:, None], 0)
    done = Calls(
        status=jnp.where(run, arrays.status, CallStatus.SPENT).astype(jnp.int32),
        tool=call.tool,
        outcome=jnp.where(run, arrays.outcome, -1),
        values=call.values,
        source=Views(
            jnp.where(first, made_by(state.num_calls)[:, None], NO_IMAGE),
            spread(whole(arrays.drawn)),
            spread(arrays.size),
        ),
        drawn=jnp.where(showing[:, None], arrays.drawn, 0),
        picture=None if arrays.picture is None else jnp.where(showing[:, None], arrays.picture, 0),
    )
    lengths = jnp.where(run, arrays.lengths, 0)
    answers = RowAnswers(answered, run, done, count, lengths, arrays.ids)
    state = answer(model, layers, shared, state, answers, config, shape)
    state = drop_last_turn(state, crowded, config)
    state = state._replace(
        status=jnp.where(crowded | long, DONE, state.status),
        stop=jnp.select([crowded, long], [STOP_IMAGES, STOP_TOKENS], state.stop),
    )
    return resume(state, run, shared.prompts.tables.parser)


def writes_on(state: RowState, takes: jax.Array, config: RolloutConfig, shape: RolloutShape) -> jax.Array:
    """Whether to decode another token before rows that wait are answered and free slots (`takes`, bool [R]) get new rows.

    Turns differ in length. Once enough rows of one shard wait, they are answered while the others are in the middle of their
    turns. They are not answered one by one, because no row writes meanwhile. With `config.tail_rows` all rows end their turns
    first, the last of them in `decode_tail`.
    """
    local = state.status.shape[0] // shape.shards
    if config.tail_rows is not None:
        return fullest(state.status == WRITING, shape.shards) > min(config.tail_rows, local - 1)
    enough = min(local, max(config.observe_chunk, local // 4))
    idle = (state.status == WAITING) | takes
    return jnp.any(state.status == WRITING) & (fullest(idle, shape.shards) < enough)


def settle(state: RowState, parser: CallParser) -> RowState:
    """Ends the rows whose turns have ended without a call, as `observe` would, so that they need not be observed."""
    answered = (state.status == WAITING) & ~parser.finish(state.parser).required
    return state._replace(
        status=jnp.where(answered, DONE, state.status), stop=jnp.where(answered, STOP_ANSWER, state.stop)
    )


def turn_numbers(loss_mask: jax.Array) -> jax.Array:
    """Numbers the tokens of rows by their turns: bool [R, L] -> int32 [R, L].

    An observation belongs to the turn that it answers, a prefix to the first turn.
    """
    begins = loss_mask & ~jnp.pad(loss_mask[:, :-1], ((0, 0), (1, 0)))
    return jnp.maximum(jnp.cumsum(begins, axis=1, dtype=jnp.int32) - 1, 0)


def unread(state: RowState, assistant_prefix: jax.Array) -> jax.Array:
    """Says which rows have tokens that their caches lack, because they were begun in an earlier call: bool [R]."""
    return state.cache.length < state.length - jnp.sum(assistant_prefix >= 0)


def reread(
    model: Model,
    layers,
    shared: Shared,
    state: RowState,
    assistant_prefix: jax.Array,
    config: RolloutConfig,
    shape: RolloutShape,
) -> RowState:
    """Lets rows whose caches are empty (`unread`) read what they wrote and were shown before.

    It goes turn by turn, with the images of the turn's call, for `config.observe_chunk` rows of each shard at a time.
    """
    width, prefix = state.tokens.shape[1], jnp.sum(assistant_prefix >= 0, dtype=jnp.int32)
    buffers = visible_buffers(shared.prompts.buffers, config, shared.pictures)
    prompt = rows_prompts(state, shared.prompts, config, shape).at.reshape(-1)
    lacking = unread(state, assistant_prefix)
    rows = (state.tokens, turn_numbers(state.loss_mask), state.length, state.calls, prompt, lacking, shared.prefix)

    def body(chunk: Chunk, read_so_far):
        mine = jax.tree.map(chunk.take, (*rows, *read_so_far))
        tokens, turn, length, calls, prompt, lacking, prefixes, hidden, next_pos, cache = mine
        drawn = drawings(calls, shape.tools, config)

        def read_turn(number, few: RowState) -> RowState:
            position = few.length[:, None] + jnp.arange(width)
            at = jnp.minimum(position, width - 1)
            here = (jnp.take_along_axis(turn, at, axis=1) == number) & (position < length[:, None]) & lacking[:, None]
            images = None
            if model.config.vision is not None:
                view = shown_by(jax.tree.map(lambda x: x[:, number], calls), number)
                showing = lacking & jnp.any(view.image != NO_IMAGE, axis=1)
                shown = functools.partial(show, model, buffers, prompt, view, drawn, config, shape, shared.pictures)
                features = features_if_any(showing, lambda: shown()[1])
                images = features, view_grids(view, config)
            ids = jnp.take_along_axis(tokens, at, axis=1)
            counts = jnp.sum(here, axis=1, dtype=jnp.int32)
            return append(model, layers, shared._replace(prefix=prefixes), few, ids, counts, images, piece=REREAD_CHUNK)

        few = state._replace(**dict.fromkeys(RowState._fields))._replace(
            tokens=tokens, length=jnp.full_like(length, prefix), hidden=hidden, next_pos=next_pos, cache=cache
        )
        few = jax.lax.fori_loop(0, jnp.max(turn) + 1, read_turn, few)
        return jax.tree.map(chunk.put, read_so_far, (few.hidden, few.next_pos, few.cache))

    with jax.named_scope("reread"):
        empty = (state.hidden, state.next_pos, state.cache)
        hidden, next_pos, cache = for_chunks(lacking, shape.shards, config.observe_chunk, body, empty)
    return state._replace(hidden=hidden, next_pos=next_pos, cache=cache)


def resume(state: RowState, run: jax.Array, parser: CallParser) -> RowState:
    """Begins a new turn in the rows `run` (bool [R])."""
    fresh = parser.init(run.shape[0])
    return state._replace(
        status=jnp.where(run, WRITING, state.status),
        turn_start=jnp.where(run, state.length, state.turn_start),
        parser=jax.tree.map(
            lambda new, old: jnp.where(run.reshape(-1, *[1] * (old.ndim - 1)), new, old), fresh, state.parser
        ),
    )


def observation_width(observations: Observations, config: RolloutConfig, shape: RolloutShape) -> int:
    """Returns the number of tokens of the longest possible observation."""
    pads = [
        budget_of(kind.tool, config) // config.factor**2 if kind.tool in shape.showing else 0
        for kind in observations.kinds
    ]
    return observations.bound(pads, shape.views)
