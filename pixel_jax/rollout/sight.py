"""What rows have looked at, as numbers; and the pixels, cut out again.

Patches have room for the largest pictures that could be shown, 23.5 MB a row in the 7B recipe. Where they were cut from is a
few numbers: these, and the images of its prompt, are all that has to be kept of what a row saw.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pixel_jax.rollout.config import RolloutConfig
from pixel_jax.rollout.drawings import Drawings, Pictures, drawings
from pixel_jax.rollout.machine import Shape, budgets
from pixel_jax.rollout.operations import overview_size
from pixel_jax.rollout.rows import Chunk, for_chunks
from pixel_jax.rollout.trajectory import NO_CANVAS, Calls, Prompts, Views, shown_by
from pixel_jax.rollout.views import Budget, cut, seen_canvases
from pixel_jax.tools.looking import whole


class Sight(NamedTuple):
    """All that R rows saw, without a pixel: K pictures each, in the order of their `Visual.patches`."""

    views: Views  # [R, K]
    drawings: Drawings | None  # [R, N], what tools made for them; None: no tool of theirs makes pictures


def overviews(prompts: Prompts, config: RolloutConfig) -> Views:
    """What B prompts show before anything is asked for, [B, C]: their images, or the frames of their videos."""
    index = jnp.arange(prompts.canvas_size.shape[1])
    present = index < prompts.num_canvases[:, None]
    is_video = jnp.broadcast_to(prompts.is_video[:, None], present.shape)
    size = overview_size(prompts.canvas_size, is_video, config)
    return Views(
        jnp.where(present, index, NO_CANVAS), whole(prompts.canvas_size), jnp.where(present[..., None], size, 0)
    )


def called(calls: Calls, config: RolloutConfig) -> Views:
    """What the first `max_calls` calls of each row showed, [R, max_calls, V]."""
    calls = jax.tree.map(lambda x: jnp.asarray(x)[:, : config.max_calls], calls)
    return shown_by(calls, jnp.arange(config.max_calls, dtype=jnp.int32))


def sight(prompts: Prompts, calls: Calls, config: RolloutConfig, shape: Shape) -> Sight:
    """Everything that the rows of B prompts saw."""
    calls = jax.tree.map(jnp.asarray, calls)
    rows = calls.status.shape[0]
    spread = lambda x: jnp.repeat(jnp.asarray(x), rows // x.shape[0], axis=0)
    before = jax.tree.map(spread, overviews(prompts, config))
    flat = lambda x: x.reshape(rows, -1, *x.shape[3:])
    views = jax.tree.map(lambda x, y: jnp.concatenate([x, flat(y)], axis=1), before, called(calls, config))
    return Sight(views, drawings(calls, shape.tools, config))


def materialize(
    canvases: jax.Array, sight: Sight, config: RolloutConfig, shape: Shape, pictures: Pictures | None = None
) -> jax.Array:
    """The patches of what rows saw, uint8 [R, K, P, 588]: bit for bit those of the rollout's trajectories.

    Args:
      canvases: uint8 [R, C, H, W, 3], those of each row's prompt.
      pictures: what tools of the host returned to them.
    """
    most = canvases.shape[1]
    overview, observed = budgets(config, shape)
    before, after = (jax.tree.map(lambda x: x[:, part], sight.views) for part in (slice(most), slice(most, None)))  # noqa: B023
    shown = [_patches(canvases, Sight(before, None), overview, config, shape)]
    if after.canvas.shape[1]:
        after = Sight(after, sight.drawings)
        shown.append(_patches(seen_canvases(canvases, config, pictures), after, observed, config, shape, pictures))
    room = max(x.shape[2] for x in shown)
    return jnp.concatenate([jnp.pad(x, ((0, 0), (0, 0), (0, room - x.shape[2]), (0, 0))) for x in shown], axis=1)


def _patches(
    canvases, sight: Sight, budget: Budget, config: RolloutConfig, shape: Shape, pictures: Pictures | None = None
) -> jax.Array:
    """Of one budget; only what was shown is worked on."""
    rows, count = sight.views.canvas.shape
    flat = jax.tree.map(lambda x: x.reshape(rows * count, *x.shape[2:]), sight.views)
    by_shard = canvases.reshape(shape.shards, -1, *canvases.shape[1:])

    def body(chunk: Chunk, shown: jax.Array) -> jax.Array:
        take = lambda x: chunk.take(x).reshape(*chunk.at.shape, *x.shape[1:])
        row = jnp.minimum(chunk.at // count, by_shard.shape[1] - 1)
        mine, drawn = jax.tree.map(take, (flat, sight.drawings))
        pixels = cut(by_shard, row, mine, budget, drawn, shape.tools, pictures)
        return chunk.put(shown, pixels.reshape(-1, *pixels.shape[2:]))

    shown = jnp.zeros((rows * count, budget.patches, 588), jnp.uint8)
    with jax.named_scope("views"):
        shown = for_chunks(flat.size[:, 0] > 0, shape.shards, config.observe_chunk, body, shown)
    return shown.reshape(rows, count, *shown.shape[1:])
