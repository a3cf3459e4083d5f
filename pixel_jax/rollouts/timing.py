"""Measures the time of the operations of a rollout.

A rollout is one program, inside which the host cannot read a clock. So the operations are carried out again, alone.
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
from pixel_jax.rollouts.drawings import ReturnedPictures, drawings, returned_pictures
from pixel_jax.rollouts.materialize import views_of_calls
from pixel_jax.rollouts.rollout import layout, put_prompts
from pixel_jax.rollouts.rows import Chunk, for_chunks
from pixel_jax.rollouts.shapes import RolloutShape
from pixel_jax.rollouts.trajectory import NO_IMAGE, Calls, HostPrompts, Prompts, Trajectories, no_calls
from pixel_jax.rollouts.views import show, visible_buffers


def seconds_of_operations(
    model: Model, prompts: HostPrompts, trajectories: Trajectories, config: RolloutConfig
) -> float:
    """Measures the seconds of the crops and frame selections in `trajectories`, to cut out, resize and encode them.

    All first calls are carried out together, then all second calls, and so on; compilation and transfers are not counted. It
    estimates the time of the same work in the rollout, where chunks may be less full. Reading features into caches is not part of
    it. A model without a vision tower is shown nothing, which takes no time.

    Args:
      model: whose vision tower is used.
      prompts: on the host; with several processes each has its own, as in the rollout.
      trajectories: their rows, on the host.
      config: of the rollout.
    """
    if model.config.vision is None:
        return 0.0
    views = operations_again(model, prompts, trajectories.calls, config)
    jax.block_until_ready(next(views))
    began = time.monotonic()
    for view in views:
        jax.block_until_ready(view)
    return time.monotonic() - began


def operations_again(
    model: Model, prompts: HostPrompts, calls: Calls, config: RolloutConfig
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yields patches and features (`views.show`) of no call, to compile; then of each row's first, second, ... call."""
    mesh, shape = layout(model, prompts, config)
    rows, numbers = calls.status.shape
    none = no_calls(rows, numbers, shape.views, shape.tools)
    pictures = returned_pictures(prompts.images) if any(tool.picture for tool in shape.tools) else None
    pictures = pictures if mesh is None else replicate(pictures, mesh)
    batch, calls, none = put_prompts(prompts, mesh), _rows(calls, mesh), _rows(none, mesh)
    jax.block_until_ready((batch, calls, none))
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        yield _show(model, batch, none, 0, pictures, config, shape)
        for number in range(config.max_calls):
            yield _show(model, batch, calls, number, pictures, config, shape)


def _rows(calls: Calls, mesh: Mesh | None) -> Calls:
    return jax.device_put(calls) if mesh is None else shard_batch(calls, mesh)


@functools.partial(jax.jit, static_argnames=("config", "shape"))
def _show(
    model,
    prompts: Prompts,
    calls: Calls,
    number,
    pictures: ReturnedPictures | None,
    config: RolloutConfig,
    shape: RolloutShape,
):
    """Cuts out and encodes what the call of index `number` of every row showed, as many rows at a time as a rollout does."""
    group = calls.status.shape[0] // len(prompts.image_sizes)
    take = lambda x: jax.lax.dynamic_index_in_dim(x, number, axis=1, keepdims=False)
    seen = jax.tree.map(take, views_of_calls(calls, config))
    prompt = jnp.arange(len(seen.image)) // group % (len(prompts.image_sizes) // shape.shards)
    rows = (prompt, seen, drawings(calls, shape.tools, config))
    buffers = visible_buffers(prompts.buffers, config, pictures)
    shown = lambda rows: show(model, buffers, rows[0], rows[1], rows[2], config, shape, pictures)

    def body(chunk: Chunk, shown_so_far):
        return jax.tree.map(chunk.put, shown_so_far, shown(jax.tree.map(chunk.take, rows)))

    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(shown, rows))
    showing = jnp.any(seen.image != NO_IMAGE, axis=1)
    return for_chunks(showing, shape.shards, config.observe_chunk, body, empty)
