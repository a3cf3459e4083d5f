"""What rows have looked at, as numbers; and the pixels, cut out again.

Patches have room for the largest pictures that could be shown, 23.5 MB a row in the 7B recipe. Where they were cut from is a
few numbers: these, and the images of its prompt, are all that has to be kept of what a row saw.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pixel_jax.rollout.config import RolloutConfig
from pixel_jax.rollout.machine import GREY, Shape, budgets
from pixel_jax.rollout.operations import overview_size, shown_size
from pixel_jax.rollout.rows import Chunk, for_chunks
from pixel_jax.rollout.trajectory import Array, Calls, Prompts
from pixel_jax.rollout.views import Budget, cut


class Views(NamedTuple):
    """K pictures that each of R rows looks at."""

    canvas: Array  # int32 [R, K], of the row's prompt; -1: none
    region: Array  # int32 [R, K, 4], x1 y1 x2 y2 in it
    size: Array  # int32 [R, K, 2], (height, width) at which it is shown; zeros: none


def overviews(prompts: Prompts, config: RolloutConfig) -> Views:
    """What B prompts show before anything is asked for, [B, C]: their images, or the frames of their videos."""
    zeros = jnp.zeros_like(prompts.canvas_size[..., 0])
    region = jnp.stack([zeros, zeros, prompts.canvas_size[..., 1], prompts.canvas_size[..., 0]], axis=-1)
    present = jnp.arange(zeros.shape[1]) < prompts.num_canvases[:, None]
    is_video = jnp.broadcast_to(prompts.is_video[:, None], zeros.shape)
    size = overview_size(prompts.canvas_size, is_video, config)
    return Views(jnp.where(present, jnp.arange(zeros.shape[1]), -1), region, jnp.where(present[..., None], size, 0))


def called(calls: Calls, canvas_size: jax.Array, config: RolloutConfig, views: int) -> Views:
    """What the first `max_calls` calls of each row showed, [R, max_calls, V]; V is `views` (`Shape.views`).

    canvas_size: int32 [R, C, 2], of the rows' prompts.
    """
    calls = jax.tree.map(lambda x: jnp.asarray(x)[:, : config.max_calls], calls)
    crop, select = calls.observation[..., None] == 0, calls.observation[..., None] == 1
    frames = jnp.where(select, calls.frames[..., :views], -1)
    sizes = jax.vmap(lambda sizes, frames: sizes[jnp.maximum(frames, 0)])(canvas_size, frames)
    whole = jnp.concatenate([jnp.zeros_like(sizes), sizes[..., ::-1]], axis=-1)
    box = calls.box[..., None, :]
    as_crop, _ = shown_size(box, config.crop_min_pixels, config.crop_max_pixels, config.max_side)
    as_frame, _ = shown_size(whole, config.select_min_pixels, config.select_max_pixels, config.max_side)
    first = crop & (jnp.arange(views) == 0)
    canvas = jnp.where(first, calls.canvas[..., None], frames)
    size = jnp.where(first[..., None], as_crop, as_frame)
    return Views(
        canvas, jnp.where(first[..., None], box, whole), jnp.where((canvas >= 0)[..., None], size, 0).astype(jnp.int32)
    )


def all_views(prompts: Prompts, calls: Calls, config: RolloutConfig, shape: Shape) -> Views:
    """Everything that the rows of B prompts saw, in the order of their `Visual.patches`."""
    rows = calls.observation.shape[0]
    spread = lambda x: jnp.repeat(jnp.asarray(x), rows // x.shape[0], axis=0)
    before = jax.tree.map(spread, overviews(prompts, config))
    after = called(calls, spread(prompts.canvas_size), config, shape.views)
    flat = lambda x: x.reshape(rows, -1, *x.shape[3:])
    return jax.tree.map(lambda x, y: jnp.concatenate([x, flat(y)], axis=1), before, after)


def look_again(canvases: jax.Array, views: Views, config: RolloutConfig, shape: Shape) -> jax.Array:
    """The patches of `all_views`, uint8 [R, K, P, 588]: bit for bit those of the rollout's trajectories.

    Args:
      canvases: uint8 [R, C, H, W, 3], those of each row's prompt.
    """
    most = canvases.shape[1]
    overview, observed = budgets(config, shape)
    before, after = (jax.tree.map(lambda x: x[:, part], views) for part in (slice(most), slice(most, None)))  # noqa: B023
    shown = [_patches(canvases, before, overview, config, shape)]
    if after.canvas.shape[1]:
        grey = jnp.full_like(canvases, GREY) if config.blank else canvases
        shown.append(_patches(grey, after, observed, config, shape))
    room = max(x.shape[2] for x in shown)
    return jnp.concatenate([jnp.pad(x, ((0, 0), (0, 0), (0, room - x.shape[2]), (0, 0))) for x in shown], axis=1)


def _patches(canvases, views: Views, budget: Budget, config: RolloutConfig, shape: Shape) -> jax.Array:
    """Of one budget; only what was shown is worked on."""
    rows, count = views.canvas.shape
    flat = jax.tree.map(lambda x: x.reshape(rows * count, *x.shape[2:]), views)
    by_shard = canvases.reshape(shape.shards, -1, *canvases.shape[1:])

    def body(chunk: Chunk, shown: jax.Array) -> jax.Array:
        take = lambda x: chunk.take(x).reshape(*chunk.at.shape, *x.shape[1:])
        row = jnp.minimum(chunk.at // count, by_shard.shape[1] - 1)
        pixels = cut(by_shard, row, jnp.maximum(take(flat.canvas), 0), take(flat.region), take(flat.size), budget)
        return chunk.put(shown, pixels.reshape(-1, *pixels.shape[2:]))

    shown = jnp.zeros((rows * count, budget.patches, 588), jnp.uint8)
    with jax.named_scope("views"):
        shown = for_chunks(flat.size[:, 0] > 0, shape.shards, config.observe_chunk, body, shown)
    return shown.reshape(rows, count, *shown.shape[1:])
