"""Records of the images that rows were shown, and their pixels, cut out again.

The patches of a row take 23.5 MB in the 7B recipe. So a record has no pixels, only the regions that the patches were cut from;
together with the images of the prompt, these are enough to cut them out again, bit for bit.
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
from pixel_jax.rollouts.drawings import Drawings, ReturnedPictures, drawings, returned_pictures, row_images
from pixel_jax.rollouts.images import shard_images
from pixel_jax.rollouts.operations import overview_size
from pixel_jax.rollouts.rows import Chunk, for_chunks
from pixel_jax.rollouts.shapes import RolloutShape, ViewBudget, budgets
from pixel_jax.rollouts.trajectory import NO_IMAGE, Calls, HostPrompts, Prompts, Trajectories, Views, shown_by
from pixel_jax.rollouts.views import GREY, cut_views, frame_patches, visible_buffers
from pixel_jax.tools.device import whole
from pixel_jax.tools.tool import Tool


class PatchSource(NamedTuple):
    """The regions that the patches of R rows were cut from: K images each, in the order of `Visual.patches`."""

    views: Views  # [R, K]
    drawings: Drawings | None  # [R, N], images that tools drew; None: no tool draws any


class VisualRecord(NamedTuple):
    """A `Visual` without a pixel."""

    source: PatchSource
    slices: AnyArray
    grids: AnyArray
    seconds: AnyArray


def overviews(prompts: Prompts | HostPrompts, config: RolloutConfig) -> Views:
    """Returns the views of B prompts before any call, [B, C]: their images, or the frames of their videos."""
    index = jnp.arange(prompts.image_sizes.shape[1])
    present = index < jnp.asarray(prompts.image_counts)[:, None]
    is_video = jnp.broadcast_to(prompts.is_video[:, None], present.shape)
    size = overview_size(prompts.image_sizes, is_video, config)
    return Views(
        jnp.where(present, index, NO_IMAGE), whole(prompts.image_sizes), jnp.where(present[..., None], size, 0)
    )


def views_of_calls(calls: Calls, config: RolloutConfig) -> Views:
    """Returns the views that the first `max_calls` calls of each row showed, [R, max_calls, V]."""
    calls = jax.tree.map(lambda x: jnp.asarray(x)[:, : config.max_calls], calls)
    return shown_by(calls, jnp.arange(config.max_calls, dtype=jnp.int32))


def patch_source(
    prompts: Prompts | HostPrompts, calls: Calls, config: RolloutConfig, shape: RolloutShape
) -> PatchSource:
    """Returns the regions of all images that the rows of B prompts were shown."""
    rows = calls.status.shape[0]
    spread = lambda x: jnp.repeat(x, rows // x.shape[0], axis=0)
    before = jax.tree.map(spread, overviews(prompts, config))
    flat = lambda x: x.reshape(rows, -1, *x.shape[3:])
    views = jax.tree.map(lambda x, y: jnp.concatenate([x, flat(y)], axis=1), before, views_of_calls(calls, config))
    return PatchSource(views, drawings(calls, shape.tools, config))


def materialize(
    record: VisualRecord, images: np.ndarray, shape: RolloutShape, config: RolloutConfig, mesh: Mesh | None = None
) -> Visual:
    """Cuts out the images that R rows were shown, bit for bit as in the rollout, on the devices, split by rows.

    Args:
      record: on the host or the devices.
      images: `Images` [R] of each row's prompt, on the host.
      shape: of the rollout that made the rows.
      config: of that rollout.
      mesh: None: one device.
    """
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        buffers = shard_images(images, shape.prompts, mesh)
        source = record.source if mesh is None else shard_batch(record.source, mesh)
        patches = _cut_patches(buffers, source, _pictures(images, record, shape, mesh), config, shape, mesh)
    return Visual._make((patches, record.slices, record.grids, record.seconds))


def _pictures(
    images: np.ndarray, record: VisualRecord, shape: RolloutShape, mesh: Mesh | None
) -> ReturnedPictures | None:
    """Returns the pictures that host tools returned to these rows; None: no tool returns any."""
    if not any(tool.picture for tool in shape.tools):
        return None
    drawn = record.source.drawings  # None: all images are grey
    pictures = returned_pictures(images, None if drawn is None else np.asarray(drawn.picture))
    return pictures if mesh is None else replicate(pictures, mesh)


@functools.partial(jax.jit, static_argnames=("config", "shape", "mesh"))
def _cut_patches(
    buffers,
    source: PatchSource,
    pictures: ReturnedPictures | None,
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
    pictures: ReturnedPictures | None = None,
) -> jax.Array:
    """Cuts out the images that R rows were shown.

    Args:
      buffers: uint8 [R, C, H, W, 3] of each row's prompt.
      source: regions of K images of each row.
      config: of the rollout.
      shape: of the rollout.
      pictures: that host tools returned to the rows.

    Returns:
      Patches uint8 [R, K, P, 588].
    """
    most = buffers.shape[1]
    overview, observed = budgets(config, shape)
    before = jax.tree.map(lambda x: x[:, :most], source.views)
    after = jax.tree.map(lambda x: x[:, most:], source.views)
    shown = [_patches(buffers, PatchSource(before, None), overview, config, shape)]
    if after.image.shape[1]:
        after = PatchSource(after, source.drawings)
        shown.append(_patches(visible_buffers(buffers, config, pictures), after, observed, config, shape, pictures))
    width = max(x.shape[2] for x in shown)
    return jnp.concatenate([jnp.pad(x, ((0, 0), (0, 0), (0, width - x.shape[2]), (0, 0))) for x in shown], axis=1)


def _patches(
    buffers,
    source: PatchSource,
    budget: ViewBudget,
    config: RolloutConfig,
    shape: RolloutShape,
    pictures: ReturnedPictures | None = None,
) -> jax.Array:
    """Cuts out images of one budget; regions that were not shown are skipped."""
    rows, count = source.views.image.shape
    flat = jax.tree.map(lambda x: x.reshape(rows * count, *x.shape[2:]), source.views)
    by_shard = buffers.reshape(shape.shards, -1, *buffers.shape[1:])

    def body(chunk: Chunk, shown: jax.Array) -> jax.Array:
        take = lambda x: chunk.take(x).reshape(*chunk.at.shape, *x.shape[1:])
        row = jnp.minimum(chunk.at // count, by_shard.shape[1] - 1)
        mine, drawn = jax.tree.map(take, (flat, source.drawings))
        pixels = cut_views(by_shard, row, mine, budget, drawn, shape.tools, pictures)
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
    """Does the same as `materialize` for a few rows, on the host, without compilation and with as few patches as needed.

    Args:
      rows: on the host.
      images: `Images` [R] of each row's prompt.
      tools: of the rollout.
      config: of the rollout.

    Returns:
      The rows with their pixels.
    """
    visual, patches_of = rows.visual, []
    count = visual.source.views.image.shape[1]
    first = count - config.max_calls * rows.calls.source.image.shape[2]  # images before this one are the prompt's
    for row, of_row in enumerate(images):
        calls = [jax.tree.map(lambda x: x[row, number], rows.calls) for number in range(config.max_calls)]  # noqa: B023
        buffers = row_images(of_row, calls, tools)
        for index, (image, region, size) in enumerate(zip(*(x[row] for x in visual.source.views), strict=True)):
            if image == NO_IMAGE or not size.all():
                patches_of.append(np.zeros((0, 3 * PATCH**2), np.uint8))
                continue
            pixels = buffers[int(image)]
            pixels = np.full_like(pixels, GREY) if config.blank and index >= first else pixels
            patches_of.append(frame_patches(pixels, region.tolist(), size))
    patches = np.zeros((len(patches_of), max(map(len, patches_of)), 3 * PATCH**2), np.uint8)
    for padded, x in zip(patches, patches_of, strict=True):
        padded[: len(x)] = x
    patches = patches.reshape(len(images), count, *patches.shape[1:])
    return rows.with_visual(Visual._make((patches, visual.slices, visual.grids, visual.seconds)))
