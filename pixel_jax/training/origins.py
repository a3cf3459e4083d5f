"""Where the pixels of rows come from. RL keeps no patches: it keeps the prompts' images and cuts from them when it trains."""

import contextlib
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pixel_jax.data.shapes import BatchShape
from pixel_jax.parallel.sharding import ROWS, constrain, place_rows, replicate, shard_batch
from pixel_jax.rollout.canvases import Canvases
from pixel_jax.rollout.config import RolloutConfig
from pixel_jax.rollout.drawings import Pictures, pictures_of
from pixel_jax.rollout.machine import Shape
from pixel_jax.rollout.sight import Sight, materialize, sight
from pixel_jax.rollout.trajectory import Calls, Prompts
from pixel_jax.training.batch import Batch


class Origins(NamedTuple):
    """In the place of `Visual.patches`, on the host: R rows, or one."""

    images: np.ndarray  # `Images` [R]
    sight: Sight


def origins(prompts: Prompts, calls: Calls, config: RolloutConfig, shape: Shape) -> Origins:
    """Of the rows of B prompts, all on the host. TypeError: the prompts' canvases are no `Canvases`."""
    if not isinstance(prompts.canvases, Canvases):
        raise TypeError(
            f"canvases of prompts to learn from are Canvases (see build_prompts), not {type(prompts.canvases)}"
        )
    images = prompts.canvases.images
    seen = _sight(prompts._replace(canvases=(), tables=()), calls, config, shape)
    return Origins(np.repeat(images, len(calls.status) // len(images)), jax.tree.map(np.asarray, seen))


def room_of(tokens: int, prompts: Prompts, shape: Shape) -> BatchShape:
    """Of the rows of so many tokens that a rollout made of `prompts`. Rows of one update are of one room."""
    images, height, width = prompts.canvases.shape[1:4]
    return BatchShape(tokens, images, images, shape.patches, height, width, shape.videos)


def see(rows: Batch, room: BatchShape, config: RolloutConfig, shape: Shape, mesh: Mesh | None) -> jax.Array:
    """The patches uint8 [R, K, P, 588] of host rows with `Origins`, on the devices, split as the rows will be."""
    images, sight = rows.visual.patches
    canvases, pictures = Canvases(images, (room.images, room.height, room.width)), None
    if any(tool.picture for tool in shape.tools):
        drawn = sight.drawings  # None: all is grey
        pictures = pictures_of(images, None if drawn is None else drawn.picture)
        pictures = pictures if mesh is None else replicate(pictures, mesh)
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        placed = place_rows(canvases.__getitem__, len(images), mesh)
        sight = sight if mesh is None else shard_batch(sight, mesh)
        return _materialize(placed, sight, pictures, config, shape, mesh)


_sight = jax.jit(sight, static_argnames=("config", "shape"))


@functools.partial(jax.jit, static_argnames=("config", "shape", "mesh"))
def _materialize(
    canvases: jax.Array,
    sight: Sight,
    pictures: Pictures | None,
    config: RolloutConfig,
    shape: Shape,
    mesh: Mesh | None,
) -> jax.Array:
    sight, pictures = jax.tree.map(jnp.asarray, (sight, pictures))
    return constrain(materialize(canvases, sight, config, shape, pictures), mesh, ROWS)
