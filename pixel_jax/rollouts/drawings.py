"""Pictures that tools make of what a row has seen. They are never kept: whoever looks at one has it made again, bit for bit.

A row has the buffers of its prompt and, behind them, one for each of its calls. What call n made may be what call n + 1
looks at, so they are made in order, as far as they are wanted. What a tool of the host returns cannot be made again: it is
kept, once (`Images.keep`), and given to programs beside the buffers (`Pictures`).
"""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.images import Images
from pixel_jax.rollouts.trajectory import NO_IMAGE, Calls, made_by
from pixel_jax.tools.calls import Values, read
from pixel_jax.tools.device import region_size
from pixel_jax.tools.tool import Tool


class Drawings(NamedTuple):
    """What each of N calls made, as what it was made of: [..., N]."""

    tool: jax.Array  # int32 [..., N], index into the tools
    values: Values  # [..., N, ...], the arguments
    image: jax.Array  # int32 [..., N], as in `Views`
    region: jax.Array  # int32 [..., N, 4]
    size: jax.Array  # int32 [..., N, 2], (height, width) of what was made; zeros: nothing was
    picture: jax.Array | None = None  # uint32 [..., N, 8], digest of what a tool of the host returned; zeros: nothing


class Pictures(NamedTuple):
    """P pictures that tools of the host returned, for rows to look at."""

    digest: jax.Array  # uint32 [P, 8]; zeros: no picture
    pixels: jax.Array  # uint8 [P, S, S, 3], zero beyond the size of each


FEWEST, SMALLEST = 8, 64  # P and S at least: few sizes, few compilations


def pictures_of(images: Iterable[Images], wanted: np.ndarray | None = None) -> Pictures:
    """What tools of the host returned to rows of these prompts, each once; those `wanted` (digests uint32 [..., 8]) alone.

    P and S are powers of two: each is a compilation.
    """
    found = {digest: picture for of_prompt in images for digest, picture in of_prompt.returned.items()}
    if wanted is not None:
        digests = {x.astype("<u4").tobytes() for x in np.unique(wanted.reshape(-1, 8), axis=0) if x.any()}
        found = {digest: found[digest] for digest in sorted(digests)}
    side = max([SMALLEST, *(max(picture.shape) for picture in found.values())])
    room, side = (1 << (n - 1).bit_length() for n in (max(len(found), FEWEST), side))
    pictures = Pictures(np.zeros((room, 8), np.uint32), np.zeros((room, side, side, 3), np.uint8))
    for place, (digest, picture) in enumerate(found.items()):
        pictures.digest[place] = np.frombuffer(digest, "<u4")
        pictures.pixels[place, : picture.shape[0], : picture.shape[1]] = picture
    return pictures


def drawings(calls: Calls, tools: tuple[Tool, ...], config: RolloutConfig) -> Drawings | None:
    """Those of the calls [..., N] that can be looked at; None where no tool makes pictures, none is called or all is blanked."""
    if config.blank or not config.max_calls or not any(tool.draw is not None or tool.picture for tool in tools):
        return None
    first, most = calls.source.image[..., 0], config.max_calls
    found = Drawings(calls.tool, calls.values, first, calls.source.region[..., 0, :], calls.drawn, calls.picture)
    axis = first.ndim - 1
    return jax.tree.map(lambda x: x[(slice(None),) * axis + (slice(most),)], found)


def buffer_index(image: jax.Array, buffers: int) -> jax.Array:
    """Where buffers (`Views.image`) lie among those of a prompt and what was made of them."""
    return jnp.where(image >= 0, image, jnp.where(image < NO_IMAGE, buffers + made_by(0) - image, 0))


def reach(image: jax.Array) -> jax.Array:
    """How many calls must be carried out for the buffers [...] to be there: int32."""
    return jnp.max(jnp.where(image < NO_IMAGE, made_by(0) - image + 1, 0))


def draw(
    buffers: jax.Array,
    drawings: Drawings,
    calls: jax.Array,
    tools: tuple[Tool, ...],
    pictures: Pictures | None = None,
) -> jax.Array:
    """The buffers of one row uint8 [C, H, W, 3], and behind them what its first `calls` made: [C + N, S, S, 3], S the longest
    of H, W and the sides of `pictures`. Zero beyond the size of each.
    """
    count, height, width, _ = buffers.shape
    side, calls_most = longest(height, width, pictures), drawings.tool.shape[0]
    room = jnp.pad(buffers, ((0, calls_most), (0, side - height), (0, side - width), (0, 0)))
    making = [i for i, tool in enumerate(tools) if tool.draw is not None]
    index = jnp.arange(side)

    def step(number: jax.Array, room: jax.Array) -> jax.Array:
        tool, values, image, region, size, picture = jax.tree.map(lambda x: x[number], drawings)
        down, across = jnp.minimum(region[1] + index, side - 1), jnp.minimum(region[0] + index, side - 1)
        of = region_size(region)
        source = inside(room[buffer_index(image, count)][down][:, across], of)
        branches = [lambda i=i: tools[i].draw(read(tools[i], values), source, of) for i in making]
        which = sum(jnp.where(tool == i, place, 0) for place, i in enumerate(making))
        made = jax.lax.switch(which, branches) if making else source
        if pictures is not None:
            spare = side - pictures.pixels.shape[1]
            place = jnp.argmax(jnp.all(pictures.digest == picture, axis=1))
            given = jnp.pad(pictures.pixels[place], ((0, spare), (0, spare), (0, 0)))
            made = jnp.where(jnp.any(picture != 0), given, made)
        return room.at[count + number].set(inside(made, size))

    with jax.named_scope("drawings"):
        return jax.lax.fori_loop(0, calls, step, room)


def longest(height: int, width: int, pictures: Pictures | None) -> int:
    """The side of what holds any picture that a row can look at, in pixels; its buffers are [height, width]."""
    return max(height, width, 0 if pictures is None else pictures.pixels.shape[1])


def inside(pixels: jax.Array, size: jax.Array) -> jax.Array:
    """uint8 [S, S, 3] with zeros beyond (height, width)."""
    index = jnp.arange(pixels.shape[0])
    return jnp.where(((index < size[0])[:, None] & (index < size[1]))[..., None], pixels, 0).astype(jnp.uint8)


def row_images(images: Images, calls: Iterable[Calls], tools: Sequence[Tool]) -> dict[int, np.ndarray]:
    """The buffers of a row on the host, as `Views.image` names them: the images of its prompt, and what its calls made or
    returned, in order.
    """
    buffers = dict(enumerate(images.arrays))
    for number, call in enumerate(calls):
        if call.picture is not None and call.picture.any():
            buffers[made_by(number)] = images.find(call.picture)
        elif call.drawn.any():
            buffers[made_by(number)] = draw_on_host(tools[call.tool], call, buffers[int(call.source.image[0])])
    return buffers


def draw_on_host(tool: Tool, call: Calls, source: np.ndarray) -> np.ndarray:
    """What `call` of `tool` makes of `source` uint8 [h, w, 3]: the bits of the device."""
    side = 64 * -(-max(source.shape) // 64)  # few sides: each is a compilation
    x1, y1, x2, y2 = call.source.region[0]
    room = np.zeros((side, side, 3), np.uint8)
    room[: y2 - y1, : x2 - x1] = source[y1:y2, x1:x2]
    height, width = call.drawn
    made = _draw(tool, call.values, room, np.array([y2 - y1, x2 - x1], np.int32))
    return np.asarray(made)[:height, :width]


@functools.partial(jax.jit, static_argnames=("tool",))
def _draw(tool: Tool, values: Values, pixels: jax.Array, size: jax.Array) -> jax.Array:
    return tool.draw(read(tool, values), pixels, size)
