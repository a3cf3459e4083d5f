"""The turn machine: the pure functions a rollout is made of.

`decode` adds one token to every row that is writing, `observe` answers every row that waits for pixels, `queue.py` reads
prompts and begins rows. `loop.py` strings them together, `rollout.py` shows the whole.

A row is *writing*, *waiting* (its turn has ended), *asking* (for a tool that runs on the host) or *done*. It shares the cache of
its prompt; what follows lies in the cache of the slot it is written in.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pixel_jax.dialog import automaton
from pixel_jax.dialog.observations import Observations
from pixel_jax.models.decoder import KVCache, Prefix
from pixel_jax.models.model import Model
from pixel_jax.models.rope import mrope_positions
from pixel_jax.rollouts.config import FACTOR, PATCH, RolloutConfig
from pixel_jax.rollouts.drawings import Pictures, drawings
from pixel_jax.rollouts.operations import add_to_history, called, execute
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
from pixel_jax.rollouts.views import show_waiting, visible_buffers
from pixel_jax.tools.looking import ImageHistory, Seen, whole

WRITING, WAITING, ASKING, DONE = range(4)  # below ASKING: the device goes on with the row by itself


class Shared(NamedTuple):
    """What rows read and do not change while they write and are answered."""

    prompts: Prompts
    prefix: Prefix  # prompts and the assistant prefix
    temperature: jax.Array  # float32 [2], of the first turn and of later ones: greedy decoding is the same program
    keys: jax.Array  # keys [R], see `row_keys`
    pictures: Pictures | None = None  # that tools of the host have returned


class RowState(NamedTuple):
    """R rows at one moment, each in a slot of its own. `Lr` is `RolloutConfig.max_response`, N one more than `max_calls`, V
    `RolloutShape.views`.
    """

    row: jax.Array  # int32 [R], which of the rows of its part of the mesh a slot holds; one past the last: none
    room: jax.Array  # int32 [R], tokens that may follow the prompt
    tokens: jax.Array  # int32 [R, Lr], everything after the prompt
    loss_mask: jax.Array  # bool [R, Lr]
    logprobs: jax.Array  # float32 [R, Lr]
    length: jax.Array  # int32 [R]
    turn_start: jax.Array  # int32 [R], where the present turn's own tokens begin
    status: jax.Array  # int32 [R]
    stop: jax.Array  # int32 [R], -1 while not done
    hidden: jax.Array  # [R, D], of the last token
    next_pos: jax.Array  # int32 [R]
    cache: KVCache
    parser: automaton.ParserState
    history: ImageHistory
    num_images: jax.Array  # int32 [R], a video counts as one
    grids: jax.Array  # int32 [R, N - 1, V, 3]
    calls: Calls
    num_calls: jax.Array  # int32 [R]


def rows_prompts(state: RowState, prompts: Prompts, config: RolloutConfig, shape: RolloutShape) -> Chunk:
    """Takes what the prompts have, [B, ...], for the row in every slot, [R, ...]."""
    places = (state.row // config.group_size).reshape(shape.shards, -1)
    last = prompts.length.shape[0] // shape.shards - 1
    return Chunk(jnp.minimum(places, last), prompts.length.shape[0])


def row_keys(
    key: jax.Array, state: RowState, prompts: Prompts, config: RolloutConfig, shape: RolloutShape
) -> jax.Array:
    """The randomness of the rows in the slots, keys [R]: it follows from their prompts' `uid` and their number among its rows."""
    uid = rows_prompts(state, prompts, config, shape).take(prompts.uid)
    of_row = lambda uid, member: jax.random.fold_in(jax.random.fold_in(key, uid), member)
    return jax.vmap(of_row)(uid, state.row % config.group_size)


def append(
    model: Model,
    layers,
    shared: Shared,
    state: RowState,
    ids: jax.Array,
    lengths: jax.Array,
    features=None,
    grids=None,
    *,
    shards: int = 1,
    chunk: int | None = None,
) -> RowState:
    """Every row reads the first `lengths` (int32 [R], may be 0) of its `ids` (int32 [R, T]).

    Images among them are described by `features` [R, V, P//4, D] and `grids` int32 [R, V, 3], in order. With a `chunk`,
    only rows that have something to read are worked on, so many at a time in each of the `shards` that rows are split over.
    """
    rows, width = ids.shape
    valid = jnp.arange(width) < lengths[:, None]
    if features is None:
        x = model.embed(ids)
        grids = jnp.zeros((rows, 1, 3), jnp.int32)
    else:
        x = model.embed(ids, features, grids)
    positions, next_pos = mrope_positions(
        model.is_visual(ids), valid, grids, jnp.zeros(grids.shape[:2], jnp.float32), state.next_pos, model.config
    )
    if chunk is None:
        last, cache = read(model, layers, x, positions, lengths, state.hidden, state.cache, shared.prefix)
    else:

        def body(chunk: Chunk, read_so_far):
            mine = (x, jnp.moveaxis(positions, 0, 1), lengths, *read_so_far, shared.prefix)
            embedded, places, *rest = jax.tree.map(chunk.take, mine)
            return jax.tree.map(
                chunk.put, read_so_far, read(model, layers, embedded, jnp.moveaxis(places, 1, 0), *rest)
            )

        with jax.named_scope("readers"):
            last, cache = for_chunks(lengths > 0, shards, chunk, body, (state.hidden, state.cache))
    room = state.tokens.shape[1]
    slot = jnp.where(valid, state.length[:, None] + jnp.arange(width), room)
    return state._replace(
        tokens=state.tokens.at[jnp.arange(rows)[:, None], slot].set(ids, mode="drop"),
        length=state.length + lengths,
        hidden=last,
        next_pos=next_pos,
        cache=cache,
    )


READ_CHUNK = 32


def read(model: Model, layers, x, positions, lengths, hidden, cache: KVCache, prefix: Prefix):
    """Every row appends the first `lengths` of its embeddings `x` [R, T, D] to its cache: the hidden state of its last
    token (`hidden` [R, D] where there is none) and the cache.

    Taken `READ_CHUNK` tokens at a time for as long as any row has more: there is room for the longest observation, and
    most are a fraction of it.
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
    width = min(READ_CHUNK, x.shape[1])
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
    """Every row that is writing chooses one token and reads it."""
    rows = state.status.shape[0]
    writing = state.status == WRITING
    temperature = jnp.where(state.num_calls > 0, shared.temperature[1], shared.temperature[0])
    keys = jax.vmap(jax.random.fold_in)(shared.keys, state.length)
    logits = model.logits(state.hidden)
    these = lambda ids: jnp.zeros(logits.shape[1], bool).at[jnp.asarray(ids)].set(True)
    early = state.length - state.turn_start < config.min_tokens
    # A placeholder that the policy wrote would take the features of an image shown later.
    banned = these([model.config.image_token_id, model.config.video_token_id])
    banned |= early[:, None] & these(shared.prompts.tables.stop)
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
    full = state.length >= state.room
    long = state.length - state.turn_start >= config.max_new_tokens
    status = jnp.where(ended, WAITING, jnp.where(writing & (full | long), DONE, state.status))
    stop = jnp.where(writing & ~ended & (full | long), jnp.where(long, STOP_TURN_LENGTH, STOP_TOKENS), state.stop)
    return state._replace(status=status, stop=stop)


def decode_while(condition: Callable[[RowState], jax.Array], state: RowState, decode_one, left: jax.Array | None):
    """Tokens are decoded while the condition holds and some are `left` (int32 []; None: as many as it takes)."""
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
    """Rows write until enough of them have ended their turns.

    Args:
      takes: of a state the slots that could be given rows, bool [R].
      left: int32 [], tokens that may be decoded at most; None: as many as it takes.

    Returns:
      The state, how many tokens are left, and bool []: there were too few, it is to be called again before anything else.
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
    """The rows that are writing, `config.tail_rows` of each shard at most, end their turns, `left` as in `decode_turns`.

    They are copied together, caches and prompts too, and put back at the end: turns differ in length, and where products bind
    decoding, a token of few rows takes little (a CPU with 8 layers: 14 ms for 16 rows, 38 for 64).
    """
    rows = state.status.shape[0]
    busy = (state.status == WRITING).reshape(shape.shards, -1)
    tail = Chunk(jnp.argsort(~busy, axis=1)[:, : config.tail_rows], rows)
    # Decoding leaves alone what operations do.
    others = {"grids": None, "calls": None, "history": None, "num_images": None}
    mine = state._replace(**others)
    few, prefix, keys = jax.tree.map(tail.take, (mine, shared.prefix, jax.random.key_data(shared.keys)))
    keys = jax.random.wrap_key_data(keys, impl=jax.random.key_impl(shared.keys))
    shared = shared._replace(prefix=prefix, keys=keys)
    writing = lambda few: jnp.any(few.status == WRITING)
    with jax.named_scope("tail"):
        few, left = decode_while(writing, few, lambda few: decode(model, layers, shared, few, config), left)
    done = jax.tree.map(tail.put, mine, few)
    return done._replace(**{name: getattr(state, name) for name in others}), left


def observe(
    model: Model, layers, shared: Shared, state: RowState, config: RolloutConfig, shape: RolloutShape
) -> RowState:
    """Every row that waits gets what it asked for, a message that says why not, or its end; or the host is to answer it."""
    prompts = shared.prompts
    mine = rows_prompts(state, prompts, config, shape)
    call = prompts.tables.parser.finish(state.parser)
    waiting = state.status == WAITING
    if hosts := [place for place, tool in enumerate(shape.tools) if tool.host]:
        asking = waiting & call.required & jnp.isin(call.tool, jnp.array(hosts)) & (state.num_calls < config.max_calls)
        waiting &= ~asking
        state = state._replace(status=jnp.where(asking, ASKING, state.status))
    asks = waiting & call.required
    spent = asks & (state.num_calls >= config.max_calls)
    seen = Seen(state.history, *(mine.take(x) for x in (prompts.is_video, prompts.image_sizes, prompts.image_counts)))
    result = execute(call, seen, prompts.tables, shape.views, config)
    crowded = asks & ~spent & (state.num_images + result.count > config.max_images)
    ids, lengths = prompts.tables.observations.assemble(
        result.message, observation_width(prompts.tables.observations, config, shape)
    )
    long = asks & ~spent & ~crowded & (state.length + lengths >= state.room)
    run = asks & ~spent & ~crowded & ~long

    done = called(call, result, run, shape.tools)
    answers = Answers(asks, run, done, result.count, jnp.where(run, lengths, 0), ids)
    state = answer(model, layers, shared, state, answers, config, shape)
    state = take_back(state, crowded, config)
    stop = jnp.select(
        [waiting & ~call.required, spent, crowded, long],
        [STOP_ANSWER, STOP_CALLS, STOP_IMAGES, STOP_TOKENS],
        state.stop,
    )
    state = state._replace(stop=stop, status=jnp.where(waiting, DONE, state.status))
    return resume(state, run, shared.prompts.tables.parser)


class Answers(NamedTuple):
    """What the calls of R rows came to."""

    asks: jax.Array  # bool [R], rows that called
    run: jax.Array  # bool [R], of these, whose calls are carried out; one past the limit is counted alone
    done: Calls  # [R, ...], as they go on record
    count: jax.Array  # int32 [R], pictures they show
    lengths: jax.Array  # int32 [R], of `ids`; zero where nothing is read
    ids: jax.Array  # int32 [R, T], what rows read


def answer(
    model: Model,
    layers,
    shared: Shared,
    state: RowState,
    answers: Answers,
    config: RolloutConfig,
    shape: RolloutShape,
) -> RowState:
    """The answers go on record, and the rows read them: ids, and the pictures among them."""
    asks, run, done, count, lengths, ids = answers
    row, number = jnp.arange(state.status.shape[0]), state.num_calls
    at = (row, jnp.where(asks, number, config.max_calls + 1))
    calls = jax.tree.map(lambda record, x: record.at[at].set(x, mode="drop"), state.calls, done)
    view, showing = shown_by(done, number), run & (count > 0)
    _, features = show_waiting(
        model,
        visible_buffers(shared.prompts.buffers, config, shared.pictures),
        rows_prompts(state, shared.prompts, config, shape).at.reshape(-1),
        view,
        showing,
        drawings(calls, shape.tools, config),
        config,
        shape,
        shared.pictures,
    )
    grids = jnp.concatenate([(view.size[..., :1] > 0).astype(jnp.int32), view.size // PATCH], axis=-1)

    shown = jnp.where(showing, number, config.max_calls)
    state = state._replace(
        calls=calls,
        num_calls=number + asks,
        history=add_to_history(state.history, done, number),
        num_images=state.num_images + jnp.where(run, count, 0),
        grids=state.grids.at[row, shown].set(grids, mode="drop"),
    )
    chunks = {"shards": shape.shards, "chunk": config.observe_chunk}
    return append(model, layers, shared, state, ids, lengths, features, grids, **chunks)


def take_back(state: RowState, crowded: jax.Array, config: RolloutConfig) -> RowState:
    """The rows `crowded` (bool [R]) without their last message: an image history that is over-full ends a row, as in the
    released code.
    """
    return state._replace(
        length=jnp.where(crowded, state.turn_start, state.length),
        loss_mask=state.loss_mask
        & ~(crowded[:, None] & (jnp.arange(config.max_response) >= state.turn_start[:, None])),
    )


class Told(NamedTuple):
    """What tools of the host have answered to R rows; a length of zero: nothing."""

    ids: jax.Array  # int32 [R, T]
    lengths: jax.Array  # int32 [R]
    outcome: jax.Array  # int32 [R], its place among the kinds of observation
    status: jax.Array  # int32 [R], a `CallStatus`
    drawn: jax.Array  # int32 [R, 2], (height, width) of the picture that was returned; zeros: none was
    size: jax.Array  # int32 [R, 2], (height, width) at which it is shown
    picture: jax.Array | None  # uint32 [R, 8], its digest; None: no tool returns any


def tell(
    model: Model, layers, shared: Shared, state: RowState, told: Told, config: RolloutConfig, shape: RolloutShape
) -> RowState:
    """The rows whose calls tools of the host have answered read that and go on writing. An answer that has no room ends its
    row, and so does a picture too many.
    """
    answered, count = told.lengths > 0, (told.drawn[:, 0] > 0).astype(jnp.int32)
    crowded = answered & (state.num_images + count > config.max_images)
    long = answered & ~crowded & (state.length + told.lengths >= state.room)
    run = answered & ~crowded & ~long
    showing = run & (count > 0)
    call = shared.prompts.tables.parser.finish(state.parser)
    where = lambda which, x, blank: jnp.where(which.reshape(-1, *[1] * (x.ndim - 1)), x, blank)
    first = showing[:, None] & (jnp.arange(shape.views) == 0)  # a call returns one picture at most
    spread = lambda x: jnp.where(first[..., None], x[:, None], 0)
    done = Calls(
        status=where(run, told.status, CallStatus.SPENT).astype(jnp.int32),
        tool=call.tool,
        outcome=where(run, told.outcome, -1),
        values=call.values,
        source=Views(
            jnp.where(first, made_by(state.num_calls)[:, None], NO_IMAGE),
            spread(whole(told.drawn)),
            spread(told.size),
        ),
        drawn=where(showing, told.drawn, 0),
        picture=None if told.picture is None else where(showing, told.picture, 0),
    )
    lengths = jnp.where(run, told.lengths, 0)
    answers = Answers(answered, run, done, count, lengths, told.ids)
    state = answer(model, layers, shared, state, answers, config, shape)
    state = take_back(state, crowded, config)
    state = state._replace(
        status=jnp.where(crowded | long, DONE, state.status),
        stop=jnp.select([crowded, long], [STOP_IMAGES, STOP_TOKENS], state.stop),
    )
    return resume(state, run, shared.prompts.tables.parser)


def writes_on(state: RowState, takes: jax.Array, config: RolloutConfig, shape: RolloutShape) -> jax.Array:
    """Whether to decode another token before those that wait are answered and free slots (`takes`, bool [R]) are given rows.

    Turns differ in length: as soon as some rows wait (on one shard), they are answered while the others are in the middle
    of theirs. What that costs apart from the answers is paid by all rows, so it is not done for each one. With
    `config.tail_rows` waiting costs nothing: all end their turns, the last of them by `decode_tail`.
    """
    local = state.status.shape[0] // shape.shards
    if config.tail_rows is not None:
        return fullest(state.status == WRITING, shape.shards) > min(config.tail_rows, local - 1)
    enough = min(local, max(config.observe_chunk, local // 4))
    idle = (state.status == WAITING) | takes
    return jnp.any(state.status == WRITING) & (fullest(idle, shape.shards) < enough)


def resume(state: RowState, run: jax.Array, parser: automaton.CallParser) -> RowState:
    """The rows `run` (bool [R]) begin a new turn."""
    fresh = parser.init(run.shape[0])
    return state._replace(
        status=jnp.where(run, WRITING, state.status),
        turn_start=jnp.where(run, state.length, state.turn_start),
        parser=jax.tree.map(
            lambda new, old: jnp.where(run.reshape(-1, *[1] * (old.ndim - 1)), new, old), fresh, state.parser
        ),
    )


def observation_width(observations: Observations, config: RolloutConfig, shape: RolloutShape) -> int:
    """Room for the longest observation, in tokens."""
    pads = [
        budget_of(kind.tool, config) // FACTOR**2 if kind.tool in shape.showing else 0 for kind in observations.kinds
    ]
    return observations.bound(pads, shape.views)
