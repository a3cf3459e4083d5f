"""The training state, and the policy in it as a rollout reads it: on another mesh, or in a narrower type."""

import functools
import re
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pixel_jax.models.checkpoint import named_weights
from pixel_jax.models.layers import LoRAWeight
from pixel_jax.models.lora import combine, split
from pixel_jax.parallel.sharding import is_variable, process_shard, shard, shardings, value_of

T = TypeVar("T")


class TrainState(NamedTuple):
    """A pytree; `trainable` and `rest` are the two halves of the model."""

    trainable: dict[str, Any]  # weights by Hugging Face path, float32 (or wider): what the optimiser moves
    rest: Any  # the model without them, in the type it came in
    opt_state: optax.OptState
    step: jax.Array  # int32 []

    @property
    def model(self):
        """The whole model, of the same buffers: a step that donates this state takes them away."""
        return combine({path: value_of(weight) for path, weight in self.trainable.items()}, self.rest)


def init_state(
    model: T, optimizer: optax.GradientTransformation, *, trainable: str = ".*", mesh: Mesh | None = None
) -> TrainState:
    """A state at step 0 that trains the weights whose path matches the regular expression `trainable` (from its start).

    Paths are Hugging Face's: `(?!visual)` freezes the vision tower, `.*lora_` trains adapters only. Weights to be trained
    become float32. The state gets arrays of its own: `model` stays usable when a step donates the state.
    """
    pattern = re.compile(trainable)
    if not any(pattern.match(path) for _, path, _ in named_weights(model)):
        raise ValueError(f"no weight's path matches trainable = {trainable!r}")
    if mesh is not None:
        model = shard(model, mesh)  # wherever it was read to
    selected, rest = split(model, lambda path, _: pattern.match(path) is not None)
    # The weights keep their metadata (and hand it on to their moments): it says where they lie on the mesh.
    places = {path: weight for _, path, weight in named_weights(rest) if path in selected}

    def build(selected, rest):
        wide = {path: x.astype(jnp.promote_types(x.dtype, jnp.float32)) for path, x in selected.items()}
        weights = {path: places[path].replace(x) for path, x in wide.items()}
        return TrainState(weights, rest, optimizer.init(weights), jnp.zeros((), jnp.int32))

    if mesh is None:
        # Bound to a device, as what a step returns is: otherwise the second step would be compiled once more.
        state = jax.device_put(build(selected, rest), jax.local_devices()[0])
    else:
        state = jax.jit(build, out_shardings=shardings(jax.eval_shape(build, selected, rest), mesh))(selected, rest)
    return jax.tree.map(jnp.copy, state)


def cast(model, dtype: str | None):
    """`model` with its base weights in `dtype`; adapters stay as they are."""
    if dtype is None:
        return model
    return jax.tree.map(
        lambda w: w if isinstance(w, LoRAWeight) else jax.tree.map(lambda x: x.astype(dtype), w),
        model,
        is_leaf=is_variable,
    )


class Resharder:
    """Called with a state, gives its model on the mesh `target`, moved there from `source` on the devices.

    Base weights are in `dtype` (None: as the state has them), the type in which training steps compute: a rollout reads
    them for every token, and its caches are of the same type. They are cast before they move.

    Frozen weights are moved once and kept: after that, what is trained (all weights, or adapters only) is all that moves.
    Both meshes have the same devices, and every process has the same share of a batch's rows on both.
    """

    def __init__(self, source: Mesh | None, target: Mesh | None, dtype: str | None = None):
        if target is not None and (source is None or source.devices.size != target.devices.size):
            raise ValueError("rollouts can only lie on another mesh of the same devices as the training's")
        if target is not None and process_shard(source)[:2] != process_shard(target)[:2]:
            raise ValueError(
                f"a process has the shard {process_shard(source)[:2]} of a batch in training, {process_shard(target)[:2]} in rollouts"
            )
        self.source, self.target = source, None if target == source else target
        self.dtype = dtype
        self.frozen: Any = None

    def __call__(self, state: TrainState):
        if self.target is None:
            return self._cast(state.model)
        if self.frozen is None:
            # A copy even of what lies right already: the next update takes the state's buffers away.
            copied = self._cast(jax.tree.map(jax.numpy.copy, state.rest))
            self.frozen = jax.device_put(copied, shardings(copied, self.target))
        trainable = self._cast(state.trainable)
        trainable = jax.device_put(trainable, shardings(trainable, self.target))
        return combine({path: value_of(weight) for path, weight in trainable.items()}, self.frozen)

    def _cast(self, tree):
        return tree if self.dtype is None else _cast(tree, self.dtype, self.source)


@functools.partial(jax.jit, static_argnames=("dtype", "mesh"))
def _cast(tree, dtype: str, mesh: Mesh | None):
    """Each device casts its part. What is of that type already is handed on, not copied."""
    narrow = cast(tree, dtype)
    if mesh is None:
        return narrow
    keep = lambda x, y, place: y if x.dtype == y.dtype else jax.lax.with_sharding_constraint(y, place)
    return jax.tree.map(keep, tree, narrow, shardings(tree, mesh))
