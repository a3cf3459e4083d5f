"""Makes the input of the vision tower from image buffers, inside the compiled program."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.models.attention import select_implementation
from pixel_jax.models.inputs import slice_pixels
from pixel_jax.models.model import Model
from pixel_jax.ops import crop_resize, host_crop_resize, patchify, square_window
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.drawings import Drawings, ReturnedPictures, buffer_index, calls_needed, draw, largest_side
from pixel_jax.rollouts.shapes import RolloutShape, ViewBudget, budgets
from pixel_jax.rollouts.trajectory import Views
from pixel_jax.tools.tool import Tool

GREY = 127  # of blank images (`RolloutConfig.blank`)


def render(buffer: jax.Array, region: jax.Array, size: jax.Array, budget: ViewBudget) -> jax.Array:
    """Cuts out one view: `region` (x1 y1 x2 y2) of `buffer` uint8 [H, W, 3] at `size` (height, width).

    Returns patches uint8 [P, 3 p p].

    They are zero for a size of zero.
    """
    if budget.square is None:
        view = crop_resize(buffer, region, size, canvas=budget.buffer)
    else:
        whole, origin = square_window(region[3] - region[1], region[2] - region[0], budget.square)
        view = crop_resize(buffer, region, jnp.stack(whole), canvas=budget.buffer, origin=jnp.stack(origin))
    return patchify(view, size, max_patches=budget.patches, patch=budget.patch_size, merge=budget.merge_size)


def frame_patches(image: np.ndarray, region: Sequence[int], size: Sequence[int], config: RolloutConfig) -> np.ndarray:
    """Does the same on the host: `region` of uint8 [h, w, 3] at `size` (height, width) -> patches uint8 [P, 3 p p]."""
    height, width = (int(side) for side in size)
    if config.square is None:
        view = host_crop_resize(image, region, (height, width))
    else:
        x1, y1, x2, y2 = region
        whole, (top, left) = square_window(y2 - y1, x2 - x1, config.square)
        view = host_crop_resize(image, region, whole)[top : top + height, left : left + width]
    factor, merge, patch = config.factor, config.merge_size, config.patch_size
    grid = view.reshape(height // factor, merge, patch, width // factor, merge, patch, 3)
    return grid.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, config.patch_bytes)


MAX_VMAP_PIXELS = 2**20  # of the buffer of a view; larger views are computed one after another


def map_views(view: Callable[..., jax.Array], budget: ViewBudget) -> Callable[..., jax.Array]:
    """Maps `view` over a leading axis of its arguments: with `vmap`, or one after another if the buffer is large.

    Intermediate values of a crop are several times as large as its buffer, .66 GiB for one of 3,584 x 3,584 from an image of
    2,048 x 2,048; and one such crop is enough to keep a matrix unit busy.
    """
    if math.prod(budget.buffer) <= MAX_VMAP_PIXELS:
        return jax.vmap(view)
    return lambda *arguments: jax.lax.map(lambda x: view(*x), arguments)


def cut_views(
    buffers: jax.Array,
    prompt: jax.Array,
    views: Views,
    budget: ViewBudget,
    drawings: Drawings | None,
    tools: tuple[Tool, ...],
    pictures: ReturnedPictures | None = None,
) -> jax.Array:
    """Cuts out views in each of S data shards.

    Args:
      buffers: uint8 [S, B, C, H, W, 3].
      prompt: int32 [S, N], index of the prompt whose buffers a row uses.
      views: [S, N, *views].
      budget: of the views.
      drawings: [S, N, ...], images that `tools` drew for the rows; None: there are none.
      tools: of the rollout.
      pictures: that host tools returned.

    Returns:
      Patches uint8 [S, N, *views, P, 3 p p].
    """

    @jax.vmap
    def of_shard(buffers, *rows):
        def of_row(prompt, views, drawings):
            if drawings is None:
                of = lambda image: buffers[prompt, jnp.maximum(image, 0)]
            else:
                drawn = draw(buffers[prompt], drawings, calls_needed(views.image), tools, pictures)
                of = lambda image: drawn[buffer_index(image, buffers.shape[1])]
            one = lambda image, region, size: render(of(image), region, size, budget)
            return (map_views(one, budget) if views.image.ndim else one)(*views)

        if drawings is None:
            return map_views(of_row, budget)(*rows)
        return jax.lax.map(lambda x: of_row(*x), rows)  # one after another: rows differ in how many images are drawn

    return of_shard(buffers, prompt, views, drawings)


def visible_buffers(buffers: jax.Array, config: RolloutConfig, pictures: ReturnedPictures | None = None) -> jax.Array:
    """Returns the buffers for operations: `buffers` uint8 [..., H, W, 3], or, if `config.blank`, as many grey ones."""
    if not config.blank:
        return buffers
    *lead, height, width, channels = buffers.shape
    side = largest_side(height, width, pictures)  # as large as any image that a tool could have drawn or returned
    return jnp.full((*lead, side, side, channels), GREY, jnp.uint8)


def encode_still(model: Model, patches: jax.Array, size: jax.Array, implementation: str | None = None) -> jax.Array:
    """Encodes still images.

    If attention is linear in memory, images along the last axis before P are encoded one after another, as in
    `encode_visual`: eight frames of 20,480 patches for each of eight rows would take 72 GiB together in a 7B's tower.

    Args:
      model: whose vision tower is used.
      patches: uint8 [..., P, 3 p p].
      size: int32 [..., 2], (height, width) in pixels.
      implementation: of attention, as in `RolloutConfig`.

    Returns:
      Features [..., P//4, D].
    """
    lead, most = patches.shape[:-2], patches.shape[-2]
    vision = model.config.vision
    assert vision is not None
    encode = lambda x: model.encode(
        slice_pixels(x[0], x[0], vision), x[1] // vision.patch_size, implementation=implementation
    )
    if lead[-1] > 1 and select_implementation(implementation, most, most) != "dense":
        by_image = lambda x, *tail: jnp.swapaxes(x.reshape(-1, lead[-1], *tail), 0, 1)
        features = jax.lax.map(encode, (by_image(patches, *patches.shape[-2:]), by_image(size, 2)))
        features = jnp.swapaxes(features, 0, 1)
    else:
        features = encode((patches.reshape(-1, *patches.shape[-2:]), size.reshape(-1, 2)))
    return features.reshape(*lead, *features.shape[-2:])


def show(
    model: Model,
    buffers: jax.Array,
    prompt: jax.Array,
    view: Views,
    drawings: Drawings | None,
    config: RolloutConfig,
    shape: RolloutShape,
    pictures: ReturnedPictures | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cuts out and encodes the views of all rows at once.

    Args:
      model: whose vision tower is used.
      buffers: uint8 [B, C, H, W, 3].
      prompt: int32 [R], index of a row's prompt in its data shard.
      view: [R, V].
      drawings: [R, ...], images that tools drew for the rows; None: there are none.
      config: of the rollout.
      shape: of the rollout.
      pictures: that host tools returned.

    Returns:
      Patches uint8 [R, V, P, 3 p p] and features [R, V, P//4, D].
    """
    _, budget = budgets(config, shape)
    split = lambda x: x.reshape(shape.shards, -1, *x.shape[1:])
    join = lambda x: x.reshape(-1, *x.shape[2:])
    views, drawn = jax.tree.map(split, (view, drawings))
    pixels = cut_views(split(buffers), split(prompt), views, budget, drawn, shape.tools, pictures)
    return join(pixels), join(encode_still(model, pixels, views.size, config.implementation))


def features_if_any(showing: jax.Array, features: Callable[[], jax.Array]) -> jax.Array:
    """Returns `features()`, or zeros if no row is `showing` (bool [R]): then the vision tower does not run."""
    empty = jax.eval_shape(features)
    return jax.lax.cond(jnp.any(showing), features, lambda: jnp.zeros(empty.shape, empty.dtype))
