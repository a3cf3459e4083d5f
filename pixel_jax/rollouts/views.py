"""From buffers to what the vision tower sees, inside the compiled program."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.models.attention import chosen
from pixel_jax.models.model import Model
from pixel_jax.ops import crop_resize, host_crop_resize, patchify, pixel_values
from pixel_jax.rollouts.config import FACTOR, PATCH, RolloutConfig
from pixel_jax.rollouts.drawings import Drawings, Pictures, buffer_index, draw, longest, reach
from pixel_jax.rollouts.rows import Chunk, for_chunks
from pixel_jax.rollouts.shapes import Budget, RolloutShape, budgets
from pixel_jax.rollouts.trajectory import Views
from pixel_jax.tools.tool import Tool

GREY = 127  # of blanked observations


def render(buffer: jax.Array, region: jax.Array, size: jax.Array, budget: Budget) -> jax.Array:
    """One view: `region` (x1 y1 x2 y2) of `buffer` uint8 [H, W, 3] at `size` (height, width) -> patches uint8 [P, 588].

    A size of zero gives zeros.
    """
    view = crop_resize(buffer, region, size, canvas=budget.buffer)
    return patchify(view, size, max_patches=budget.patches)


def frame_patches(image: np.ndarray, region: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """`render` on the host: `region` of uint8 [h, w, 3] at `size`, as patches uint8 [h w / 196, 588], no more than there are."""
    height, width = (int(side) for side in size)
    view = host_crop_resize(image, region, (height, width))
    grid = view.reshape(height // FACTOR, 2, PATCH, width // FACTOR, 2, PATCH, 3)
    return grid.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3 * PATCH**2)


AT_ONCE = 2**20  # pixels of a view's buffer


def each(view: Callable, budget: Budget) -> Callable:
    """`view` over a leading axis of all its arguments: together, or one after the other where the buffer is large.

    What lies between the passes of a crop is as large as its buffer, several times over: .66 GiB for one of 3,584 x 3,584
    from an image of 2,048 x 2,048, which alone keeps a matrix unit busy.
    """
    if math.prod(budget.buffer) <= AT_ONCE:
        return jax.vmap(view)
    return lambda *arguments: jax.lax.map(lambda x: view(*x), arguments)


def cut(
    buffers: jax.Array,
    prompt: jax.Array,
    views: Views,
    budget: Budget,
    drawings: Drawings | None,
    tools: tuple[Tool, ...],
    pictures: Pictures | None = None,
) -> jax.Array:
    """Views of each of S parts of the mesh, cut on its own: patches uint8 [S, N, *views, P, 588].

    Args:
      buffers: uint8 [S, B, C, H, W, 3]; prompt: int32 [S, N], whose buffers are looked at.
      views: [S, N, *views]; drawings: [S, N, ...], what `tools` made for the rows; None: nothing.
      pictures: what tools of the host returned.
    """

    @jax.vmap
    def of_part(buffers, *rows):
        def of_row(prompt, views, drawings):
            if drawings is None:
                of = lambda image: buffers[prompt, jnp.maximum(image, 0)]
            else:  # one row after the other: whose picture is made of whose is no matter of several
                made = draw(buffers[prompt], drawings, reach(views.image), tools, pictures)
                of = lambda image: made[buffer_index(image, buffers.shape[1])]
            one = lambda image, region, size: render(of(image), region, size, budget)
            return (each(one, budget) if views.image.ndim else one)(*views)

        over_rows = each(of_row, budget) if drawings is None else lambda *x: jax.lax.map(lambda x: of_row(*x), x)
        return over_rows(*rows)

    return of_part(buffers, prompt, views, drawings)


def visible_buffers(buffers: jax.Array, config: RolloutConfig, pictures: Pictures | None = None) -> jax.Array:
    """What operations look at: the buffers uint8 [..., H, W, 3], or, where these are blanked, as many large grey ones."""
    if not config.blank:
        return buffers
    *lead, height, width, channels = buffers.shape
    side = longest(height, width, pictures)  # of whatever a tool would have made of them, or returned
    return jnp.full((*lead, side, side, channels), GREY, jnp.uint8)


def encode_still(
    model: Model, patches: jax.Array, size: jax.Array, implementation: str | None = None
) -> jax.Array:
    """Visual features [..., P//4, D] of stills: `patches` uint8 [..., P, 588] of `size` int32 [..., 2] in pixels.

    Where attention is linear in memory, stills along the last axis before P are taken one after the other, as in
    `encode_visual`: eight frames of 20,480 patches for each of eight rows would take 72 GiB together in a 7B's tower.
    """
    lead, room = patches.shape[:-2], patches.shape[-2]
    encode = lambda x: model.encode(pixel_values(x[0], x[0]), x[1] // PATCH, implementation=implementation)
    if lead[-1] > 1 and chosen(implementation, room, room) != "dense":
        apart = lambda x, *tail: jnp.swapaxes(x.reshape(-1, lead[-1], *tail), 0, 1)
        features = jax.lax.map(encode, (apart(patches, *patches.shape[-2:]), apart(size, 2)))
        features = jnp.swapaxes(features, 0, 1)
    else:
        features = encode((patches.reshape(-1, *patches.shape[-2:]), size.reshape(-1, 2)))
    return features.reshape(*lead, *features.shape[-2:])


def show_waiting(
    model: Model,
    buffers: jax.Array,
    prompt: jax.Array,
    view: Views,
    waiting: jax.Array,
    drawings: Drawings | None,
    config: RolloutConfig,
    shape: RolloutShape,
    pictures: Pictures | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Patches uint8 [R, V, P, 588] and features [R, V, P//4, D] of the views of the rows that wait; zeros elsewhere.

    The rows that wait are taken `config.observe_chunk` at a time in each of the parts of the mesh that rows are split over.

    Args:
      buffers: uint8 [B, C, H, W, 3]; prompt: int32 [R], whose buffers a row looks at, of those of its part of the mesh.
      view: [R, V]; waiting: bool [R].
      drawings: [R, ...], what tools have made for the rows; None: nothing.
      pictures: what tools of the host returned.
    """
    _, budget = budgets(config, shape)
    rows, views = view.image.shape
    by_shard = buffers.reshape(shape.shards, -1, *buffers.shape[1:])

    def body(chunk: Chunk, shown_so_far):
        shown, features = shown_so_far
        take = lambda x: chunk.take(x).reshape(*chunk.at.shape, *x.shape[1:])
        mine = jax.tree.map(take, view)
        pixels = cut(by_shard, take(prompt), mine, budget, jax.tree.map(take, drawings), shape.tools, pictures)
        encoded = encode_still(model, pixels, mine.size, config.implementation)
        flat = lambda x: x.reshape(-1, *x.shape[2:])
        return chunk.put(shown, flat(pixels)), chunk.put(features, flat(encoded))

    encoded = jax.eval_shape(
        lambda p, s: encode_still(model, p, s),
        jax.ShapeDtypeStruct((1, budget.patches, 588), jnp.uint8),
        jax.ShapeDtypeStruct((1, 2), jnp.int32),
    )
    shown = jnp.zeros((rows, views, budget.patches, 588), jnp.uint8)
    features = jnp.zeros((rows, views, *encoded.shape[1:]), encoded.dtype)
    with jax.named_scope("views"):
        return for_chunks(waiting, shape.shards, config.observe_chunk, body, (shown, features))
