"""Shardings: one table maps the logical axes of weights to axes of the mesh; rows of batches are split over processes.

A weight declares its logical axes where it declares its shape; nothing else knows how it is sharded. The optimiser's
moments have the same metadata as their weights, so one function shards a model, a training state, or the abstract version of
either.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from pixel_jax.parallel.processes import all_gather, members

T = TypeVar("T")

# As in Megatron, heads and MLP neurons are split over `tensor`; as in ZeRO-3, the width of the model over `fsdp` and `sequence`.
Rules: TypeAlias = Mapping[str, str | tuple[str, ...] | None]
RULES: Rules = {
    "layers": None,
    "vocab": "tensor",
    "embed": ("fsdp", "sequence"),
    "heads": "tensor",
    "kv": "tensor",
    "mlp": "tensor",
    "vision_embed": ("fsdp", "sequence"),
    "vision_heads": "tensor",
    "vision_mlp": "tensor",
    "patch": None,
}
ROWS = ("data", "fsdp")
SEQUENCE = "sequence"


def partition_spec(
    axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, rules: Rules = RULES, name: str = "weight"
) -> PartitionSpec:
    """Returns the sharding of a weight of `shape` with logical `axes`.

    A mesh axis that does not divide its dimension is left out: that dimension is replicated (`undivided` lists such
    weights).

    Raises:
      ValueError: an unknown axis, or two dimensions that the table maps to one axis of the mesh.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{name} has {len(shape)} dimensions {shape} and {len(axes)} logical axes {axes}")
    spec, owner = [], {}
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in rules:
            raise ValueError(f"{name} has the logical axis {axis!r}; the rules know {', '.join(rules)}")
        wanted = rules[axis] if axis is not None else None
        wanted = (wanted,) if isinstance(wanted, str) else tuple(wanted or ())
        used, shards = [], 1
        for mesh_axis in wanted:
            if mesh_axis not in mesh.shape:
                raise ValueError(f"logical axis {axis!r} goes to {mesh_axis!r}, the mesh has {tuple(mesh.shape)}")
            if mesh_axis in owner:
                raise ValueError(f"{name} {axes}: {owner[mesh_axis]!r} and {axis!r} both go to mesh axis {mesh_axis!r}")
            owner[mesh_axis] = axis
            if size % (shards * mesh.shape[mesh_axis]) == 0 and (mesh.shape[mesh_axis] > 1 or len(wanted) == 1):
                used.append(mesh_axis)
                shards *= mesh.shape[mesh_axis]
        spec.append(None if not used else used[0] if len(used) == 1 else tuple(used))
    while spec and spec[-1] is None:  # the canonical form, so that equal shardings compare equal
        spec.pop()
    return PartitionSpec(*spec)


def is_variable(leaf: Any) -> bool:
    """Whether `leaf` is a weight with its metadata (rather than a bare array)."""
    return isinstance(leaf, nnx.Variable)


def value_of(leaf: Any) -> Any:
    """Returns the array, or abstract array, of a weight or of a bare leaf; None for a weight whose value is stored elsewhere."""
    return next(iter(jax.tree.leaves(leaf)), None) if is_variable(leaf) else leaf


def shardings(tree: T, mesh: Mesh, rules: Rules = RULES) -> T:
    """Returns a `NamedSharding` for each array of `tree` (a model, a training state, or `jax.eval_shape` of one).

    Weights are sharded by their logical axes; everything else (steps, counters) is replicated.

    Raises:
      ValueError: a weight declares no logical axes, or they cannot be sharded.
    """

    def sharding(path, leaf):
        if not is_variable(leaf):
            return NamedSharding(mesh, PartitionSpec())
        value, name = value_of(leaf), jax.tree_util.keystr(path, simple=True, separator=".")
        if value is None:
            return leaf
        if "axes" not in leaf.get_metadata():
            raise ValueError(f"{name} ({type(leaf).__name__}) declares no logical axes")
        spec = partition_spec(leaf.axes, value.shape, mesh, rules, name)
        return jax.tree.map(lambda _: NamedSharding(mesh, spec), leaf)

    return jax.tree_util.tree_map_with_path(sharding, tree, is_leaf=is_variable)


def undivided(tree: Any, mesh: Mapping[str, int], rules: Rules = RULES) -> list[str]:
    """Describes the weights of `tree` that are replicated along an axis of `mesh` (its sizes), which does not divide them."""
    problems = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_variable)[0]:
        if not is_variable(leaf) or value_of(leaf) is None:
            continue
        for i, (axis, size) in enumerate(zip(leaf.axes, value_of(leaf).shape, strict=True)):
            wanted, shards = rules[axis] if axis is not None else None, 1
            for mesh_axis in (wanted,) if isinstance(wanted, str) else wanted or ():
                if size % (shards * mesh[mesh_axis]) == 0:
                    shards *= mesh[mesh_axis]
                else:
                    name = jax.tree_util.keystr(path, simple=True, separator=".")
                    problems.append(
                        f"{name} dimension {i} ({axis} = {size}) is not divisible by {mesh_axis} = "
                        f"{mesh[mesh_axis]}: replicated"
                    )
    return problems


def shard(tree: T, mesh: Mesh, rules: Rules = RULES) -> T:
    """Puts `tree` on `mesh`, sharded. With several processes, arrays that are not on it yet must be the same in each."""
    return jax.tree.map(_put, tree, shardings(tree, mesh, rules))


def replicate(tree: T, mesh: Mesh) -> T:
    """Puts `tree`, which is the same in every process, on every device of `mesh`."""
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, PartitionSpec())), tree)


def _put(x, sharding: NamedSharding) -> jax.Array:
    if jax.process_count() == 1 or isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index], dtype=x.dtype)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits rows (the leading axis) over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


class ProcessShard(NamedTuple):
    """The rows of every batch that this process has: shard `index` of `count` equal ones.

    Processes whose devices only differ along `sequence` or `tensor` have the same shard.
    """

    # They hide the methods of tuples of these names, which nobody calls on a shard.
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    blocks: tuple[int, ...]  # indices of its rows among the blocks that data x fsdp cuts a batch into; may have gaps
    processes: tuple[tuple[int, ...], ...]  # of each shard, the processes that have it


WHOLE = ProcessShard(0, 1, (0,), ((0,),))  # of a single process
NONE = ProcessShard(-1, 1, (), ())  # of a process that has no part in a mesh, and no rows


def process_shard(mesh: Mesh | None) -> ProcessShard:
    """Returns the rows of a batch that this process feeds; without a mesh, all of them.

    Raises:
      ValueError: the mesh has no device of this process, or gives processes different numbers of rows.
    """
    if mesh is None:
        return WHOLE
    grid = mesh.devices.reshape(row_shards(mesh), -1)
    holders: dict[int, list[int]] = {}
    for block, devices in enumerate(grid):
        for process in sorted({device.process_index for device in devices}):
            holders.setdefault(process, []).append(block)
    if jax.process_index() not in holders:
        raise ValueError(
            f"mesh {dict(mesh.shape)} has {mesh.devices.size} devices of {jax.device_count()}, none of them in process "
            f"{jax.process_index()} of {jax.process_count()}"
        )
    shards = sorted({tuple(blocks) for blocks in holders.values()})
    if len({len(blocks) for blocks in shards}) > 1 or sum(map(len, shards)) != len(grid):
        raise ValueError(f"mesh {dict(mesh.shape)} does not give every process the same number of rows: {holders}")
    processes = tuple(tuple(p for p, blocks in sorted(holders.items()) if tuple(blocks) == own) for own in shards)
    mine = tuple(holders[jax.process_index()])
    return ProcessShard(shards.index(mine), len(shards), mine, processes)


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Returns how many shards the rows of a batch are split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def shard_rows(read: Callable[[slice], np.ndarray], rows: int, mesh: Mesh | None) -> jax.Array:
    """Reads an array onto the devices, split by rows, without having more than the rows of one device on the host.

    Args:
      read: returns the rows of a slice: [n, ...].
      rows: number of rows; with several processes, those of this process.
      mesh: None: one device.

    Returns:
      [R, ...], the rows of all processes.

    Raises:
      ValueError: the rows cannot be split over the mesh.
    """
    if mesh is None:
        return jnp.asarray(read(slice(0, rows)))
    shards, mine = row_shards(mesh), process_shard(mesh)
    if rows * mine.count % shards:
        raise ValueError(f"{rows * mine.count} rows cannot be split over data x fsdp = {shards}; pad the batch")
    size = rows * mine.count // shards

    @functools.lru_cache(maxsize=1)  # devices that share rows are neighbours: reading once is enough for them
    def block(start: int) -> np.ndarray:
        return read(slice(start, start + size))

    def block_of(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # that of a scalar
        return block(mine.blocks.index((index[0].start or 0) // size) * size)

    return jax.make_array_from_callback((rows * mine.count, *block(0).shape[1:]), batch_sharding(mesh), block_of)


def shard_batch(batch: T, mesh: Mesh) -> T:
    """Puts host arrays [rows, ...] on `mesh`, split by rows. With several processes, each has its own rows (`ProcessShard`).

    Raises:
      ValueError: the rows cannot be split over the mesh.
    """
    sharding, shards = batch_sharding(mesh), row_shards(mesh)

    def put(x):
        if not isinstance(x, jax.Array) or (jax.process_count() > 1 and x.is_fully_addressable):
            x = np.asarray(x) if isinstance(x, jax.Array) else x
            return shard_rows(x.__getitem__, len(x), mesh)
        if len(x) % shards:
            raise ValueError(f"{len(x)} rows cannot be split over data x fsdp = {shards}; pad the batch")
        return jax.device_put(x, sharding)

    return jax.tree.map(put, batch)


def local_rows(x: Any) -> np.ndarray:
    """Returns this process's rows of an array that is sharded by `shard_batch`, whose inverse it is."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    blocks = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(blocks[start]) for start in sorted(blocks)])


def all_rows(tree: T, shard: ProcessShard) -> T:
    """Gathers the rows of host arrays [rows, ...] of all shards, in order, on every process. All processes call it."""
    if shard.count == 1:
        return jax.tree.map(np.asarray, tree)
    group = members()
    leaders = [group.index(processes[0]) for processes in shard.processes]
    return jax.tree.map(lambda x: np.concatenate(all_gather(x)[leaders]), tree)


def keep_rows(x: jax.Array) -> jax.Array:
    """Keeps activations [rows, positions, width] split by rows, where a mesh is set (`jax.set_mesh`, or in a step).

    Weights and rows are split over the same axis. Without this constraint the compiler multiplies all rows with shards of the
    weights and adds up activations on every device, instead of gathering a layer's weights.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(ROWS) <= set(mesh.axis_names) or x.shape[0] % math.prod(mesh.shape[a] for a in ROWS):
        return x
    free = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS, free, None))


def keep_vocabulary(weight: jax.Array) -> jax.Array:
    """Keeps an embedding [vocab, width] split by words only, where a mesh is set.

    If its width were split, the tokens of all rows would be gathered on every device, and split by rows again.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axis = RULES["vocab"]
    if mesh.empty or axis not in mesh.axis_names or weight.shape[0] % mesh.shape[axis]:
        return weight
    return jax.lax.with_sharding_constraint(weight, PartitionSpec(axis, None))


def copies(tree: T, mesh: Mesh, shards: tuple[int, int]) -> T:
    """Inside a jitted function, copies the weights of `tree` for each shard of rows and of positions: [...] -> [*shards, ...].

    A device has the copy of its own shard, split over `tensor` only. So the weights are gathered once, however often they are
    used, and their gradients are added up on each device before they are added up over devices.
    """
    rules = {**RULES, **{axis: None for axis, mesh_axis in RULES.items() if mesh_axis != "tensor"}}

    def copy(weight):
        spec = partition_spec(weight.axes, value_of(weight).shape, mesh, rules)
        sharding = NamedSharding(mesh, PartitionSpec(ROWS, SEQUENCE, *spec))
        spread = lambda x: jax.lax.with_sharding_constraint(jnp.broadcast_to(x, (*shards, *x.shape)), sharding)
        return jax.tree.map(spread, weight)

    return jax.tree.map(copy, tree, is_leaf=is_variable)


def constrain(tree: T, mesh: Mesh | None, *spec) -> T:
    """Inside a jitted function, constrains every array of `tree` to `PartitionSpec(*spec)`; without a mesh, returns `tree`."""
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding), tree)


def sequence_shards(mesh: Mesh | AbstractMesh | None) -> int:
    """Returns how many shards the positions of a row are split into in training; 1 without a mesh or without the axis."""
    return 1 if mesh is None else mesh.shape.get(SEQUENCE, 1)


def split_sequence(tree: T, mesh: Mesh | None, *spec) -> T:
    """Constrains `tree` as `constrain` does where the positions of a row are split; elsewhere, returns `tree`."""
    return constrain(tree, mesh, *spec) if sequence_shards(mesh) > 1 else tree
