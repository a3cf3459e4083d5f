"""From the logical axes of a weight to its place on the mesh, through one table.

A weight declares its logical axes where it declares its shape; nothing else knows how it is sharded. The optimiser's
moments have the same metadata as the weights they belong to, so one function places a model, a training state, or the
abstract version of either.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pixel_jax.parallel.processes import all_gather

T = TypeVar("T")

# Megatron over `tensor` (what a head or an MLP neuron owns), ZeRO-3 over `fsdp` and `sequence` (the width that all share).
RULES: Mapping[str, str | tuple[str, ...] | None] = {
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


def partition_spec(axes: tuple, shape: tuple[int, ...], mesh: Mesh, rules=RULES, name: str = "weight") -> PartitionSpec:
    """Where a weight of `shape` with logical `axes` lies.

    A mesh axis that does not divide its dimension is left out: that dimension is replicated (`undivided` lists such
    weights). A mesh axis that two dimensions ask for is an error of the table.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{name} has {len(shape)} dimensions {shape} and {len(axes)} logical axes {axes}")
    spec, owner = [], {}
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in rules:
            raise ValueError(f"{name} has the logical axis {axis!r}; the rules know {', '.join(rules)}")
        wanted = rules[axis] if axis is not None else None
        wanted = (wanted,) if isinstance(wanted, str) else tuple(wanted or ())
        kept, parts = [], 1
        for mesh_axis in wanted:
            if mesh_axis not in mesh.shape:
                raise ValueError(f"logical axis {axis!r} goes to {mesh_axis!r}, the mesh has {tuple(mesh.shape)}")
            if mesh_axis in owner:
                raise ValueError(f"{name} {axes}: {owner[mesh_axis]!r} and {axis!r} both go to mesh axis {mesh_axis!r}")
            owner[mesh_axis] = axis
            if size % (parts * mesh.shape[mesh_axis]) == 0 and (mesh.shape[mesh_axis] > 1 or len(wanted) == 1):
                kept.append(mesh_axis)
                parts *= mesh.shape[mesh_axis]
        spec.append(None if not kept else kept[0] if len(kept) == 1 else tuple(kept))
    while spec and spec[-1] is None:  # the canonical form, so that equal placements compare equal
        spec.pop()
    return PartitionSpec(*spec)


def is_variable(leaf: Any) -> bool:
    """Whether `leaf` is a weight with its metadata (rather than a bare array)."""
    return isinstance(leaf, nnx.Variable)


def value_of(leaf: Any) -> Any:
    """The array, or abstract array, of a weight or of a bare leaf; None for a weight whose value is kept elsewhere."""
    return next(iter(jax.tree.leaves(leaf)), None) if is_variable(leaf) else leaf


def shardings(tree: T, mesh: Mesh, rules=RULES) -> T:
    """A `NamedSharding` for each array of `tree` (a model, a training state, or `jax.eval_shape` of one).

    Weights go where their logical axes say; everything else (steps, counters) is replicated.
    """

    def place(path, leaf):
        if not is_variable(leaf):
            return NamedSharding(mesh, PartitionSpec())
        value, name = value_of(leaf), jax.tree_util.keystr(path, simple=True, separator=".")
        if value is None:
            return leaf
        if "axes" not in leaf.get_metadata():
            raise ValueError(f"{name} ({type(leaf).__name__}) declares no logical axes")
        spec = partition_spec(leaf.axes, value.shape, mesh, rules, name)
        return jax.tree.map(lambda _: NamedSharding(mesh, spec), leaf)

    return jax.tree_util.tree_map_with_path(place, tree, is_leaf=is_variable)


def undivided(tree: Any, mesh: Mapping[str, int], rules=RULES) -> list[str]:
    """The weights of `tree` that are replicated along an axis of `mesh` (its sizes) that does not divide them, in words."""
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_variable)[0]:
        if not is_variable(leaf) or value_of(leaf) is None:
            continue
        for i, (axis, size) in enumerate(zip(leaf.axes, value_of(leaf).shape, strict=True)):
            wanted, parts = rules[axis] if axis is not None else None, 1
            for mesh_axis in (wanted,) if isinstance(wanted, str) else wanted or ():
                if size % (parts * mesh[mesh_axis]) == 0:
                    parts *= mesh[mesh_axis]
                else:
                    name = jax.tree_util.keystr(path, simple=True, separator=".")
                    found.append(
                        f"{name} dimension {i} ({axis} = {size}) is not divisible by {mesh_axis} = "
                        f"{mesh[mesh_axis]}: replicated"
                    )
    return found


def shard(tree: T, mesh: Mesh, rules=RULES) -> T:
    """`tree` laid out on `mesh`. With several processes what is not on it yet is the same in each of them."""
    return jax.tree.map(_put, tree, shardings(tree, mesh, rules))


def replicate(tree: T, mesh: Mesh) -> T:
    """`tree`, the same in every process, whole on every device of `mesh`."""
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, PartitionSpec())), tree)


def _put(x, sharding: NamedSharding) -> jax.Array:
    if jax.process_count() == 1 or isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (the leading axis) over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


class ProcessShard(NamedTuple):
    """Part `index` of `count` equal parts of every batch is this process's.

    Processes whose devices only differ along `sequence` or `tensor` have the same part.
    """

    index: int
    count: int
    blocks: tuple[int, ...]  # its rows' places among the blocks that data x fsdp cuts a batch into; may have gaps
    processes: tuple[tuple[int, ...], ...]  # of each part, the processes that have it


WHOLE = ProcessShard(0, 1, (0,), ((0,),))  # of a process on its own


def process_shard(mesh: Mesh | None) -> ProcessShard:
    """The rows of a batch that this process feeds; without a mesh all of them."""
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
    parts = sorted({tuple(blocks) for blocks in holders.values()})
    if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != len(grid):
        raise ValueError(f"mesh {dict(mesh.shape)} does not give every process the same number of rows: {holders}")
    processes = tuple(tuple(p for p, blocks in sorted(holders.items()) if tuple(blocks) == part) for part in parts)
    mine = tuple(holders[jax.process_index()])
    return ProcessShard(parts.index(mine), len(parts), mine, processes)


def row_shards(mesh: Mesh) -> int:
    """How many parts the rows of a batch are cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def shard_rows(read: Callable[[slice], np.ndarray], rows: int, mesh: Mesh | None) -> jax.Array:
    """An array on the devices of which the host never has more than the rows of one: `read(part)` gives rows of `rows`.

    With several processes each reads its `share` of the rows, `rows` being how many that is.
    """
    if mesh is None:
        return jnp.asarray(read(slice(0, rows)))
    parts, mine = row_shards(mesh), process_shard(mesh)
    if rows * mine.count % parts:
        raise ValueError(f"{rows * mine.count} rows cannot be split over data x fsdp = {parts}; pad the batch")
    size = rows * mine.count // parts
    # Devices that share rows are neighbours: one reading is enough for them.
    block = functools.lru_cache(maxsize=1)(lambda at: read(slice(at, at + size)))
    at = lambda index: mine.blocks.index((index[0].start or 0) // size) * size
    shape = (rows * mine.count, *block(0).shape[1:])
    return jax.make_array_from_callback(shape, batch_sharding(mesh), lambda index: block(at(index)))


def shard_batch(batch: T, mesh: Mesh) -> T:
    """Host arrays with a leading row axis, on `mesh`. With several processes each brings its `share` of the rows."""
    sharding, parts = batch_sharding(mesh), row_shards(mesh)

    def put(x):
        if not isinstance(x, jax.Array) or (jax.process_count() > 1 and x.is_fully_addressable):
            x = np.asarray(x) if isinstance(x, jax.Array) else x
            return shard_rows(x.__getitem__, len(x), mesh)
        if len(x) % parts:
            raise ValueError(f"{len(x)} rows cannot be split over data x fsdp = {parts}; pad the batch")
        return jax.device_put(x, sharding)

    return jax.tree.map(put, batch)


def local_rows(x: Any) -> np.ndarray:
    """This process's share of the rows of an array that lies on a mesh as `shard_batch` lays it; the inverse of that."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    blocks = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(blocks[start]) for start in sorted(blocks)])


def all_rows(tree: T, part: ProcessShard) -> T:
    """Every process's rows of host arrays, on every process: part 0's, then part 1's, ... All processes call it."""
    if part.count == 1:
        return jax.tree.map(np.asarray, tree)
    leaders = [processes[0] for processes in part.processes]
    return jax.tree.map(lambda x: np.concatenate(all_gather(x)[leaders]), tree)


def keep_rows(x: jax.Array) -> jax.Array:
    """Activations [rows, positions, width] split by rows, where a mesh is set (`jax.set_mesh`, or in a step); else unchanged.

    Weights and rows are split over the same axis. Left to itself the compiler multiplies all rows with parts of the
    weights and adds up activations on every device, instead of gathering a layer's weights.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(ROWS) <= set(mesh.axis_names) or x.shape[0] % math.prod(mesh.shape[a] for a in ROWS):
        return x
    free = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS, free, None))


def keep_vocabulary(weight: jax.Array) -> jax.Array:
    """An embedding [vocab, width] split by words alone, where a mesh is set; else unchanged.

    Looked up in parts of the width, the tokens of all rows would be gathered on every device, to be split by rows again.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axis = RULES["vocab"]
    if mesh.empty or axis not in mesh.axis_names or weight.shape[0] % mesh.shape[axis]:
        return weight
    return jax.lax.with_sharding_constraint(weight, PartitionSpec(axis, None))


def copies(tree: T, mesh: Mesh, parts: tuple[int, int]) -> T:
    """Inside a jitted function: weights of `tree` [...] -> [*parts, ...], a copy for each part of rows and of positions.

    A device has the copy of its own part, split over `tensor` only: the weights are gathered once, however often they are
    used, and their gradients are added up on each device before the devices' sums are.
    """
    rules = {**RULES, **{axis: None for axis, place in RULES.items() if place != "tensor"}}

    def copy(weight):
        spec = partition_spec(weight.axes, value_of(weight).shape, mesh, rules)
        place = NamedSharding(mesh, PartitionSpec(ROWS, SEQUENCE, *spec))
        spread = lambda x: jax.lax.with_sharding_constraint(jnp.broadcast_to(x, (*parts, *x.shape)), place)
        return jax.tree.map(spread, weight)

    return jax.tree.map(copy, tree, is_leaf=is_variable)


def constrain(tree: T, mesh: Mesh | None, *spec) -> T:
    """Inside a jitted function: every array of `tree` laid out by `PartitionSpec(*spec)`. Without a mesh, unchanged."""
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding), tree)


def sequence_shards(mesh: Mesh | None) -> int:
    """How many parts the positions of a row are cut into in training; 1 without a mesh or without the axis."""
    return 1 if mesh is None else mesh.shape.get(SEQUENCE, 1)


def split_sequence(tree: T, mesh: Mesh | None, *spec) -> T:
    """`constrain`, where the positions of a row are split; elsewhere unchanged."""
    return constrain(tree, mesh, *spec) if sequence_shards(mesh) > 1 else tree
