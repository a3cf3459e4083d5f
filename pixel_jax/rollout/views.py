"""From canvases to what the vision tower sees, inside the compiled program."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pixel_jax.models.attention import chosen
from pixel_jax.models.qwen2_5_vl import Qwen2_5_VL
from pixel_jax.ops import crop_resize, patchify, pixel_values
from pixel_jax.rollout.config import FACTOR, PATCH
from pixel_jax.rollout.rows import Chunk, for_chunks


class Budget(NamedTuple):
    """Static bounds of what is shown: its area, its longest side, and the patches room is kept for."""

    max_pixels: int
    max_side: int
    patches: int

    @property
    def canvas(self) -> tuple[int, int]:
        """The smallest static canvas that holds every size within the budget, both sides multiples of `FACTOR`."""
        side = min(self.max_pixels // FACTOR, self.max_side)
        return side, side


def render(canvas: jax.Array, region: jax.Array, size: jax.Array, budget: Budget) -> jax.Array:
    """One view: `region` (x1 y1 x2 y2) of `canvas` uint8 [H, W, 3] at `size` (height, width) -> patches uint8 [P, 588].

    A size of zero gives zeros.
    """
    view = crop_resize(canvas, region, size, canvas=budget.canvas)
    return patchify(view, size, max_patches=budget.patches)


AT_ONCE = 2**20  # pixels of a view's canvas


def each(view: Callable, budget: Budget) -> Callable:
    """`view` over a leading axis of all its arguments: together, or one after the other where the canvas is large.

    What lies between the passes of a crop is as large as its canvas, several times over: .66 GiB for one of 3,584 x 3,584
    from an image of 2,048 x 2,048, which alone keeps a matrix unit busy.
    """
    if math.prod(budget.canvas) <= AT_ONCE:
        return jax.vmap(view)
    return lambda *arguments: jax.lax.map(lambda x: view(*x), arguments)


def cut(
    canvases: jax.Array, prompt: jax.Array, canvas: jax.Array, region: jax.Array, size: jax.Array, budget: Budget
) -> jax.Array:
    """Views of each of S parts of the mesh, cut on its own: patches uint8 [S, N, *views, P, 588].

    Args:
      canvases: uint8 [S, B, C, H, W, 3]; prompt: int32 [S, N], whose canvases are looked at.
      canvas: int32 [S, N, *views]; region: int32 [S, N, *views, 4]; size: int32 [S, N, *views, 2].
    """

    @jax.vmap
    def of_part(canvases, *rows):
        def of_row(prompt, *views):
            one = lambda canvas, region, size: render(canvases[prompt, canvas], region, size, budget)
            return (each(one, budget) if views[0].ndim else one)(*views)

        return each(of_row, budget)(*rows)

    return of_part(canvases, prompt, canvas, region, size)


def encode_still(
    model: Qwen2_5_VL, patches: jax.Array, size: jax.Array, implementation: str | None = None
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
    model: Qwen2_5_VL,
    canvases: jax.Array,
    prompt: jax.Array,
    canvas: jax.Array,
    region: jax.Array,
    size: jax.Array,
    waiting: jax.Array,
    *,
    budget: Budget,
    shards: int,
    chunk: int,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Patches uint8 [R, V, P, 588] and features [R, V, P//4, D] of the views of the rows that wait; zeros elsewhere.

    The rows that wait are taken `chunk` at a time in each of the `shards` that rows are split over.

    Args:
      canvases: uint8 [B, C, H, W, 3]; prompt: int32 [R], whose canvases a row looks at, of those of its shard.
      canvas: int32 [R, V]; region: int32 [R, V, 4]; size: int32 [R, V, 2].
      waiting: bool [R].
    """
    rows, views = canvas.shape
    by_shard = canvases.reshape(shards, -1, *canvases.shape[1:])

    def body(chunk: Chunk, shown_so_far):
        shown, features = shown_so_far
        take = lambda x: chunk.take(x).reshape(*chunk.at.shape, *x.shape[1:])
        sizes = take(size)
        pixels = cut(by_shard, take(prompt), jnp.maximum(take(canvas), 0), take(region), sizes, budget)
        encoded = encode_still(model, pixels, sizes, implementation)
        flat = lambda x: x.reshape(-1, *x.shape[2:])
        return chunk.put(shown, flat(pixels)), chunk.put(features, flat(encoded))

    shape = jax.eval_shape(
        lambda p, s: encode_still(model, p, s),
        jax.ShapeDtypeStruct((1, budget.patches, 588), jnp.uint8),
        jax.ShapeDtypeStruct((1, 2), jnp.int32),
    )
    shown = jnp.zeros((rows, views, budget.patches, 588), jnp.uint8)
    features = jnp.zeros((rows, views, *shape.shape[1:]), shape.dtype)
    with jax.named_scope("views"):
        return for_chunks(waiting, shards, chunk, body, (shown, features))
