"""The multi-turn rollout: as one compiled program, or step by step with its state in between.

The walk of a prompt through it, with the function of each station:

    begin      it has a place and waits in line                                                  queue.start
    advance    until no row can go on:                                                           loop.advance
      refill     its turn has come: a group of free slots reads it, once for all its rows,         queue.refill
                 and each row begins with the assistant prefix
      decode     rows write, a token each at a time, until enough of them have ended a turn        decode_loop.decode_turns
      observe    a row that has called a tool reads what that shows, or why it shows nothing,      decode_loop.observe
                 and writes on; a row that has called nothing, or has no room left, is done
      refill     the slot of a row that is done goes to another; the row is on record              queue.write_output
    finish     its rows side by side: what they wrote, called and were shown                     queue.finish

`rollout` is all of it in one XLA program. `begin`, `advance` and `finish` are the same functions compiled one by one, with a
`RolloutState` between them: `advance` goes on for as many tokens as it is told, `admit` gives the places of prompts that are
done to others, and `host_rollout` answers calls of tools that run on the host. What rows write is the same, to the bit.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.models.model import Model
from pixel_jax.parallel.memory import device_memory
from pixel_jax.parallel.sharding import process_shard, replicate, row_shards, shard_batch
from pixel_jax.rollouts import loop
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.drawings import Pictures, pictures_of
from pixel_jax.rollouts.host import host_calls, tell
from pixel_jax.rollouts.images import pad, ragged, shard_images
from pixel_jax.rollouts.loop import RolloutState
from pixel_jax.rollouts.materialize import VisualRecord
from pixel_jax.rollouts.shapes import RolloutShape
from pixel_jax.rollouts.trajectory import HostPrompts, Prompts, Trajectories
from pixel_jax.terminal import say
from pixel_jax.tools.host import HostTools, HostToolsConfig
from pixel_jax.tools.tool import Tool, ToolError


def rollout(
    model: Model,
    prompts: HostPrompts,
    key: jax.Array,
    config: RolloutConfig,
    *,
    assistant_prefix: Sequence[int] = (),
) -> Trajectories[VisualRecord]:
    """`config.group_size` conversations from each of B prompts, R rows in all, by one XLA program.

    The rows of `config.in_flight` prompts decode together; whenever enough of them have ended a turn, those that asked for
    pixels get them (cropped and resized from the full-resolution image, encoded, appended to their caches) or a message, rows
    that wait take the place of those that are done, and all go on. On a mesh, rows are split over `data` and `fsdp`; the mesh
    is the one the model's weights lie on. With several processes each brings its share of the prompts, and all must have the
    same shapes; the rows that come back lie where their prompts do.

    Args:
      key: the rows' randomness: row i of prompt b draws from `fold_in(fold_in(key, prompts.uid[b]), i)` and its position.
      assistant_prefix: token ids the assistant's first turn begins with, in every row. They are not the policy's choice.

    Returns:
      R rows, the `group_size` of each prompt side by side, without pixels: `materialize` cuts them anew.

    Raises:
      ValueError: a tool runs on the host, or the prompts cannot be split over the mesh.
    """
    if any(tool.host for tool in prompts.tables.tools):
        raise ValueError(f"{_of_host(prompts.tables.tools)} run on the host: `host_rollout` carries their calls out")
    mesh, shape = layout(model, prompts, config)
    given = _given(model, prompts, key, config, assistant_prefix, shape, mesh)
    with on_mesh(mesh):
        return compiled_rollout(model, *given, shape=shape, mesh=mesh)


@functools.partial(jax.jit, static_argnames=("config", "shape", "mesh"))
def compiled_rollout(
    model, prompts, key, assistant_prefix, temperature, config: RolloutConfig, *, shape: RolloutShape, mesh: Mesh | None
) -> Trajectories[VisualRecord]:
    """The whole rollout: no host in the loop."""
    state = loop.start(model, prompts, key, assistant_prefix, temperature, config, shape, mesh)
    return loop.finish(loop.advance(model, state, None))


def begin(
    model: Model,
    prompts: HostPrompts,
    key: jax.Array,
    config: RolloutConfig,
    *,
    assistant_prefix: Sequence[int] = (),
    capacity: int | None = None,
) -> RolloutState:
    """The state of a rollout of which nothing is read and nothing written.

    Args:
      model, prompts, key, config, assistant_prefix: as for `rollout`; tools may run on the host. What kinds of prompts there are
        (images, videos) is settled here.
      capacity: places for prompts; those behind `prompts` are empty, for `admit` to fill. None: as many as there are prompts.

    Raises:
      ValueError: fewer places than prompts, places that cannot be split over the mesh, or empty ones with several processes.
    """
    count = prompts.tokens.shape[0]
    if capacity is not None and capacity < count:
        raise ValueError(
            f"capacity {capacity} is less than the {count} prompts: give it {count} or more, or fewer prompts"
        )
    if capacity not in (None, count) and jax.process_count() > 1:
        raise ValueError(f"capacity {capacity} with several processes: begin with {capacity} prompts in each, no fewer")
    if capacity is None or capacity == count:
        places = prompts
    else:
        arrays = prompts._replace(tables=(), images=())
        empty = jax.tree.map(lambda x: np.zeros((capacity, *x.shape[1:]), x.dtype), arrays)
        places = empty._replace(tables=prompts.tables, images=ragged([()] * capacity))
    mesh, shape = layout(model, places, config)
    given = _given(model, places, key, config, assistant_prefix, shape, mesh)
    with on_mesh(mesh):
        state = _start(model, *given, shape=shape, mesh=mesh)
    if any(tool.picture for tool in shape.tools):
        state = dataclasses.replace(state, pictures=_pictures(prompts.images, mesh))
    if places is prompts:
        return state
    return admit(state, range(count), prompts)


def advance(
    model: Model, state: RolloutState, budget: int | jax.Array | None = None, *, donate: bool = False
) -> RolloutState:
    """Goes on with a rollout until every row is done, waits for a tool of the host, or the budget is spent.

    In pieces of any budgets it comes to what it does in one: tokens, log-probabilities, calls and pixels are the same bit for
    bit. All budgets share one compiled program; no budget is another. Each call lays the layers' weights out for decoding once,
    so give budgets of dozens where speed counts. In a `jax.jit` of the caller's on a mesh, set that (`jax.set_mesh`).

    Args:
      model: the one that the state began with, or one of its shapes: rows go on with its weights, on the caches they have.
      budget: tokens that a slot writes in this call at most; a call that was read, an observation or a prompt costs nothing.
        None: no limit; 0 does nothing. May be traced.
      donate: whether the memory of `state`'s caches goes to the result: there is room for one state then, and `state` cannot be
        used any more.

    Returns:
      The state. `finished` says which prompts are done, `finish` what all rows have come to so far.

    Raises:
      ValueError: a negative budget.
    """
    if budget is not None and not isinstance(budget, jax.Array):
        if budget < 0:
            raise ValueError(f"budget {budget} is negative: give tokens to decode, or None for all there are")
        budget = np.int32(budget)
    moving = {name: getattr(state, name) for name in MOVING}
    still = dataclasses.replace(state, **dict.fromkeys(MOVING))
    with on_mesh(state.mesh):
        moving = (_advance_in_place if donate else _advance)(model, still, moving, budget)
    return dataclasses.replace(state, **moving)


def admit(state: RolloutState, places: Sequence[int], prompts: HostPrompts) -> RolloutState:
    """Puts prompts in places of a rollout that are empty or whose prompts are finished; what those came to is forgotten.

    A row's tokens follow from the key and from its prompt's `uid`, not from when or where the prompt was admitted. Of those that
    wait, `advance` reads first who came first, in each part of the mesh. There is a compiled program for each number of prompts.

    Args:
      places: of each of the prompts; whole numbers below the state's number of places.
      prompts: of the shape and with the tables of those that the state began with. With several processes the same in all.

    Raises:
      ValueError: a place that does not exist, is named twice or is not done; prompts of other shapes or tables.
    """
    places = np.asarray(places, np.int32).reshape(-1)
    count, have = prompts.tokens.shape[0], state.prompts.tokens.shape[0]
    if len(places) != count or len(set(places.tolist())) != count:
        raise ValueError(f"places {places.tolist()} for {count} prompts: name one place for each, none twice")
    if outside := [place for place in places.tolist() if not 0 <= place < have]:
        raise ValueError(
            f"places {outside} do not exist: the state has 0 to {have - 1}; begin with a larger `capacity`"
        )
    if not count:
        return state
    _same_shapes(state, prompts)
    with on_mesh(state.mesh):
        free = np.asarray(_free(state))
        if busy := [place for place in places.tolist() if not free[place]]:
            raise ValueError(f"places {busy} are not done: `advance` until `finished`; free are {_list(free)}")
        arrays = on_devices(prompts, pad(prompts.images, prompts.shape))._replace(tables=())
        if state.mesh is not None:
            places, arrays = replicate((places, arrays), state.mesh)
        return _admit(state, places, arrays._replace(tables=state.prompts.tables))


def finished(state: RolloutState) -> np.ndarray:
    """Prompts whose rows are all done: bool [B], on the host. An empty place is not among them."""
    with on_mesh(state.mesh):
        return np.asarray(_finished(state))


def finish(state: RolloutState) -> Trajectories[VisualRecord]:
    """What all rows have come to, as `rollout` returns it.

    It can be asked at any time: a row that is not done has what it has written so far and `stop` -1. Of the prompts that are
    done alone, `take_rows(finish(state), finished(state).repeat(group_size))` are the rows.
    """
    with on_mesh(state.mesh):
        return _finish(state)


MOVING = ("queue", "rows", "decoding")  # what `advance` changes in a `RolloutState`


def _advanced(model: Model, still: RolloutState, moving, budget):
    state = loop.advance(model, dataclasses.replace(still, **moving), budget)
    return {name: getattr(state, name) for name in MOVING}


# The steps, compiled one by one.
_start = jax.jit(loop.start, static_argnames=("config", "shape", "mesh"))
_advance = jax.jit(_advanced)
_advance_in_place = jax.jit(_advanced, donate_argnames="moving")
_answer = jax.jit(loop.answer)
_admit = jax.jit(loop.admit)
_free = jax.jit(lambda state: loop.finished(state) | (state.prompts.length == 0))
_finished = jax.jit(loop.finished)
_finish = jax.jit(loop.finish)


def _list(which: np.ndarray) -> list[int]:
    return np.flatnonzero(which).tolist()


def _same_shapes(state: RolloutState, prompts: HostPrompts) -> None:
    """Raises ValueError where the prompts do not fit what the state's programs were made for."""
    room, shape = state.shape.prompts, prompts.shape
    sides = lambda x: (x.tokens, x.images, x.height, x.width)
    if sides(shape) != sides(room):
        raise ValueError(f"prompts of {shape} in a rollout of {room}: build them with `shape=state.shape.prompts`")
    if shape.video > room.video or shape.patches > room.patches:
        kind = "videos" if shape.video else "images"
        raise ValueError(f"{kind} in a rollout that began without any: have one among the prompts that it begins with")
    if not np.all(np.asarray(prompts.length) > 0):
        raise ValueError(f"prompts {_list(np.asarray(prompts.length) <= 0)} have no tokens: leave them out")
    if prompts.tables.tools != state.shape.tools or prompts.tables.parser is not state.prompts.tables.parser:
        names = [[tool.name for tool in tools] for tools in (prompts.tables.tools, state.shape.tools)]
        raise ValueError(f"prompts for the tools {names[0]} in a rollout with {names[1]}: build them with its `tables`")


@contextlib.contextmanager
def on_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Work laid out on the mesh; inside a `jax.jit` of the caller's, who has set it there."""
    if mesh is None or jax.sharding.get_abstract_mesh() == mesh.abstract_mesh:
        yield
    else:
        with jax.set_mesh(mesh):
            yield


TOKENS = (
    64  # between two looks at which rows wait for tools of the host: the more, the more calls are carried out at once
)


def host_rollout(
    model: Model,
    prompts: HostPrompts,
    key: jax.Array,
    config: RolloutConfig,
    *,
    assistant_prefix: Sequence[int] = (),
    host: HostTools | None = None,
    vocabulary: Vocabulary | None = None,
) -> Trajectories[VisualRecord]:
    """`rollout` where tools run on the host: the same steps, driven from there.

    Args:
      host: carries out the calls of the tools that run on the host, those of a batch beside one another. Needs `vocabulary`.
        What a row reads then depends on them too: the same key need not give the same tokens. All others as for `rollout`.

    Raises:
      ValueError: there are such tools, and `host` or `vocabulary` is missing.
    """
    budget, images = None, prompts.images
    if any(tool.host for tool in prompts.tables.tools):
        if host is None or vocabulary is None:
            raise ValueError(f"{_of_host(prompts.tables.tools)} run on the host: pass `host` and `vocabulary`")
        budget = TOKENS
    state = begin(model, prompts, key, config, assistant_prefix=assistant_prefix)
    while not np.all(finished(state)):
        state = advance(model, state, budget, donate=True)
        if asked := host_calls(state, images):
            replies = host.call([call.request for call in asked])
            told = tell(replies, asked, images, state, vocabulary)
            if any(reply.picture is not None for reply in replies):
                state = dataclasses.replace(state, pictures=_pictures(images, state.mesh))
            with on_mesh(state.mesh):
                state = _answer(model, state, told)
    return finish(state)


def _pictures(images: np.ndarray, mesh: Mesh | None) -> Pictures:
    """What tools of the host have returned to rows of these prompts (`Images` [B]), on the devices."""
    pictures = pictures_of(images)
    return jax.tree.map(jnp.asarray, pictures) if mesh is None else replicate(pictures, mesh)


class HostRollouts:
    """`host_rollout` with tools that run on the host, in the place of `rollout`.

    Args:
      host: carries out their calls; vocabulary: of the model.
    """

    def __init__(self, host: HostTools, vocabulary: Vocabulary):
        self.host, self.vocabulary = host, vocabulary

    def __call__(
        self, model: Model, prompts: HostPrompts, key: jax.Array, config: RolloutConfig, **options
    ) -> Trajectories[VisualRecord]:
        return host_rollout(model, prompts, key, config, host=self.host, vocabulary=self.vocabulary, **options)

    def facts(self) -> dict[str, float]:
        """For metrics, of what was rolled out since the last time."""
        return self.host.facts()


@contextlib.contextmanager
def host_rollouts(
    names: Sequence[str], tools: Sequence[Tool], vocabulary: Vocabulary, config: HostToolsConfig
) -> Iterator[HostRollouts | None]:
    """Rollouts with the `tools` of these names, their workers about them; None where no tool runs on the host.

    ToolError: several processes, which would have to wait for one another's tools.
    """
    if not any(tool.host for tool in tools):
        yield None
        return
    if jax.process_count() > 1:
        raise ToolError(f"{_of_host(tools)} run on the host: with one process only, not with {jax.process_count()}")
    say(
        f"{_of_host(tools)} run on the host: this run is driven from there, and started again it need not give the same bits"
    )
    with HostTools(names, config) as host:
        yield HostRollouts(host, vocabulary)


def _of_host(tools: Sequence[Tool]) -> str:
    """The tools that run on the host, by name."""
    return ", ".join(f"{tool.name!r}" for tool in tools if tool.host)


CACHES = 3  # one part in so many of a device's memory is for what rows in flight keep


def fitting(
    config: RolloutConfig, model: Model, prompts: HostPrompts, shape: RolloutShape, mesh: Mesh | None
) -> RolloutConfig:
    """`config` with as many prompts in flight as fit the memory of the devices, where it leaves that open and not all do."""
    batch, width = prompts.tokens.shape
    if config.in_flight is not None:
        return config
    text = model.config.text
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    token *= model.language_model.embed_tokens.weight.dtype.itemsize
    group = config.group_size * config.max_response * token + 2 * (width + PREFIX_STEP) * token
    most = max(1, device_memory() // CACHES // group) * shape.shards
    return config if most >= batch * process_shard(mesh).count else dataclasses.replace(config, in_flight=most)


PREFIX_STEP = 8  # prefixes are padded to a multiple, to share a program


def traced(config: RolloutConfig, assistant_prefix: Sequence[int]) -> tuple[jax.Array, jax.Array, RolloutConfig]:
    """Opening and temperatures as arrays, and the config without them: they do not need a program of their own."""
    padded = np.full(PREFIX_STEP * max(1, -(-len(assistant_prefix) // PREFIX_STEP)), -1, np.int32)
    padded[: len(assistant_prefix)] = assistant_prefix
    later = config.temperature if config.later_temperature is None else config.later_temperature
    temperature = np.array([config.temperature, later], np.float32)
    same = dataclasses.replace(config, temperature=1.0, later_temperature=None)
    return jnp.asarray(padded), jnp.asarray(temperature), same


def _given(
    model: Model,
    prompts: HostPrompts,
    key: jax.Array,
    config: RolloutConfig,
    assistant_prefix: Sequence[int],
    shape: RolloutShape,
    mesh: Mesh | None,
) -> tuple:
    """What the programs take after the model: prompts, key, assistant prefix and temperatures on the devices, and the config."""
    config = fitting(config, model, prompts, shape, mesh)
    assistant_prefix, temperature, config = traced(config, assistant_prefix)
    if mesh is not None:
        key, assistant_prefix, temperature = replicate((key, assistant_prefix, temperature), mesh)
    return put_prompts(prompts, mesh), key, assistant_prefix, temperature, config


def layout(model: Model, prompts: HostPrompts, config: RolloutConfig) -> tuple[Mesh | None, RolloutShape]:
    """The mesh the model lies on (None: one device) and the static shape that follows from it and from the prompts."""
    sharding = jax.tree.leaves(model)[0].sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 else None
    shards = row_shards(mesh) if mesh is not None else 1
    batch = prompts.tokens.shape[0] * process_shard(mesh).count
    if batch % shards:
        raise ValueError(f"{batch} prompts cannot be split over data x fsdp = {shards}: pad the batch")
    if config.in_flight is not None and config.in_flight < batch and config.in_flight % shards:
        raise ValueError(f"in_flight {config.in_flight} prompts cannot be split over data x fsdp = {shards}")
    return mesh, static_shape(prompts, config, mesh)


def static_shape(prompts: HostPrompts, config: RolloutConfig, mesh: Mesh | None) -> RolloutShape:
    """What is static about a rollout of prompts on a mesh."""
    return RolloutShape.of(prompts.shape, config, prompts.tables.tools, 1 if mesh is None else row_shards(mesh))


def put_prompts(prompts: HostPrompts, mesh: Mesh | None) -> Prompts:
    """The prompts on the devices, their images padded; on the mesh: rows split, tables everywhere."""
    buffers = shard_images(prompts.images, prompts.shape, mesh)
    found = on_devices(prompts, ())
    if mesh is not None:
        rows = shard_batch(found._replace(tables=()), mesh)
        found = rows._replace(tables=replicate(prompts.tables, mesh))
    return found._replace(buffers=buffers)


def on_devices(prompts: HostPrompts, buffers) -> Prompts:
    """The prompts with their images in arrays."""
    return Prompts(buffers=buffers, **{name: getattr(prompts, name) for name in Prompts._fields if name != "buffers"})
