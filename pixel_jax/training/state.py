"""The training state, and its model for rollouts: on another mesh, or in a narrower type."""

import functools
import re
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pixel_jax.arrays import Params
from pixel_jax.models.checkpoint import named_weights
from pixel_jax.models.layers import LoRAWeight
from pixel_jax.models.lora import combine, split
from pixel_jax.models.model import Model
from pixel_jax.parallel.processes import broadcast
from pixel_jax.parallel.sharding import is_variable, process_shard, shard, shardings, value_of

T = TypeVar("T")


class TrainState(NamedTuple):
    """The state of training, a pytree. `trainable` and `rest` together are the model."""

    trainable: Params  # {Hugging Face path: weight}, float32 or wider: the weights that the optimiser updates
    rest: Params  # the model without these weights, in its own types
    opt_state: optax.OptState
    step: jax.Array  # int32 []

    @property
    def model(self) -> Model:
        """The whole model. It shares the state's buffers, which are gone after a step that donates the state."""
        return _joined(self.trainable, self.rest)


def _joined(trainable: Params, rest: Params) -> Model:
    """Combines the trained weights and the rest to the model."""
    return combine({path: value_of(weight) for path, weight in trainable.items()}, rest)


def init_state(
    model: Model, optimizer: optax.GradientTransformation, *, trainable: str = ".*", mesh: Mesh | None = None
) -> TrainState:
    """Makes a state at step 0.

    The state shares no arrays with `model`, which stays usable when a step donates the state. Trained weights become float32.

    Args:
        model: the model to train.
        optimizer: makes the state of the weights' moments.
        trainable: regular expression that matches the beginnings of the paths of trained weights. Paths are Hugging Face's:
            `(?!visual)` freezes the vision tower, `.*lora_` trains adapters only.
        mesh: of the arrays; None: one device.

    Raises:
        ValueError: no path matches.
    """
    pattern = re.compile(trainable)
    if not any(pattern.match(path) for _, path, _ in named_weights(model)):
        raise ValueError(f"no weight's path matches trainable = {trainable!r}")
    if mesh is not None:
        model = shard(model, mesh)  # from any other placement
    selected, rest = split(model, lambda path, _: pattern.match(path) is not None)
    # The weights and their moments keep the metadata of the variables, which has their sharding.
    variables = {path: weight for _, path, weight in named_weights(rest) if path in selected}

    def build(selected, rest):
        wide = {path: x.astype(jnp.promote_types(x.dtype, jnp.float32)) for path, x in selected.items()}
        weights = {path: variables[path].replace(x) for path, x in wide.items()}
        return TrainState(weights, rest, optimizer.init(weights), jnp.zeros((), jnp.int32))

    if mesh is None:
        # Committed to a device, as the outputs of a step are: otherwise the second step would be compiled again.
        state = jax.device_put(build(selected, rest), jax.local_devices()[0])
    else:
        state = jax.jit(build, out_shardings=shardings(jax.eval_shape(build, selected, rest), mesh))(selected, rest)
    return jax.tree.map(jnp.copy, state)


def cast(model: T, dtype: str | None) -> T:
    """Casts the base weights of `model` to `dtype`; adapters stay as they are."""
    if dtype is None:
        return model
    return jax.tree.map(
        lambda w: w if isinstance(w, LoRAWeight) else jax.tree.map(lambda x: x.astype(dtype), w),
        model,
        is_leaf=is_variable,
    )


def are_apart(training: Mesh | None, rollouts: Mesh) -> bool:
    """Whether rollouts have devices of their own, rather than those of training.

    Raises:
        ValueError: the meshes overlap in part, or training has no mesh.
    """
    if training is None:
        raise ValueError("rollouts have a mesh and training has none: give both one")
    ours, theirs = (sorted(device.id for device in mesh.devices.flat) for mesh in (training, rollouts))
    if ours != theirs and (shared := sorted({*ours} & {*theirs})):
        raise ValueError(
            f"the mesh of training has the devices {ours}, that of rollouts {theirs}: they share {shared}; give rollouts the "
            "same devices, or none of them"
        )
    if ours == theirs or jax.process_count() == 1:
        return ours != theirs
    here, there = (processes_of(mesh) for mesh in (training, rollouts))
    if here != there and (both := sorted({*here} & {*there})):
        raise ValueError(
            f"the mesh of training has devices of the processes {here}, that of rollouts of {there}: they share {both}; give "
            "both devices of the same processes, or each processes of its own"
        )
    first = {process: min(d.id for d in jax.devices() if d.process_index == process) for process in here}
    if len({*here, *there}) < jax.process_count() or 0 not in here or not {*first.values()} <= {*ours}:
        raise ValueError(
            f"of {jax.process_count()} processes training has {here} and rollouts have {there}: with devices of their own, "
            "each process has a part, and training has process 0 and the first device of each of its processes"
        )
    return True


class Pools(NamedTuple):
    """The processes that train and those that roll out."""

    trainers: tuple[int, ...]
    writers: tuple[int, ...]  # of the rows
    apart: bool  # rollouts have devices of their own

    @classmethod
    def of(cls, training: Mesh | None, rollouts: Mesh | None) -> "Pools":
        """Finds those of two meshes (`are_apart`)."""
        apart = rollouts is not None and are_apart(training, rollouts)
        if training is None:
            return cls((jax.process_index(),), (jax.process_index(),), False)
        return cls(tuple(processes_of(training)), tuple(processes_of(rollouts or training)), apart)

    @property
    def across(self) -> bool:
        """Whether rollouts have processes of their own."""
        return self.trainers != self.writers

    @property
    def trains(self) -> bool:
        """Whether this process trains."""
        return jax.process_index() in self.trainers

    @property
    def rolls(self) -> bool:
        """Whether this process rolls out."""
        return jax.process_index() in self.writers


def processes_of(mesh: Mesh) -> list[int]:
    """The processes that have devices of a mesh."""
    return sorted({device.process_index for device in mesh.devices.flat})


class Resharder:
    """Moves the model of a state from the mesh `source` to the mesh `target`, on the devices.

    Base weights are cast to `dtype` before they move (None: they keep the state's type). It should be the type in which training
    steps compute: a rollout reads the weights for every token, and its caches have the same type.

    Frozen weights are moved once and kept; later only trained weights move. The meshes have the same devices or none in common.
    Between processes weights go over their hosts, one array after another: all of an array is on each device of `source`, and on
    each host, for a moment.
    """

    def __init__(self, source: Mesh | None, target: Mesh | None, dtype: str | None = None):
        self.apart = target is not None and are_apart(source, target)
        if target is not None and not self.apart and process_shard(source)[:2] != process_shard(target)[:2]:
            raise ValueError(
                f"a process has the shard {process_shard(source)[:2]} of a batch in training and "
                f"{process_shard(target)[:2]} in rollouts"
            )
        self.source, self.target = source, None if target == source else target
        self.dtype = dtype
        self.frozen: Any = None

    def __call__(self, state: TrainState) -> Model:
        """The model of `state` on the target mesh. All processes call it."""
        if self.target is None:
            return self._cast(state.model)
        if self.frozen is None:
            # A copy even of weights that are not moved, because the next update donates the state's buffers.
            kept = state.rest if self.apart else jax.tree.map(jax.numpy.copy, state.rest)
            self.frozen = self._moved(self._cast(kept))
        return _joined(self._moved(self._cast(state.trainable)), self.frozen)

    def _moved(self, tree):
        """Moves arrays from the source mesh to the target."""
        assert self.target is not None
        places = shardings(tree, self.target)
        if not self.apart or jax.process_count() == 1:
            return jax.device_put(tree, places)
        source = self.source
        assert source is not None
        # `jax.device_put` to other devices of other processes is not there on CPUs: "The backend does not support cross-host
        # device transfers". Where each process has a part of the source, nothing is sent but among its devices.
        senders = processes_of(source)
        across = senders != processes_of(self.target)
        whole = NamedSharding(source, PartitionSpec())

        def move(x: jax.Array, place: NamedSharding) -> jax.Array:
            everywhere = jax.device_put(x, whole)
            mine = [shard.data for shard in everywhere.addressable_shards[:1]]
            host = np.asarray(mine[0]) if mine else np.zeros(x.shape, x.dtype)
            host = broadcast(host, senders[0]) if across else host
            return jax.make_array_from_callback(x.shape, place, lambda index: host[index], dtype=x.dtype)

        return jax.tree.map(move, tree, places)

    def _cast(self, tree):
        return tree if self.dtype is None else _cast(tree, self.dtype, self.source)


@functools.partial(jax.jit, static_argnames=("dtype", "mesh"))
def _cast(tree, dtype: str, mesh: Mesh | None):
    """Casts each shard on its device. Arrays that have the type already are not copied."""
    narrow = cast(tree, dtype)
    if mesh is None:
        return narrow

    def placed(old: jax.Array, new: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
        return new if old.dtype == new.dtype else jax.lax.with_sharding_constraint(new, sharding)

    return jax.tree.map(placed, tree, narrow, shardings(tree, mesh))
