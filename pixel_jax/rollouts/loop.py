"""The loop of a rollout as traced functions of one state, for one compiled program or for several."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pixel_jax.models.decoder import KVCache, Prefix
from pixel_jax.models.delta_rule import RecurrentState
from pixel_jax.models.model import Model
from pixel_jax.parallel.sharding import ROWS, constrain, partition_spec
from pixel_jax.rollouts import decode_loop, queue
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.decode_loop import ASKING, WAITING, RowState, Shared
from pixel_jax.rollouts.drawings import ReturnedPictures
from pixel_jax.rollouts.layers import decoding_layers
from pixel_jax.rollouts.materialize import VisualRecord
from pixel_jax.rollouts.queue import Queue, RowRecord
from pixel_jax.rollouts.shapes import RolloutShape
from pixel_jax.rollouts.trajectory import Prompts, Trajectories

T = TypeVar("T")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "prompts",
        "key",
        "assistant_prefix",
        "temperature",
        "temperatures",
        "queue",
        "rows",
        "decoding",
        "pictures",
    ],
    meta_fields=["key_impl", "config", "shape", "mesh"],
)
@dataclasses.dataclass(frozen=True)
class RolloutState:
    """The state of a rollout between two calls: a pytree of arrays, which can be moved to the host or a file and back.

    Leading axes are prompts (B), groups of slots, or slots; see `queue.py` and `decode_loop.py`.
    """

    prompts: Prompts  # B; those without tokens are empty
    key: jax.Array  # uint32, the data of the random key
    assistant_prefix: jax.Array  # int32 [O], the beginning of every row's first turn, padded with -1
    # float32 [2], of the first turn and of later ones, for prompts that are admitted without temperatures
    temperature: jax.Array
    temperatures: jax.Array  # float32 [B, 2], the temperatures of each prompt
    queue: Queue  # prompts that have been read and that wait, and the output of rows that are done
    rows: RowState  # the rows in slots, with their caches
    decoding: jax.Array  # bool [], the budget ended while rows were writing, which must go on first
    pictures: ReturnedPictures | None  # of host tools; None: no host tool returns any
    key_impl: str
    config: RolloutConfig
    shape: RolloutShape
    mesh: Mesh | None


def start(
    model: Model,
    prompts: Prompts,
    key: jax.Array,
    assistant_prefix: jax.Array,
    temperature: jax.Array,
    config: RolloutConfig,
    shape: RolloutShape,
    mesh: Mesh | None,
    records: RowRecord | None = None,
) -> RolloutState:
    """Returns the state of a rollout at the start; with `records` of its rows, these go on from there."""
    temperatures = jnp.broadcast_to(temperature, (prompts.length.shape[0], 2))
    waiting, rows = queue.start(model, prompts, assistant_prefix, config, shape, records)
    waiting, rows, temperatures = constrain_rows((waiting, rows, temperatures), mesh)
    return RolloutState(
        prompts,
        jax.random.key_data(key),
        assistant_prefix,
        temperature,
        temperatures,
        waiting,
        rows,
        jnp.bool_(False),
        None,
        cast(str, jax.random.key_impl(key)),  # the registered implementations are strings
        config,
        shape,
        mesh,
    )


def advance(model: Model, state: RolloutState, budget: jax.Array | None) -> RolloutState:
    """Goes on until no row can, or until `budget` tokens (int32 []; None: no limit) were decoded in every slot.

    Conditions of loops depend on all rows, so that loops turn equally often on all devices.
    """
    prompts, config, shape, mesh = state.prompts, state.config, state.shape, state.mesh
    layers = decoding_layers(model, config)
    key = jax.random.wrap_key_data(state.key, impl=state.key_impl)

    def takes(waiting: Queue, rows: RowState) -> jax.Array:
        return queue.free_slots(waiting, rows, config, shape).takes

    def turn(carry):
        waiting, rows, decoding, left = carry
        # This is outside the token loop, where the caches would be copied at every token.
        with jax.named_scope("fill"):
            waiting, rows = when(
                jnp.any(takes(waiting, rows)) & ~decoding,
                lambda carry: queue.refill(model, prompts, state.assistant_prefix, carry[0], carry[1], config, shape),
                (waiting, rows),
            )
        waiting, rows = constrain_rows((waiting, rows), mesh)
        keys = decode_loop.row_keys(key, rows, prompts, config, shape)
        temperature = decode_loop.rows_prompts(rows, prompts, config, shape).take(state.temperatures)
        shared = Shared(prompts, waiting.prefix, temperature, keys, state.pictures)
        if waiting.members is not None:
            rows = when(
                jnp.any(decode_loop.unread(rows, state.assistant_prefix)),
                lambda rows: decode_loop.reread(model, layers, shared, rows, state.assistant_prefix, config, shape),
                rows,
            )
            rows = constrain_rows(rows, mesh)
        rows, left, decoding = decode_loop.decode_turns(
            model, layers, shared, rows, functools.partial(takes, waiting), left, config, shape
        )
        with jax.named_scope("observe"):
            rows = when(
                jnp.any(rows.status == WAITING) & ~decoding,
                lambda rows: decode_loop.observe(model, layers, shared, rows, config, shape),
                rows,
            )
        return waiting, constrain_rows(rows, mesh), decoding, left

    def going(carry) -> jax.Array:
        waiting, rows, _, left = carry
        work = jnp.any(rows.status < ASKING) | jnp.any(takes(waiting, rows))
        return work if left is None else work & (left > 0)

    with jax.named_scope("turns"):
        carry = state.queue, state.rows, state.decoding, budget
        waiting, rows, decoding, _ = jax.lax.while_loop(going, turn, carry)
    return dataclasses.replace(state, queue=waiting, rows=rows, decoding=decoding)


def when(condition: jax.Array, change: Callable[[T], T], state: T) -> T:
    """Returns `change(state)` where the condition (bool []) holds, else the state.

    It is a loop of at most one turn, because a loop updates its state in place. `jax.lax.cond` does not on GPUs: there both
    branches copy the caches of all rows.
    """

    def turn(carry):
        return jnp.bool_(False), change(carry[1])

    return jax.lax.while_loop(lambda carry: carry[0], turn, (condition, state))[1]


def answer(model: Model, state: RolloutState, replies: decode_loop.HostAnswers) -> RolloutState:
    """Answers rows that ask for host tools (`decode_loop.answer_host_calls`)."""
    config, shape = state.config, state.shape
    key = jax.random.wrap_key_data(state.key, impl=state.key_impl)
    keys = decode_loop.row_keys(key, state.rows, state.prompts, config, shape)
    temperature = decode_loop.rows_prompts(state.rows, state.prompts, config, shape).take(state.temperatures)
    shared = Shared(state.prompts, state.queue.prefix, temperature, keys, state.pictures)
    rows = decode_loop.answer_host_calls(
        model, decoding_layers(model, config), shared, state.rows, replies, config, shape
    )
    return dataclasses.replace(state, rows=constrain_rows(rows, state.mesh))


def admit(state: RolloutState, indices: jax.Array, prompts: Prompts, temperatures: jax.Array) -> RolloutState:
    """Replaces the prompts with `indices` (int32 [K]) by K new `prompts`, at the end of the queue.

    Their `temperatures` are float32 [K, 2].
    """
    put = lambda old, new: old.at[indices].set(new.astype(old.dtype))
    batch = jax.tree.map(put, state.prompts._replace(tables=()), prompts._replace(tables=()))
    waiting, rows = queue.admit(state.queue, state.rows, indices, state.config, state.shape)
    temperatures = put(state.temperatures, temperatures)
    batch, waiting, rows, temperatures = constrain_rows((batch, waiting, rows, temperatures), state.mesh)
    prompts = batch._replace(tables=state.prompts.tables)
    return dataclasses.replace(state, prompts=prompts, temperatures=temperatures, queue=waiting, rows=rows)


def drop(state: RolloutState, indices: jax.Array) -> RolloutState:
    """Empties the prompts with `indices` (int32 [K]) and frees the slots of their rows."""
    prompts, names = state.prompts, ("length", "image_counts", "image_sizes")
    emptied = {name: getattr(prompts, name).at[indices].set(0) for name in names}
    waiting, rows = queue.drop(state.queue, state.rows, indices, state.config, state.shape)
    emptied, waiting, rows = constrain_rows((emptied, waiting, rows), state.mesh)
    return dataclasses.replace(state, prompts=prompts._replace(**emptied), queue=waiting, rows=rows)


def finished(state: RolloutState) -> jax.Array:
    """Says which prompts have no row left to write: bool [B], replicated."""
    return constrain(queue.finished(state.queue, state.rows, state.config, state.shape), state.mesh)


def settle(state: RolloutState) -> RolloutState:
    """Ends the rows whose turns have ended without a call (`decode_loop.settle`)."""
    rows = decode_loop.settle(state.rows, state.prompts.tables.parser)
    return dataclasses.replace(state, rows=constrain_rows(rows, state.mesh))


def unfinished(state: RolloutState) -> jax.Array:
    """Counts the rows that are not done, apart from those that `settle` would end: int32 []."""
    return constrain(jnp.sum(records(settle(state)).stop < 0, dtype=jnp.int32), state.mesh)


def records(state: RolloutState) -> RowRecord:
    """Returns the records of all rows of a rollout that began with records."""
    return constrain_rows(queue.records(state.queue, state.rows, state.shape), state.mesh)


def finish(state: RolloutState) -> Trajectories[VisualRecord]:
    """Returns the trajectories of all rows."""
    trajectories = queue.finish(state.prompts, state.queue, state.rows, state.config, state.shape)
    return constrain_rows(trajectories, state.mesh)


def constrain_rows(tree: T, mesh: Mesh | None) -> T:
    """Splits every array of `tree` by rows; keys, values and recurrent states, too, as the layers that write them are split."""
    if mesh is None:
        return tree

    def is_cache(x: Any) -> TypeGuard[KVCache | Prefix]:
        return isinstance(x, KVCache | Prefix)

    def split(x):
        if not is_cache(x):
            return constrain(x, mesh, ROWS)
        heads = partition_spec((None, "kv"), x.k[0].shape[:2], mesh)
        by_head = constrain((x.k, x.v), mesh, ROWS, *heads[1:])
        states = tuple(RecurrentState(by_width(s.tail, -1), by_width(s.memory, -3)) for s in x.recurrent)
        rest = constrain(x._replace(k=(), v=(), recurrent=()), mesh, ROWS)
        return rest._replace(k=by_head[0], v=by_head[1], recurrent=states)

    def by_width(x, axis: int):
        names = [None] * x.ndim
        names[axis] = "heads"
        return constrain(x, mesh, ROWS, *partition_spec(tuple(names), x.shape, mesh)[1:])

    return jax.tree.map(split, tree, is_leaf=is_cache)
