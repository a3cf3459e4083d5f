"""The policy as a rollout wants it: training and decoding may split the same weights differently, and differ in width."""

import functools
from typing import Any

import jax
from jax.sharding import Mesh

from pixel_jax.models.lora import combine
from pixel_jax.parallel.sharding import process_shard, shardings, value_of
from pixel_jax.training.state import TrainState
from pixel_jax.training.steps import cast


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
                f"a process has part {process_shard(source)[:2]} of a batch in training, {process_shard(target)[:2]} in rollouts"
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
