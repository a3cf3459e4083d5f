"""The turn machine: the pure functions a rollout is made of.

`start` reads the prompts, `decode` adds one token to every row that is writing, `observe` answers every row that waits
for pixels. `rollout.py` strings them together, in one compiled program or one by one from the host.

A row is *writing*, *waiting* (its turn has ended) or *done*. Rows share the cache of their prompt; what follows lies in a
cache of the row's own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pixel_jax.dialog import automaton
from pixel_jax.dialog.observations import Observations
from pixel_jax.models.decoder import KVCache
from pixel_jax.models.inputs import Visual
from pixel_jax.models.qwen2_5_vl import Qwen2_5_VL, encode_visual
from pixel_jax.models.rope import mrope_positions
from pixel_jax.ops import patchify
from pixel_jax.rollout.config import FACTOR, PATCH, RolloutConfig
from pixel_jax.rollout.operations import Gallery, add_to_gallery, execute, shown_size
from pixel_jax.rollout.rows import Chunk, for_chunks, fullest
from pixel_jax.rollout.sampling import sample
from pixel_jax.rollout.trajectory import (
    STOP_ANSWER,
    STOP_CALLS,
    STOP_IMAGES,
    STOP_TOKENS,
    STOP_TURN_LENGTH,
    Calls,
    Prompts,
    Trajectories,
)
from pixel_jax.rollout.views import Budget, encode_still, render, show_waiting

WRITING, WAITING, DONE = 0, 1, 2
GREY = 127  # of blanked observations
OWN_TOOL = 3  # `Calls.kind` of a tool that the host executed


class Shape(NamedTuple):
    """What is static about a rollout besides its config."""

    views: int  # V, most images of one observation: 1 where no prompt is a video
    shards: int  # parts of the mesh that rows are split over
    patches: int  # room for the patches of one image of a prompt, or frame


class Shared(NamedTuple):
    """What the rows of one prompt have in common; B prompts."""

    prompts: Prompts
    prefix: KVCache  # of the prompts and the opening
    visual: Visual
    temperature: jax.Array  # float32 [2], of the first turn and of later ones: greedy decoding is the same program


class State(NamedTuple):
    """R rows at one moment. `Lr` is `RolloutConfig.max_response`, N one more than `max_calls`, V `Shape.views`."""

    tokens: jax.Array  # int32 [R, Lr], everything after the prompt
    chosen: jax.Array  # bool [R, Lr]
    logprobs: jax.Array  # float32 [R, Lr]
    length: jax.Array  # int32 [R]
    turn_start: jax.Array  # int32 [R], where the present turn's own tokens begin
    status: jax.Array  # int32 [R]
    stop: jax.Array  # int32 [R], -1 while not done
    hidden: jax.Array  # [R, D], of the last token
    next_pos: jax.Array  # int32 [R]
    cache: KVCache
    reader: automaton.State
    gallery: Gallery
    num_images: jax.Array  # int32 [R], a video counts as one
    patches: jax.Array  # uint8 [R, N - 1, V, P, 588], what the observations showed; P of an observation's budget
    grids: jax.Array  # int32 [R, N - 1, V, 3]
    calls: Calls
    num_calls: jax.Array  # int32 [R]
    keys: jax.Array  # keys [R]


def budgets(config: RolloutConfig, shape: Shape) -> tuple[Budget, Budget, Budget]:
    """The budgets of prompt images, of video frames, and of observations."""
    seen = config.crop_max_pixels if shape.views == 1 else max(config.crop_max_pixels, config.select_max_pixels)
    prompt = (Budget(x, config.max_side, shape.patches) for x in (config.max_pixels, config.video_max_pixels))
    # Room of its own: a crop may show a quarter of what an overview does.
    return *prompt, Budget(seen, config.max_side, 4 * (seen // FACTOR**2))


def prompt_visual(prompts: Prompts, config: RolloutConfig, shape: Shape) -> Visual:
    """The overview of every prompt: its images, or its video two frames a slice."""
    batch, most = prompts.canvas_size.shape[:2]
    zeros = jnp.zeros_like(prompts.canvas_size[..., 0])
    region = jnp.stack([zeros, zeros, prompts.canvas_size[..., 1], prompts.canvas_size[..., 0]], axis=-1)
    image_budget, video_budget, _ = budgets(config, shape)
    video = prompts.is_video[:, None, None]
    as_image, _ = shown_size(region, config.min_pixels, config.max_pixels, config.max_side)
    as_frame, _ = shown_size(region, config.video_min_pixels, config.video_max_pixels, config.max_side)
    index = jnp.arange(most)
    present = index < prompts.num_canvases[:, None]
    size = jnp.where(present[..., None], jnp.where(video, as_frame, as_image), 0)
    budget = image_budget if image_budget.max_pixels >= video_budget.max_pixels else video_budget
    view = jax.vmap(jax.vmap(lambda canvas, region, size: render(canvas, region, size, budget)))
    pairs = -(-prompts.num_canvases // 2)
    pair = 2 * index[None, :, None] + jnp.arange(2)
    pair = jnp.minimum(pair, prompts.num_canvases[:, None, None] - 1)
    slices = jnp.where(video, pair, index[None, :, None])
    slices = jnp.where(jnp.where(video[..., 0], index < pairs[:, None], present)[..., None], slices, -1)
    grid = size // PATCH
    one = jnp.where(present, 1, 0)
    first = index == 0
    frames = jnp.where(video[..., 0], jnp.where(first, pairs[:, None], 0), one)
    grids = jnp.where(frames[..., None] > 0, jnp.concatenate([frames[..., None], grid], axis=-1), 0)
    seconds = jnp.where(first, prompts.seconds[:, None], 0.0)
    return Visual(view(prompts.canvases, region, size), slices.astype(jnp.int32), grids, seconds)


def start(
    model: Qwen2_5_VL,
    prompts: Prompts,
    key: jax.Array,
    opening: jax.Array,
    temperature: jax.Array,
    config: RolloutConfig,
    shape: Shape,
) -> tuple[Shared, State]:
    """Read the prompts once each and set up the rows, which have written `opening` and nothing else.

    `opening` int32 [O] ends with -1 where it is shorter.
    """
    visual = prompt_visual(prompts, config, shape)
    batch, width = prompts.tokens.shape
    # All rows begin alike, so the opening is read with the prompt.
    room, written = opening.shape[0], jnp.sum(opening >= 0)
    index = jnp.arange(width + room) - prompts.length[:, None]
    tokens = jnp.where(
        index < 0, jnp.pad(prompts.tokens, ((0, 0), (0, room))), jnp.maximum(opening, 0)[jnp.clip(index, 0, room - 1)]
    )
    valid = index < written
    features = encode_visual(model, visual, implementation=config.implementation)
    x = model.embed(tokens, features, visual.grids)
    positions, next_pos = mrope_positions(
        model.is_visual(tokens), valid, visual.grids, visual.seconds, jnp.zeros(batch, jnp.int32), model.config
    )
    hidden, prefix = model.prefill(x, positions, valid, implementation=config.implementation)
    last = jnp.take_along_axis(hidden, (prompts.length + written)[:, None, None] - 1, axis=1)[:, 0]

    group, rows = config.group_size, batch * config.group_size
    spread = lambda x: jnp.repeat(x, group, axis=0)
    member = jnp.tile(jnp.arange(group), batch)
    keys = jax.vmap(lambda uid, member: jax.random.fold_in(jax.random.fold_in(key, uid), member))(
        spread(prompts.uid), member
    )
    most = prompts.canvas_size.shape[1]
    slots = config.max_images + most
    regions = jnp.pad(prompts.canvas_size[..., ::-1], ((0, 0), (0, slots - most), (2, 0)))
    images = jnp.where(prompts.is_video, 1, prompts.num_canvases)
    numbers = config.max_calls + 1
    none = jnp.full((rows, numbers), -1, jnp.int32)
    blank = jnp.zeros((rows, config.max_response), jnp.int32)
    state = State(
        tokens=blank.at[:, :room].set(jnp.maximum(opening, 0)[: config.max_response]),
        chosen=jnp.zeros((rows, config.max_response), bool),
        logprobs=jnp.zeros((rows, config.max_response), jnp.float32),
        length=jnp.full(rows, written, jnp.int32),
        turn_start=jnp.zeros(rows, jnp.int32),
        status=jnp.full(rows, WRITING, jnp.int32),
        stop=jnp.full(rows, -1, jnp.int32),
        hidden=spread(last),
        next_pos=spread(next_pos),
        cache=model.empty_cache(rows, config.max_response),
        reader=automaton.init(rows),
        gallery=Gallery(
            jnp.broadcast_to(jnp.minimum(jnp.arange(slots), most - 1), (rows, slots)).astype(jnp.int32),
            spread(regions),
            spread(images),
        ),
        num_images=spread(images),
        patches=jnp.zeros((rows, config.max_calls, shape.views, budgets(config, shape)[2].patches, 588), jnp.uint8),
        grids=jnp.zeros((rows, config.max_calls, shape.views, 3), jnp.int32),
        calls=Calls(
            none, none, none, jnp.zeros((rows, numbers, 4), jnp.int32), jnp.full((rows, numbers, 8), -1, jnp.int32)
        ),
        num_calls=jnp.zeros(rows, jnp.int32),
        keys=keys,
    )
    shared = Shared(prompts, prefix, visual, temperature)
    reader, _ = jax.lax.scan(
        lambda reader, token: (automaton.step(prompts.tables.bytes, reader, jnp.full(rows, token)), None),
        state.reader,
        opening,
    )
    return shared, state._replace(reader=reader)


def append(
    model: Qwen2_5_VL,
    layers,
    shared: Shared,
    state: State,
    ids: jax.Array,
    lengths: jax.Array,
    features=None,
    grids=None,
    *,
    shards: int = 1,
    chunk: int | None = None,
) -> State:
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


def read(model: Qwen2_5_VL, layers, x, positions, lengths, hidden, cache: KVCache, prefix: KVCache):
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


def decode(model: Qwen2_5_VL, layers, shared: Shared, state: State, config: RolloutConfig) -> State:
    """Every row that is writing chooses one token and reads it."""
    rows = state.status.shape[0]
    writing = state.status == WRITING
    temperature = jnp.where(state.num_calls > 0, shared.temperature[1], shared.temperature[0])
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.length)
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
    reader = automaton.step(shared.prompts.tables.bytes, state.reader, jnp.where(writing, token, -1))
    state = state._replace(
        chosen=state.chosen.at[at].set(True, mode="drop"),
        logprobs=state.logprobs.at[at].set(logprob, mode="drop"),
        reader=reader,
    )
    state = append(model, layers, shared, state, token[:, None], writing.astype(jnp.int32))

    ended = writing & jnp.any(token[:, None] == shared.prompts.tables.stop, axis=1)
    prompt_length = jnp.repeat(shared.prompts.length, rows // shared.prompts.length.shape[0])
    full = (state.length >= config.max_response) | (state.length + prompt_length >= config.max_tokens)
    long = state.length - state.turn_start >= config.max_new_tokens
    status = jnp.where(ended, WAITING, jnp.where(writing & (full | long), DONE, state.status))
    stop = jnp.where(writing & ~ended & (full | long), jnp.where(long, STOP_TURN_LENGTH, STOP_TOKENS), state.stop)
    return state._replace(status=status, stop=stop)


def observe(model: Qwen2_5_VL, layers, shared: Shared, state: State, config: RolloutConfig, shape: Shape) -> State:
    """Every row that waits gets what it asked for, a message that says why not, or its end."""
    rows = state.status.shape[0]
    prompts, row = shared.prompts, jnp.arange(rows)
    spread = lambda x: jnp.repeat(x, rows // x.shape[0], axis=0)
    call = automaton.finish(state.reader)
    waiting = state.status == WAITING
    asks = waiting & call.required
    spent = asks & (state.num_calls >= config.max_calls)
    result = execute(
        call,
        state.gallery,
        spread(prompts.is_video),
        spread(prompts.canvas_size),
        spread(prompts.num_canvases),
        shape.views,
        config,
    )
    crowded = asks & ~spent & (state.num_images + result.count > config.max_images)
    observations = prompts.tables.observations
    ids, lengths = observations.assemble(result.message, observation_width(observations, config, shape))
    after = state.length + lengths
    long = (after >= config.max_response) | (after + spread(prompts.length) >= config.max_tokens)
    long = asks & ~spent & ~crowded & long
    run = asks & ~spent & ~crowded & ~long

    budget = budgets(config, shape)[2]
    showing = run & (result.count > 0)
    patches, features = show_waiting(
        model,
        jnp.full_like(prompts.canvases, GREY) if config.blank else prompts.canvases,
        result.canvas,
        result.region,
        result.size,
        showing,
        budget=budget,
        shards=shape.shards,
        chunk=config.observe_chunk,
        implementation=config.implementation,
    )
    grids = jnp.concatenate([(result.size[..., :1] > 0).astype(jnp.int32), result.size // PATCH], axis=-1)
    grids = jnp.where(showing[:, None, None], grids, 0)

    # What the row did, on record. A call past the limit is counted and not executed.
    number = jnp.where(asks, state.num_calls, config.max_calls + 1)
    executed = jnp.where(run, result.message.kind, -1)
    frames = jnp.where(
        (call.tool == 1)[:, None] & (jnp.arange(8) < call.num_frames[:, None]), call.frames[:, :8] - 1, -1
    )
    calls = Calls(
        kind=state.calls.kind.at[row, number].set(jnp.where(call.valid, call.tool, 2), mode="drop"),
        observation=state.calls.observation.at[row, number].set(executed, mode="drop"),
        canvas=state.calls.canvas.at[row, number].set(jnp.where(showing, result.canvas[:, 0], -1), mode="drop"),
        box=state.calls.box.at[row, number].set(jnp.where(showing[:, None], result.region[:, 0], 0), mode="drop"),
        frames=state.calls.frames.at[row, number].set(frames, mode="drop"),
    )
    shown = jnp.where(showing, state.num_calls, config.max_calls)
    state = state._replace(
        calls=calls,
        num_calls=state.num_calls + asks,
        gallery=add_to_gallery(state.gallery, result, run),
        num_images=state.num_images + jnp.where(run, result.count, 0),
        patches=state.patches.at[row, shown].set(patches, mode="drop"),
        grids=state.grids.at[row, shown].set(grids, mode="drop"),
    )
    chunks = {"shards": shape.shards, "chunk": config.observe_chunk}
    state = append(model, layers, shared, state, ids, jnp.where(run, lengths, 0), features, grids, **chunks)

    # An over-full gallery ends the row and takes its last message back, as the released code does.
    state = state._replace(
        length=jnp.where(crowded, state.turn_start, state.length),
        chosen=state.chosen & ~(crowded[:, None] & (jnp.arange(config.max_response) >= state.turn_start[:, None])),
    )
    stop = jnp.select(
        [waiting & ~call.required, spent, crowded, long],
        [STOP_ANSWER, STOP_CALLS, STOP_IMAGES, STOP_TOKENS],
        state.stop,
    )
    state = state._replace(stop=stop, status=jnp.where(waiting, DONE, state.status))
    return resume(state, run)


def show(
    model: Qwen2_5_VL,
    layers,
    shared: Shared,
    state: State,
    ids,
    lengths,
    images,
    sizes,
    config: RolloutConfig,
    shape: Shape,
) -> State:
    """Rows with `lengths` above zero read the observation of a tool of the user's own and go on writing.

    `ids` int32 [R, T], `images` uint8 [R, V, H, W, 3] of `sizes` int32 [R, V, 2], already as they are to be seen.
    """
    rows = state.status.shape[0]
    run = lengths > 0
    room = budgets(config, shape)[2].patches
    patches = jax.vmap(jax.vmap(lambda image, size: patchify(image, size, max_patches=room)))(images, sizes)
    features = encode_still(model, patches, sizes, config.implementation)
    grids = jnp.concatenate([(sizes[..., :1] > 0).astype(jnp.int32), sizes // PATCH], axis=-1)
    at = (jnp.arange(rows), jnp.where(run, state.num_calls, config.max_calls))
    count = jnp.sum(sizes[..., 0] > 0, axis=1)
    state = state._replace(
        calls=state.calls._replace(kind=state.calls.kind.at[at].set(OWN_TOOL, mode="drop")),
        num_calls=state.num_calls + run,
        num_images=state.num_images + count,
        patches=state.patches.at[at].set(patches, mode="drop"),
        grids=state.grids.at[at].set(grids, mode="drop"),
    )
    chunks = {"shards": shape.shards, "chunk": config.observe_chunk}
    state = append(model, layers, shared, state, ids, lengths, features, grids, **chunks)
    return resume(state, run)


def writes_on(state: State, config: RolloutConfig, shape: Shape) -> jax.Array:
    """Whether to decode another token before those that wait are answered.

    Turns differ in length: as soon as some rows wait (on one shard), they are answered while the others are in the middle
    of theirs. What that costs apart from the answers is paid by all rows, so it is not done for each one.
    """
    local = state.status.shape[0] // shape.shards
    enough = min(local, max(config.observe_chunk, local // 4))
    return jnp.any(state.status == WRITING) & (fullest(state.status == WAITING, shape.shards) < enough)


def resume(state: State, run: jax.Array) -> State:
    """The rows `run` (bool [R]) begin a new turn."""
    fresh = automaton.init(run.shape[0])
    return state._replace(
        status=jnp.where(run, WRITING, state.status),
        turn_start=jnp.where(run, state.length, state.turn_start),
        reader=jax.tree.map(
            lambda new, old: jnp.where(run.reshape(-1, *[1] * (old.ndim - 1)), new, old), fresh, state.reader
        ),
    )


def observation_width(observations: Observations, config: RolloutConfig, shape: Shape) -> int:
    """Room for the longest observation, in tokens."""
    return observations.bound(
        crop_pads=config.crop_max_pixels // FACTOR**2,
        frame_pads=config.select_max_pixels // FACTOR**2 if shape.views > 1 else 0,
        num_frames=shape.views,
    )


def finish(shared: Shared, state: State, config: RolloutConfig) -> Trajectories:
    """The trajectories of the rows: prompt and response side by side, everything they saw in order."""
    rows = state.status.shape[0]
    group = rows // shared.prompts.tokens.shape[0]
    spread = lambda x: jnp.repeat(x, group, axis=0)
    prompts, visual = shared.prompts, jax.tree.map(spread, shared.visual)
    beside = lambda x, y: jnp.concatenate([x, y], axis=1)
    most = max(visual.patches.shape[2], state.patches.shape[3])
    wide = lambda patches: jnp.pad(patches, ((0, 0), (0, 0), (0, most - patches.shape[2]), (0, 0)))
    prompt_tokens = spread(prompts.tokens)
    blank = jnp.zeros(prompt_tokens.shape, bool)
    grids = state.grids.reshape(rows, -1, 3)
    first = visual.patches.shape[1]
    frame = first + jnp.arange(grids.shape[1])
    still = jnp.where(grids[..., :1] > 0, jnp.stack([frame, frame], axis=-1), -1)
    slices = beside(visual.slices, still)
    present_first = jnp.argsort(slices[..., :1] < 0, axis=1, stable=True)
    return Trajectories(
        tokens=beside(prompt_tokens, state.tokens),
        valid=beside(
            jnp.arange(prompt_tokens.shape[1]) < spread(prompts.length)[:, None],
            jnp.arange(config.max_response) < state.length[:, None],
        ),
        chosen=beside(blank, state.chosen),
        logprobs=beside(blank.astype(jnp.float32), jnp.where(state.chosen, state.logprobs, 0.0)),
        visual=Visual(
            patches=beside(wide(visual.patches), wide(state.patches.reshape(rows, -1, *state.patches.shape[3:]))),
            slices=jnp.take_along_axis(slices, present_first, axis=1),
            grids=beside(visual.grids, grids),
            seconds=beside(visual.seconds, jnp.zeros(grids.shape[:2], jnp.float32)),
        ),
        prompt=jnp.repeat(jnp.arange(prompts.tokens.shape[0]), group),
        calls=state.calls,
        num_calls=state.num_calls,
        stop=state.stop,
    )
