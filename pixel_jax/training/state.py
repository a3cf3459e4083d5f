"""The training state, and its policy as a rollout reads it: on another mesh, or in a narrower type."""

import functools
import re
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pixel_jax.arrays import Params
from pixel_jax.models.checkpoint import named_weights
from pixel_jax.models.layers import LoRAWeight
from pixel_jax.models.lora import combine, split
from pixel_jax.models.qwen2_5_vl import Qwen2_5_VL
from pixel_jax.parallel.sharding import is_variable, process_shard, shard, shardings, value_of

T = TypeVar("T")


class TrainState(NamedTuple):
    """What a step carries to the next one, a pytree. `trainable` and `rest` are the two halves of the model."""

    trainable: Params  # {Hugging Face path: weight}, float32 (or wider): what the optimiser moves
    rest: Params  # the model without them, in the type it came in
    opt_state: optax.OptState
    step: jax.Array  # int32 []

    @property
    def model(self) -> Qwen2_5_VL:
        """The whole model, of the same buffers: a step that donates this state takes them away."""
        return _joined(self.trainable, self.rest)


def _joined(trainable: Params, rest: Params) -> Qwen2_5_VL:
    """The model of its two halves."""
    model = combine({path: value_of(weight) for path, weight in trainable.items()}, rest)
    assert isinstance(model, Qwen2_5_VL)
    return model


def init_state(
    model: Qwen2_5_VL, optimizer: optax.GradientTransformation, *, trainable: str = ".*", mesh: Mesh | None = None
) -> TrainState:
    """Makes a state at step 0.

    The state has arrays of its own: `model` stays usable when a step donates the state. Weights to be trained become float32.

    Args:
        model: that is trained.
        optimizer: that makes the state of the weights' moments.
        trainable: regular expression that the paths of trained weights match from their start. Paths are Hugging Face's:
            `(?!visual)` freezes the vision tower, `.*lora_` trains adapters only.
        mesh: where arrays lie; None: on one device.

    Raises:
        ValueError: no path matches.
    """
    pattern = re.compile(trainable)
    if not any(pattern.match(path) for _, path, _ in named_weights(model)):
        raise ValueError(f"no weight's path matches trainable = {trainable!r}")
    if mesh is not None:
        model = shard(model, mesh)  # wherever it lies
    selected, rest = split(model, lambda path, _: pattern.match(path) is not None)
    # The weights and their moments keep the metadata of the variables, which says where they lie on the mesh.
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


class Resharder:
    """Moves the model of a state from the mesh `source` to the mesh `target`, on the devices.

    Base weights are cast to `dtype` before they move (None: they keep the state's type). It is the type in which training steps
    compute: a rollout reads the weights for every token, and its caches are of the same type.

    Frozen weights are moved once and kept; after that only the trained weights move. Both meshes have the same devices, and every
    process has the same shard of a batch on both.
    """

    def __init__(self, source: Mesh | None, target: Mesh | None, dtype: str | None = None):
        if target is not None and (source is None or source.devices.size != target.devices.size):
            raise ValueError("the mesh of rollouts must have the same devices as the mesh of training")
        if target is not None and process_shard(source)[:2] != process_shard(target)[:2]:
            raise ValueError(
                f"a process has the shard {process_shard(source)[:2]} of a batch in training and "
                f"{process_shard(target)[:2]} in rollouts"
            )
        self.source, self.target = source, None if target == source else target
        self.dtype = dtype
        self.frozen: Any = None

    def __call__(self, state: TrainState) -> Qwen2_5_VL:
        """The model of `state` on the target mesh."""
        if self.target is None:
            return self._cast(state.model)
        if self.frozen is None:
            # A copy, even of weights that stay where they are: the next update takes the state's buffers away.
            copied = self._cast(jax.tree.map(jax.numpy.copy, state.rest))
            self.frozen = jax.device_put(copied, shardings(copied, self.target))
        trainable = self._cast(state.trainable)
        trainable = jax.device_put(trainable, shardings(trainable, self.target))
        return _joined(trainable, self.frozen)

    def _cast(self, tree):
        return tree if self.dtype is None else _cast(tree, self.dtype, self.source)


@functools.partial(jax.jit, static_argnames=("dtype", "mesh"))
def _cast(tree, dtype: str, mesh: Mesh | None):
    """Casts on each device its shard. Arrays of that type already are passed on, not copied."""
    narrow = cast(tree, dtype)
    if mesh is None:
        return narrow

    def placed(old: jax.Array, new: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
        return new if old.dtype == new.dtype else jax.lax.with_sharding_constraint(new, sharding)

    return jax.tree.map(placed, tree, narrow, shardings(tree, mesh))
