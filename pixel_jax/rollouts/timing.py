"""What the operations of a rollout take. A rollout is one program, inside which the host reads no clock: so they are
carried out again, alone.
"""

import contextlib
import functools
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pixel_jax.models.model import Model
from pixel_jax.parallel.sharding import replicate, shard_batch
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.drawings import Pictures, drawings, pictures_of
from pixel_jax.rollouts.materialize import called
from pixel_jax.rollouts.rollout import layout, put_prompts
from pixel_jax.rollouts.shapes import RolloutShape
from pixel_jax.rollouts.trajectory import NO_IMAGE, Calls, HostPrompts, Prompts, Trajectories, no_calls
from pixel_jax.rollouts.views import show_waiting, visible_buffers


def seconds_of_operations(
    model: Model, prompts: HostPrompts, trajectories: Trajectories, config: RolloutConfig
) -> float:
    """Seconds that the crops and frame selections in `trajectories` take: cut out, resized and encoded, the first calls of
    all rows together, then all second calls, and so on. Compiling and moving buffers to the devices are not counted.

    It estimates their part of the rollout that made the rows: there the same work is done whenever enough rows wait, in
    chunks that may be less full, and the features are then read into the caches, which is not part of it.

    Args:
      prompts: on the host; with several processes each brings its own, as to the rollout.
      trajectories: their rows, on the host.
    """
    views = operations_again(model, prompts, trajectories.calls, config)
    jax.block_until_ready(next(views))
    began = time.monotonic()
    for view in views:
        jax.block_until_ready(view)
    return time.monotonic() - began


def operations_again(
    model: Model, prompts: HostPrompts, calls: Calls, config: RolloutConfig
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Patches and features, as `show_waiting` gives them, of no call at all; then of each row's first, second, ... call."""
    mesh, shape = layout(model, prompts, config)
    nothing = no_calls(*calls.status.shape, shape.views, shape.tools)
    pictures = pictures_of(prompts.images) if any(tool.picture for tool in shape.tools) else None
    pictures = pictures if mesh is None else replicate(pictures, mesh)
    prompts, calls, nothing = put_prompts(prompts, mesh), _rows(calls, mesh), _rows(nothing, mesh)
    jax.block_until_ready((prompts, calls, nothing))
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        yield _show(model, prompts, nothing, 0, pictures, config, shape)
        for number in range(config.max_calls):
            yield _show(model, prompts, calls, number, pictures, config, shape)


def _rows(calls: Calls, mesh: Mesh | None) -> Calls:
    return jax.device_put(calls) if mesh is None else shard_batch(calls, mesh)


@functools.partial(jax.jit, static_argnames=("config", "shape"))
def _show(
    model, prompts: Prompts, calls: Calls, number, pictures: Pictures | None, config: RolloutConfig, shape: RolloutShape
):
    """What the calls of that number showed, of every row."""
    group = calls.status.shape[0] // len(prompts.image_sizes)
    take = lambda x: jax.lax.dynamic_index_in_dim(x, number, axis=1, keepdims=False)
    seen = jax.tree.map(take, called(calls, config))
    return show_waiting(
        model,
        visible_buffers(prompts.buffers, config, pictures),
        jnp.arange(len(seen.image)) // group % (len(prompts.image_sizes) // shape.shards),
        seen,
        jnp.any(seen.image != NO_IMAGE, axis=1),
        drawings(calls, shape.tools, config),
        config,
        shape,
        pictures,
    )
