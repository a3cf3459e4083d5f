"""The multi-turn rollout: as one compiled program, or step by step with its state in between.

The steps of a prompt, with their functions:

    begin      the prompt waits in the queue                                                     queue.start
    advance    until no row can go on:                                                           loop.advance
      refill     a group of free slots reads the prompt, once for all its rows, and each row       queue.refill
                 begins with the assistant prefix
      decode     rows write, a token each at a time, until enough of them have ended a turn        decode_loop.decode_turns
      observe    a row that has called a tool reads the observation and writes on; a row that      decode_loop.observe
                 has called none, or has reached a limit, is done
      refill     the row is stored, and its slot goes to another                                   queue.write_output
    finish     all rows: what they wrote, called and were shown                                  queue.finish

`rollout` is all of it in one XLA program. `begin`, `advance` and `finish` are the same functions compiled one by one, with a
`RolloutState` between them: `advance` takes a budget of tokens, `admit` replaces prompts that are done, and `host_rollout`
carries out calls of host tools. What rows write is the same, to the bit.
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
from pixel_jax.rollouts.drawings import ReturnedPictures, returned_pictures
from pixel_jax.rollouts.host import encode_replies, host_calls
from pixel_jax.rollouts.images import pad, ragged, shard_images
from pixel_jax.rollouts.layers import row_cache_bytes
from pixel_jax.rollouts.loop import RolloutState
from pixel_jax.rollouts.materialize import VisualRecord
from pixel_jax.rollouts.queue import RowRecord
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
    """Samples `config.group_size` conversations from each of B prompts, R rows in all, by one XLA program.

    The rows of `config.in_flight` prompts decode together. Whenever enough of them have ended a turn, the calls of those are
    carried out: images are cropped from full resolution, encoded, and appended to the caches. Slots of rows that are done get new
    rows, and all go on. On the mesh of the model's weights, rows are split over `data` and `fsdp`. With several processes each
    has its own prompts, of the same shape, and their rows are returned to it.

    Args:
      model: the policy.
      prompts: made by `build_prompts`.
      key: random key; row i of prompt b draws from `fold_in(fold_in(key, prompts.uid[b]), i)` and its position. Where a `uid`
        has several numbers, they are folded in one after another.
      config: settings.
      assistant_prefix: token ids that the assistant's first turn begins with in every row; they are not the policy's choice.

    Returns:
      R rows, the `group_size` of each prompt side by side, without pixels, which `materialize` cuts out again.

    Raises:
      ValueError: a tool runs on the host, or the prompts cannot be split over the mesh.
    """
    if any(tool.host for tool in prompts.tables.tools):
        raise ValueError(f"{_of_host(prompts.tables.tools)} run on the host: `host_rollout` carries their calls out")
    mesh, shape = layout(model, prompts, config)
    inputs = _program_inputs(model, prompts, key, config, assistant_prefix, shape, mesh)
    with on_mesh(mesh):
        return compiled_rollout(model, *inputs, shape=shape, mesh=mesh)


@functools.partial(jax.jit, static_argnames=("config", "shape", "mesh"))
def compiled_rollout(
    model, prompts, key, assistant_prefix, temperature, config: RolloutConfig, *, shape: RolloutShape, mesh: Mesh | None
) -> Trajectories[VisualRecord]:
    """Runs the whole rollout as one program, without the host in its loop."""
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
    records: RowRecord | None = None,
) -> RolloutState:
    """Begins a rollout in steps.

    Args:
      model: as for `rollout`.
      prompts: as for `rollout`; tools may run on the host. Videos can only be admitted later if one is among these prompts.
      key: as for `rollout`.
      config: as for `rollout`.
      assistant_prefix: as for `rollout`.
      capacity: size of the batch of prompts; those behind `prompts` are empty, and `admit` can fill them. None: no empty ones.
      records: of the rows of `prompts` (`pixel_jax.rollouts.partial`), which go on from there: rows that were begun read again
        what they wrote and were shown, with the weights of `model`. Without a capacity.

    Returns:
      The state, in which all prompts wait.

    Raises:
      ValueError: the capacity is too small, cannot be split over the mesh, or leaves empty prompts with several processes; the
        records are of other shapes.
    """
    count = prompts.tokens.shape[0]
    if records is not None:
        if capacity not in (None, count):
            raise ValueError(f"capacity {capacity} with records of the rows of {count} prompts: leave the capacity out")
        check_records(records, prompts, config)
    if capacity is not None and capacity < count:
        raise ValueError(
            f"capacity {capacity} is less than the {count} prompts: give it {count} or more, or fewer prompts"
        )
    if capacity not in (None, count) and jax.process_count() > 1:
        raise ValueError(f"capacity {capacity} with several processes: begin with {capacity} prompts in each, no fewer")
    if capacity is None or capacity == count:
        batch = prompts
    else:
        arrays = prompts._replace(tables=(), images=())
        empty = jax.tree.map(lambda x: np.zeros((capacity, *x.shape[1:]), x.dtype), arrays)
        batch = empty._replace(tables=prompts.tables, images=ragged([()] * capacity))
    mesh, shape = layout(model, batch, config)
    inputs = _program_inputs(model, batch, key, config, assistant_prefix, shape, mesh)
    with on_mesh(mesh):
        placed = records if records is None or mesh is None else shard_batch(records, mesh)
        state = _start(model, *inputs, shape=shape, mesh=mesh, records=placed)
    if mesh is None:  # on the model's device, as the results of `advance` are, whose second call would compile again
        state = jax.device_put(state, next(iter(jax.tree.leaves(model)[0].devices())))
    if any(tool.picture for tool in shape.tools):
        state = dataclasses.replace(state, pictures=_pictures(prompts.images, mesh))
    if batch is prompts:
        return state
    return admit(state, range(count), prompts)


def advance(
    model: Model, state: RolloutState, budget: int | jax.Array | None = None, *, donate: bool = False
) -> RolloutState:
    """Goes on with a rollout until every row is done or waits for a host tool, or the budget is spent.

    The result does not depend on the budgets: tokens, log-probabilities, calls and pixels are the same bit for bit. All budgets
    share one compiled program; None has another. Each call prepares the layers' weights for decoding once, so budgets of dozens
    are faster. In a `jax.jit` of the caller's on a mesh, the mesh must be set (`jax.set_mesh`).

    Args:
      model: that of `begin`, or one of the same shapes: rows go on with its weights and with the caches they have.
      state: of the rollout.
      budget: the most tokens that a slot writes in this call, without observations and prompts; may be traced. None: no limit.
      donate: whether to reuse the memory of `state`, which cannot be used any more.

    Returns:
      The new state. `finished` says which prompts are done, and `finish` returns what all rows have written so far.

    Raises:
      ValueError: a negative budget.
    """
    if isinstance(budget, int) and budget < 0:
        raise ValueError(f"budget {budget} is negative: give tokens to decode, or None for no limit")
    left = budget if budget is None or isinstance(budget, jax.Array) else np.int32(budget)
    moving = {name: getattr(state, name) for name in MOVING}
    still = dataclasses.replace(state, **dict.fromkeys(MOVING))
    with on_mesh(state.mesh):
        moving = (_advance_in_place if donate else _advance)(model, still, moving, left)
    return dataclasses.replace(state, **moving)


def admit(
    state: RolloutState,
    indices: Sequence[int] | np.ndarray,
    prompts: HostPrompts,
    *,
    temperatures: Sequence[float] | None = None,
) -> RolloutState:
    """Replaces prompts of a rollout that are empty or finished; the rows of the old ones are dropped.

    A row's tokens follow from the key and from its prompt's `uid`, not from the prompt's index or when it was admitted. Prompts
    that wait are read in the order in which they came, in each data shard. Each number of prompts has a compiled program.

    Args:
      state: of the rollout.
      indices: of the prompts to replace, from 0; one for each of `prompts`.
      prompts: of the shape and with the tables of `begin`. With several processes, the same in all.
      temperatures: one for the rows of each of `prompts`, in all turns. None: those of the config of `begin`.

    Returns:
      The new state.

    Raises:
      ValueError: an index is out of range, repeated or not done; the prompts have another shape or other tables.
    """
    numbers = np.asarray(indices, np.int32).reshape(-1)
    count, have = prompts.tokens.shape[0], state.prompts.tokens.shape[0]
    if len(numbers) != count or len(set(numbers.tolist())) != count:
        raise ValueError(f"indices {numbers.tolist()} for {count} prompts: name one index for each, none twice")
    if outside := [index for index in numbers.tolist() if not 0 <= index < have]:
        raise ValueError(
            f"indices {outside} do not exist: the state has 0 to {have - 1}; begin with a larger `capacity`"
        )
    if not count:
        return state
    _same_shapes(state, prompts)
    if temperatures is not None and (len(temperatures) != count or not all(x >= 0 for x in temperatures)):
        raise ValueError(f"temperatures {list(temperatures)} for {count} prompts: give one for each, 0 or more")
    with on_mesh(state.mesh):
        free = np.asarray(_free(state))
        if busy := [index for index in numbers.tolist() if not free[index]]:
            raise ValueError(f"prompts {busy} are not done: `advance` until `finished`; free are {_list(free)}")
        arrays = _with_buffers(prompts, pad(prompts.images, prompts.shape))._replace(tables=())
        if state.mesh is not None:
            numbers, arrays = replicate((numbers, arrays), state.mesh)
        pairs = [state.temperature] * count if temperatures is None else [(x, x) for x in temperatures]
        arrays = arrays._replace(tables=state.prompts.tables)
        return _admit(state, numbers, arrays, jnp.asarray(pairs, jnp.float32))


def drop(state: RolloutState, indices: Sequence[int] | np.ndarray) -> RolloutState:
    """Empties prompts of a rollout, done or not: their rows stop, and their output is discarded.

    Other rows are not affected. Each number of prompts has a compiled program.

    Args:
      state: of the rollout.
      indices: of the prompts, from 0. With several processes, the same in all.

    Returns:
      The new state.

    Raises:
      ValueError: an index is out of range.
    """
    numbers, have = np.asarray(indices, np.int32).reshape(-1), state.prompts.tokens.shape[0]
    if outside := [index for index in numbers.tolist() if not 0 <= index < have]:
        raise ValueError(f"indices {outside} do not exist: the state has 0 to {have - 1}")
    if not len(numbers):
        return state
    with on_mesh(state.mesh):
        return _drop(state, numbers if state.mesh is None else replicate(numbers, state.mesh))


def finished(state: RolloutState) -> np.ndarray:
    """Says which prompts have no row left to write: bool [B], on the host. Empty ones are not among them."""
    with on_mesh(state.mesh):
        return np.asarray(_finished(state))


def finish(state: RolloutState) -> Trajectories[VisualRecord]:
    """Returns the trajectories of all rows, as `rollout` does.

    It can be called at any time: a row that is not done has what it has written so far, and `stop` -1. The rows of prompts that
    are done are `take_rows(finish(state), finished(state).repeat(group_size))`.
    """
    with on_mesh(state.mesh):
        return _finish(state)


def check_records(records: RowRecord, prompts: HostPrompts, config: RolloutConfig) -> None:
    """Checks that records are of the rows of these prompts.

    Raises:
      ValueError: an array has another shape or type; the message names it.
    """
    rows, shape = prompts.tokens.shape[0] * config.group_size, static_shape(prompts, config, None)
    expected = jax.eval_shape(lambda: RowRecord.empty(rows, prompts, config, shape))
    described = [
        {jax.tree_util.keystr(path, simple=True, separator="."): (str(x.dtype), tuple(x.shape)) for path, x in leaves}
        for leaves in (jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (records, expected))
    ]
    for name in dict.fromkeys([*described[1], *described[0]]):
        have, wanted = (x.get(name, "nothing") for x in described)
        if have != wanted:
            raise ValueError(
                f"rows that carry over have {have} for {name}, this rollout needs {wanted}: they were begun with another "
                "`group_size`, other limits, tools or shapes of prompts; go on with those, or begin without carried rows"
            )


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
_drop = jax.jit(loop.drop)
_free = jax.jit(lambda state: loop.finished(state) | (state.prompts.length == 0))
_finished = jax.jit(loop.finished)
_finish = jax.jit(loop.finish)


def _list(which: np.ndarray) -> list[int]:
    return np.flatnonzero(which).tolist()


def _same_shapes(state: RolloutState, prompts: HostPrompts) -> None:
    """Raises ValueError if the prompts do not have the shape of the state."""
    expected, shape = state.shape.prompts, prompts.shape
    sizes = lambda x: (x.tokens, x.images, x.height, x.width)
    if sizes(shape) != sizes(expected):
        raise ValueError(f"prompts of {shape} in a rollout of {expected}: build them with `shape=state.shape.prompts`")
    if shape.video > expected.video or shape.patches > expected.patches:
        kind = "videos" if shape.video else "images"
        raise ValueError(f"{kind} in a rollout that began without any: have one among the prompts that it begins with")
    if not np.all(np.asarray(prompts.length) > 0):
        raise ValueError(f"prompts {_list(np.asarray(prompts.length) <= 0)} have no tokens: leave them out")
    if prompts.tables.tools != state.shape.tools or prompts.tables.parser is not state.prompts.tables.parser:
        names = [[tool.name for tool in tools] for tools in (prompts.tables.tools, state.shape.tools)]
        raise ValueError(f"prompts for the tools {names[0]} in a rollout with {names[1]}: build them with its `tables`")


@contextlib.contextmanager
def on_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Sets the mesh, unless the caller has set it, as in a `jax.jit`."""
    if mesh is None or jax.sharding.get_abstract_mesh() == mesh.abstract_mesh:
        yield
    else:
        with jax.set_mesh(mesh):
            yield


# Tokens between two checks for calls of host tools. The more, the more calls are carried out at once, and the longer rows wait.
TOKENS = 64


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
    """Runs a rollout whose tools may run on the host: the steps of `rollout`, driven from the host.

    Rows are only reproducible from the key if the host tools always return the same.

    Args:
      model: as for `rollout`.
      prompts: as for `rollout`; tools may run on the host.
      key: as for `rollout`.
      config: as for `rollout`.
      assistant_prefix: as for `rollout`.
      host: carries out the calls of host tools, concurrently.
      vocabulary: of the tokenizer, to encode what host tools return.

    Returns:
      As `rollout`.

    Raises:
      ValueError: there are host tools, and `host` or `vocabulary` is missing.
    """
    images, has_host_tools = prompts.images, any(tool.host for tool in prompts.tables.tools)
    if has_host_tools and (host is None or vocabulary is None):
        raise ValueError(f"{_of_host(prompts.tables.tools)} run on the host: pass `host` and `vocabulary`")
    state = begin(model, prompts, key, config, assistant_prefix=assistant_prefix)
    while not np.all(finished(state)):
        state = advance(model, state, TOKENS if has_host_tools else None, donate=True)
        if host is not None and vocabulary is not None:
            state = call_host_tools(model, state, images, host, vocabulary)
    return finish(state)


def call_host_tools(
    model: Model, state: RolloutState, images: np.ndarray, host: HostTools, vocabulary: Vocabulary
) -> RolloutState:
    """Carries out the calls of host tools for which rows wait, all at once, and lets the rows read what came back.

    Args:
      model: as for `advance`.
      state: of the rollout.
      images: `Images` [B] of the prompts. They keep the pictures that host tools return.
      host: carries out the calls.
      vocabulary: of the tokenizer.

    Returns:
      The new state.
    """
    calls = host_calls(state, images)
    if not calls:
        return state
    replies = host.call([call.request for call in calls])
    answers = encode_replies(replies, calls, images, state, vocabulary)
    if any(reply.picture is not None for reply in replies):
        state = dataclasses.replace(state, pictures=_pictures(images, state.mesh))
    with on_mesh(state.mesh):
        return _answer(model, state, answers)


def _pictures(images: np.ndarray, mesh: Mesh | None) -> ReturnedPictures:
    """Puts the pictures that host tools have returned to rows of these prompts (`Images` [B]) on the devices."""
    pictures = returned_pictures(images)
    return jax.tree.map(jnp.asarray, pictures) if mesh is None else replicate(pictures, mesh)


class HostRollouts:
    """A function like `rollout`, which runs `host_rollout` with host tools.

    Args:
      host: carries out the calls of host tools.
      vocabulary: of the tokenizer.
    """

    def __init__(self, host: HostTools, vocabulary: Vocabulary):
        self.host, self.vocabulary = host, vocabulary

    def __call__(
        self, model: Model, prompts: HostPrompts, key: jax.Array, config: RolloutConfig, **options
    ) -> Trajectories[VisualRecord]:
        """Runs a rollout; the arguments are those of `rollout`."""
        return host_rollout(model, prompts, key, config, host=self.host, vocabulary=self.vocabulary, **options)

    def metrics(self) -> dict[str, float]:
        """Counts calls of host tools since the last time (`HostTools.metrics`)."""
        return self.host.metrics()


@contextlib.contextmanager
def host_rollouts(
    names: Sequence[str], tools: Sequence[Tool], vocabulary: Vocabulary, config: HostToolsConfig
) -> Iterator[HostRollouts | None]:
    """Yields rollouts with the `tools` of these names, with their worker processes; None if no tool runs on the host.

    Raises:
      ToolError: there are several processes, which would have to wait for one another's tools.
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
    """Lists the names of the host tools."""
    return ", ".join(f"{tool.name!r}" for tool in tools if tool.host)


CACHES_DIVISOR = 3  # the caches of rows in flight may take a device's memory divided by this


def limit_in_flight(
    config: RolloutConfig, model: Model, prompts: HostPrompts, shape: RolloutShape, mesh: Mesh | None
) -> RolloutConfig:
    """Limits the prompts in flight to what fits into the devices' memory, if `config` leaves their number open."""
    batch, width = prompts.tokens.shape
    if config.in_flight is not None:
        return config
    text, itemsize = model.config.text, model.dtype.itemsize
    row, prefix = row_cache_bytes(text, config, itemsize), text.cache_bytes(width + PREFIX_STEP, itemsize)
    group = config.group_size * row + 2 * prefix
    most = max(1, device_memory() // CACHES_DIVISOR // group) * shape.shards
    return config if most >= batch * process_shard(mesh).count else dataclasses.replace(config, in_flight=most)


PREFIX_STEP = 8  # assistant prefixes are padded to a multiple of it, to share a program


def traced_settings(
    config: RolloutConfig, assistant_prefix: Sequence[int]
) -> tuple[jax.Array, jax.Array, RolloutConfig]:
    """Returns assistant prefix (int32 [O]) and temperatures (float32 [2]) as arrays, and the config without them.

    As arrays, other values do not need another compiled program.
    """
    padded = np.full(PREFIX_STEP * max(1, -(-len(assistant_prefix) // PREFIX_STEP)), -1, np.int32)
    padded[: len(assistant_prefix)] = assistant_prefix
    later = config.temperature if config.later_temperature is None else config.later_temperature
    temperature = np.array([config.temperature, later], np.float32)
    same = dataclasses.replace(config, temperature=1.0, later_temperature=None)
    return jnp.asarray(padded), jnp.asarray(temperature), same


def _program_inputs(
    model: Model,
    prompts: HostPrompts,
    key: jax.Array,
    config: RolloutConfig,
    assistant_prefix: Sequence[int],
    shape: RolloutShape,
    mesh: Mesh | None,
) -> tuple[Prompts, jax.Array, jax.Array, jax.Array, RolloutConfig]:
    """Returns the arguments of programs after the model: prompts, key, assistant prefix, temperatures, and the config."""
    config = limit_in_flight(config, model, prompts, shape, mesh)
    prefix, temperature, config = traced_settings(config, assistant_prefix)
    if mesh is not None:
        key, prefix, temperature = replicate((key, prefix, temperature), mesh)
    return put_prompts(prompts, mesh), key, prefix, temperature, config


def layout(model: Model, prompts: HostPrompts, config: RolloutConfig) -> tuple[Mesh | None, RolloutShape]:
    """Returns the mesh of the model's weights (None: one device), and the static shape for it and the prompts.

    Raises:
      ValueError: the prompts cannot be split over the mesh, or the model sees other images than `config` shows.
    """
    sharding = jax.tree.leaves(model)[0].sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 else None
    assert mesh is None or isinstance(mesh, Mesh)  # as that of every array
    shards = row_shards(mesh) if mesh is not None else 1
    batch = prompts.tokens.shape[0] * process_shard(mesh).count
    if batch % shards:
        raise ValueError(f"{batch} prompts cannot be split over data x fsdp = {shards}: pad the batch")
    if config.in_flight is not None and config.in_flight < batch and config.in_flight % shards:
        raise ValueError(f"in_flight {config.in_flight} prompts cannot be split over data x fsdp = {shards}")
    config.check_model(model.config, videos=bool(prompts.shape.video))
    return mesh, static_shape(prompts, config, mesh)


def static_shape(prompts: HostPrompts, config: RolloutConfig, mesh: Mesh | None) -> RolloutShape:
    """Returns the static shape of a rollout of prompts on a mesh."""
    return RolloutShape.of(prompts.shape, config, prompts.tables.tools, 1 if mesh is None else row_shards(mesh))


def put_prompts(prompts: HostPrompts, mesh: Mesh | None) -> Prompts:
    """Puts prompts and their image buffers on the devices; on a mesh, rows are split and tables replicated."""
    buffers = shard_images(prompts.images, prompts.shape, mesh)
    arrays = _with_buffers(prompts, ())
    if mesh is not None:
        rows = shard_batch(arrays._replace(tables=()), mesh)
        arrays = rows._replace(tables=replicate(prompts.tables, mesh))
    return arrays._replace(buffers=buffers)


def _with_buffers(prompts: HostPrompts, buffers) -> Prompts:
    """Returns the fields of the prompts with image buffers instead of images."""
    return Prompts(buffers=buffers, **{name: getattr(prompts, name) for name in Prompts._fields if name != "buffers"})
