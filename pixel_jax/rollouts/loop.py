"""The loop of a rollout, as functions of one state: traced, in one compiled program or in several."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pixel_jax.models.decoder import KVCache, Prefix
from pixel_jax.models.model import Model
from pixel_jax.parallel.sharding import ROWS, constrain, partition_spec
from pixel_jax.rollouts import decode_loop, queue
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.decode_loop import ASKING, WAITING, RowState, Shared
from pixel_jax.rollouts.drawings import Pictures
from pixel_jax.rollouts.materialize import VisualRecord
from pixel_jax.rollouts.queue import Queue
from pixel_jax.rollouts.shapes import RolloutShape
from pixel_jax.rollouts.trajectory import Prompts, Trajectories


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["prompts", "key", "assistant_prefix", "temperature", "queue", "rows", "decoding", "pictures"],
    meta_fields=["key_impl", "config", "shape", "mesh"],
)
@dataclasses.dataclass(frozen=True)
class RolloutState:
    """A rollout between two calls: a pytree of plain arrays, which may go to the host or a file and come back.

    Leading axes: prompts (B), groups of slots and slots; `queue.py` and `decode_loop.py` say which array has which.
    """

    prompts: Prompts  # in B places; one whose prompt has no tokens is empty
    key: jax.Array  # uint32, the data of the key that was given
    assistant_prefix: jax.Array  # int32 [O], what every row's first turn begins with, then -1
    temperature: jax.Array  # float32 [2], of the first turn and of later ones
    queue: Queue  # the prompts that have been read and those that wait, and what rows that are done have left
    rows: RowState  # those that are in slots, with their caches
    decoding: jax.Array  # bool [], the budget ended while rows were writing: that is gone on with before anything else
    pictures: Pictures | None  # that tools of the host have returned; None: none of them returns any
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
) -> RolloutState:
    """Nothing is read, nothing is written."""
    waiting, rows = constrain_rows(queue.start(model, prompts, assistant_prefix, config, shape), mesh)
    return RolloutState(
        prompts,
        jax.random.key_data(key),
        assistant_prefix,
        temperature,
        waiting,
        rows,
        jnp.bool_(False),
        None,
        jax.random.key_impl(key),
        config,
        shape,
        mesh,
    )


def advance(model: Model, state: RolloutState, budget: jax.Array | None) -> RolloutState:
    """Goes on until no row can, or `budget` tokens (int32 []) were decoded in every slot.

    Every predicate is of all rows, so all shards of a mesh turn equally often.
    """
    prompts, config, shape, mesh = state.prompts, state.config, state.shape, state.mesh
    layers = model.unstack()
    key = jax.random.wrap_key_data(state.key, impl=state.key_impl)

    def takes(waiting: Queue, rows: RowState) -> jax.Array:
        return queue.free_slots(waiting, rows, config, shape).takes

    def turn(carry):
        waiting, rows, decoding, left = carry
        # Outside the token loop: in it, the caches would be copied at every token.
        with jax.named_scope("fill"):
            waiting, rows = jax.lax.cond(
                jnp.any(takes(waiting, rows)) & ~decoding,
                lambda carry: queue.refill(model, prompts, state.assistant_prefix, *carry, config, shape),
                lambda carry: carry,
                (waiting, rows),
            )
        waiting, rows = constrain_rows((waiting, rows), mesh)
        keys = decode_loop.row_keys(key, rows, prompts, config, shape)
        shared = Shared(prompts, waiting.prefix, state.temperature, keys, state.pictures)
        rows, left, decoding = decode_loop.decode_turns(
            model, layers, shared, rows, functools.partial(takes, waiting), left, config, shape
        )
        with jax.named_scope("observe"):
            rows = jax.lax.cond(
                jnp.any(rows.status == WAITING) & ~decoding,
                lambda rows: decode_loop.observe(model, layers, shared, rows, config, shape),
                lambda rows: rows,
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


def answer(model: Model, state: RolloutState, replies: decode_loop.Told) -> RolloutState:
    """Rows that ask for tools of the host are answered, see `decode_loop.tell`."""
    config, shape = state.config, state.shape
    key = jax.random.wrap_key_data(state.key, impl=state.key_impl)
    keys = decode_loop.row_keys(key, state.rows, state.prompts, config, shape)
    shared = Shared(state.prompts, state.queue.prefix, state.temperature, keys, state.pictures)
    told = decode_loop.tell(model, model.unstack(), shared, state.rows, replies, config, shape)
    return dataclasses.replace(state, rows=constrain_rows(told, state.mesh))


def admit(state: RolloutState, places: jax.Array, prompts: Prompts) -> RolloutState:
    """The K `prompts` at `places` (int32 [K]), last in the line, in place of what was there."""
    put = lambda old, new: old.at[places].set(new.astype(old.dtype))
    held = jax.tree.map(put, state.prompts._replace(tables=()), prompts._replace(tables=()))
    line, rows = queue.admit(state.queue, state.rows, places, state.config, state.shape)
    held, line, rows = constrain_rows((held, line, rows), state.mesh)
    return dataclasses.replace(state, prompts=held._replace(tables=state.prompts.tables), queue=line, rows=rows)


def finished(state: RolloutState) -> jax.Array:
    """Prompts whose rows are all done: bool [B], whole on every device."""
    return constrain(queue.finished(state.queue, state.rows, state.config, state.shape), state.mesh)


def finish(state: RolloutState) -> Trajectories[VisualRecord]:
    """What all rows have come to."""
    made = queue.finish(state.prompts, state.queue, state.rows, state.config, state.shape)
    return constrain_rows(made, state.mesh)


def constrain_rows(tree, mesh: Mesh | None):
    """Every array of a row-wise state split by rows, keys and values by their heads too, as the layers that write them are."""
    if mesh is None:
        return tree
    is_cache = lambda x: isinstance(x, KVCache | Prefix)

    def split(x):
        if not is_cache(x):
            return constrain(x, mesh, ROWS)
        heads = partition_spec((None, "kv"), x.k[0].shape[:2], mesh)
        by_head = constrain((x.k, x.v), mesh, ROWS, *heads[1:])
        rest = constrain(x._replace(k=(), v=()), mesh, ROWS)
        return rest._replace(k=by_head[0], v=by_head[1])

    return jax.tree.map(split, tree, is_leaf=is_cache)
