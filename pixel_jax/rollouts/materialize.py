"""What rows have looked at, as numbers; and the pixels, cut out again.

Patches have room for the largest pictures that could be shown, 23.5 MB a row in the 7B recipe. Where they were cut from is a
few numbers: these, and the images of its prompt, are all that has to be kept of what a row saw.
"""

import contextlib
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pixel_jax.arrays import AnyArray
from pixel_jax.models.inputs import Visual
from pixel_jax.parallel.sharding import ROWS, constrain, replicate, shard_batch
from pixel_jax.rollouts.config import PATCH, RolloutConfig
from pixel_jax.rollouts.drawings import Drawings, Pictures, drawings, pictures_of, row_images
from pixel_jax.rollouts.images import shard_images
from pixel_jax.rollouts.operations import overview_size
from pixel_jax.rollouts.rows import Chunk, for_chunks
from pixel_jax.rollouts.shapes import Budget, RolloutShape, budgets
from pixel_jax.rollouts.trajectory import NO_IMAGE, Calls, HostPrompts, Prompts, Trajectories, Views, shown_by
from pixel_jax.rollouts.views import GREY, cut, frame_patches, visible_buffers
from pixel_jax.tools.device import whole
from pixel_jax.tools.tool import Tool


class PatchSource(NamedTuple):
    """Where the patches of R rows were cut from: K pictures each, in the order of their `Visual.patches`."""

    views: Views  # [R, K]
    drawings: Drawings | None  # [R, N], what tools made for them; None: no tool of theirs makes pictures


class VisualRecord(NamedTuple):
    """A `Visual` without a pixel."""

    source: PatchSource
    slices: AnyArray
    grids: AnyArray
    seconds: AnyArray


def overviews(prompts: Prompts | HostPrompts, config: RolloutConfig) -> Views:
    """What B prompts show before anything is asked for, [B, C]: their images, or the frames of their videos."""
    index = jnp.arange(prompts.image_sizes.shape[1])
    present = index < prompts.image_counts[:, None]
    is_video = jnp.broadcast_to(prompts.is_video[:, None], present.shape)
    size = overview_size(prompts.image_sizes, is_video, config)
    return Views(
        jnp.where(present, index, NO_IMAGE), whole(prompts.image_sizes), jnp.where(present[..., None], size, 0)
    )


def views_of_calls(calls: Calls, config: RolloutConfig) -> Views:
    """What the first `max_calls` calls of each row showed, [R, max_calls, V]."""
    calls = jax.tree.map(lambda x: jnp.asarray(x)[:, : config.max_calls], calls)
    return shown_by(calls, jnp.arange(config.max_calls, dtype=jnp.int32))


def patch_source(
    prompts: Prompts | HostPrompts, calls: Calls, config: RolloutConfig, shape: RolloutShape
) -> PatchSource:
    """Of everything that the rows of B prompts saw."""
    rows = calls.status.shape[0]
    spread = lambda x: jnp.repeat(x, rows // x.shape[0], axis=0)
    before = jax.tree.map(spread, overviews(prompts, config))
    flat = lambda x: x.reshape(rows, -1, *x.shape[3:])
    views = jax.tree.map(lambda x, y: jnp.concatenate([x, flat(y)], axis=1), before, views_of_calls(calls, config))
    return PatchSource(views, drawings(calls, shape.tools, config))


def materialize(
    record: VisualRecord, images: np.ndarray, shape: RolloutShape, config: RolloutConfig, mesh: Mesh | None = None
) -> Visual:
    """What R rows saw as pixels, bit for bit those that the rollout encoded; patches are cut on the devices and split by rows.

    Args:
      record: on the host or the devices.
      images: `Images` [R], those of each row's prompt, on the host.
      shape: of the rollout that the rows are of.
    """
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        buffers = shard_images(images, shape.prompts, mesh)
        source = record.source if mesh is None else shard_batch(record.source, mesh)
        patches = _cut_patches(buffers, source, returned_to(images, record, shape, mesh), config, shape, mesh)
    return Visual(patches, record.slices, record.grids, record.seconds)


def returned_to(images: np.ndarray, record: VisualRecord, shape: RolloutShape, mesh: Mesh | None) -> Pictures | None:
    """What tools of the host returned to rows, as far as these rows saw it; None: no tool returns pictures."""
    if not any(tool.picture for tool in shape.tools):
        return None
    drawn = record.source.drawings  # None: all is grey
    pictures = pictures_of(images, None if drawn is None else np.asarray(drawn.picture))
    return pictures if mesh is None else replicate(pictures, mesh)


@functools.partial(jax.jit, static_argnames=("config", "shape", "mesh"))
def _cut_patches(
    buffers,
    source: PatchSource,
    pictures: Pictures | None,
    config: RolloutConfig,
    shape: RolloutShape,
    mesh: Mesh | None,
) -> jax.Array:
    source, pictures = jax.tree.map(jnp.asarray, (source, pictures))
    return constrain(cut_patches(buffers, source, config, shape, pictures), mesh, ROWS)


def cut_patches(
    buffers: jax.Array,
    source: PatchSource,
    config: RolloutConfig,
    shape: RolloutShape,
    pictures: Pictures | None = None,
) -> jax.Array:
    """The patches of what rows saw, uint8 [R, K, P, 588].

    Args:
      buffers: uint8 [R, C, H, W, 3], those of each row's prompt.
      pictures: what tools of the host returned to them.
    """
    most = buffers.shape[1]
    overview, observed = budgets(config, shape)
    before, after = (jax.tree.map(lambda x: x[:, part], source.views) for part in (slice(most), slice(most, None)))  # noqa: B023
    shown = [_patches(buffers, PatchSource(before, None), overview, config, shape)]
    if after.image.shape[1]:
        after = PatchSource(after, source.drawings)
        shown.append(_patches(visible_buffers(buffers, config, pictures), after, observed, config, shape, pictures))
    room = max(x.shape[2] for x in shown)
    return jnp.concatenate([jnp.pad(x, ((0, 0), (0, 0), (0, room - x.shape[2]), (0, 0))) for x in shown], axis=1)


def _patches(
    buffers,
    source: PatchSource,
    budget: Budget,
    config: RolloutConfig,
    shape: RolloutShape,
    pictures: Pictures | None = None,
) -> jax.Array:
    """Of one budget; only what was shown is worked on."""
    rows, count = source.views.image.shape
    flat = jax.tree.map(lambda x: x.reshape(rows * count, *x.shape[2:]), source.views)
    by_shard = buffers.reshape(shape.shards, -1, *buffers.shape[1:])

    def body(chunk: Chunk, shown: jax.Array) -> jax.Array:
        take = lambda x: chunk.take(x).reshape(*chunk.at.shape, *x.shape[1:])
        row = jnp.minimum(chunk.at // count, by_shard.shape[1] - 1)
        mine, drawn = jax.tree.map(take, (flat, source.drawings))
        pixels = cut(by_shard, row, mine, budget, drawn, shape.tools, pictures)
        return chunk.put(shown, pixels.reshape(-1, *pixels.shape[2:]))

    shown = jnp.zeros((rows * count, budget.patches, 588), jnp.uint8)
    with jax.named_scope("views"):
        shown = for_chunks(flat.size[:, 0] > 0, shape.shards, config.observe_chunk, body, shown)
    return shown.reshape(rows, count, *shown.shape[1:])


def materialize_on_host(
    rows: Trajectories[VisualRecord],
    images: np.ndarray,
    tools: tuple[Tool, ...],
    config: RolloutConfig,
) -> Trajectories[Visual]:
    """`materialize` of a few host rows that are to be looked at: on the host, with nothing compiled and no more room than needed.

    Args:
      images: `Images` [R], those of each row's prompt.
      tools: of the rollout.
    """
    visual, found = rows.visual, []
    count = visual.source.views.image.shape[1]
    first = count - config.max_calls * rows.calls.source.image.shape[2]  # pictures before these were not asked for
    for row, of_row in enumerate(images):
        calls = [jax.tree.map(lambda x: x[row, number], rows.calls) for number in range(config.max_calls)]  # noqa: B023
        buffers = row_images(of_row, calls, tools)
        for place, (image, region, size) in enumerate(zip(*(x[row] for x in visual.source.views), strict=True)):
            if image == NO_IMAGE or not size.all():
                found.append(np.zeros((0, 3 * PATCH**2), np.uint8))
                continue
            image = buffers[int(image)]
            image = np.full_like(image, GREY) if config.blank and place >= first else image
            found.append(frame_patches(image, region.tolist(), size))
    patches = np.zeros((len(found), max(map(len, found)), 3 * PATCH**2), np.uint8)
    for room, pixels in zip(patches, found, strict=True):
        room[: len(pixels)] = pixels
    patches = patches.reshape(len(images), count, *patches.shape[1:])
    return rows._replace(visual=Visual(patches, visual.slices, visual.grids, visual.seconds))
