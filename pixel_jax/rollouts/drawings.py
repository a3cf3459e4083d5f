"""Images that tools draw from what a row has been shown. They are never stored, but drawn again when needed, bit for bit.

A row has the image buffers of its prompt and, behind them, one for each of its calls. Call n + 1 may use the image of call n, so
they are drawn in order, as many as are needed. A picture that a host tool returned cannot be drawn again: it is stored once
(`Images.keep`), and passed to programs beside the buffers (`ReturnedPictures`).
"""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.arrays import AnyArray
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.images import Images
from pixel_jax.rollouts.trajectory import NO_IMAGE, Calls, made_by
from pixel_jax.tools.calls import Values, read
from pixel_jax.tools.device import region_size
from pixel_jax.tools.tool import Tool


class Drawings(NamedTuple):
    """The images that N calls drew: tool, arguments, and the region that was drawn from, [..., N]."""

    tool: AnyArray  # int32 [..., N], index into the tools
    values: Values  # [..., N, ...], the arguments
    image: AnyArray  # int32 [..., N], as in `Views`
    region: AnyArray  # int32 [..., N, 4]
    size: AnyArray  # int32 [..., N, 2], (height, width) of the image drawn; zeros: none
    picture: AnyArray | None = None  # uint32 [..., N, 8], digest of the picture that a host tool returned; zeros: none


class ReturnedPictures(NamedTuple):
    """P pictures that host tools returned."""

    digest: AnyArray  # uint32 [P, 8]; zeros: no picture
    pixels: AnyArray  # uint8 [P, S, S, 3], zero beyond the size of each


MIN_COUNT, MIN_SIDE = 8, 64  # lower bounds of P and S, so that there are few shapes to compile


def returned_pictures(images: Iterable[Images], wanted: np.ndarray | None = None) -> ReturnedPictures:
    """Collects the pictures that host tools returned to rows of these prompts, each once.

    P and S are powers of two, because each shape is compiled.

    Args:
      images: of the prompts.
      wanted: digests uint32 [..., 8] of the pictures to collect; None: all.
    """
    stored = {digest: picture for of_prompt in images for digest, picture in of_prompt.returned.items()}
    if wanted is not None:
        shown = {x.astype("<u4").tobytes() for x in np.unique(wanted.reshape(-1, 8), axis=0) if x.any()}
        stored = {digest: stored[digest] for digest in sorted(shown)}
    side = max([MIN_SIDE, *(max(picture.shape) for picture in stored.values())])
    count, side = (1 << (n - 1).bit_length() for n in (max(len(stored), MIN_COUNT), side))
    digests, pixels = np.zeros((count, 8), np.uint32), np.zeros((count, side, side, 3), np.uint8)
    for i, (digest, picture) in enumerate(stored.items()):
        digests[i] = np.frombuffer(digest, "<u4")
        pixels[i, : picture.shape[0], : picture.shape[1]] = picture
    return ReturnedPictures(digests, pixels)


def drawings(calls: Calls, tools: tuple[Tool, ...], config: RolloutConfig) -> Drawings | None:
    """Returns what the calls [..., N] drew; None if no tool draws or returns images, there are no calls, or all are blank."""
    if config.blank or not config.max_calls or not any(tool.draw is not None or tool.picture for tool in tools):
        return None
    first, most = calls.source.image[..., 0], config.max_calls
    every = Drawings(calls.tool, calls.values, first, calls.source.region[..., 0, :], calls.drawn, calls.picture)
    axis = first.ndim - 1
    return jax.tree.map(lambda x: x[(slice(None),) * axis + (slice(most),)], every)


def buffer_index(image: jax.Array, buffers: int) -> jax.Array:
    """Returns the index of images (`Views.image`) among the `buffers` of a prompt and, behind them, the images drawn by calls."""
    return jnp.where(image >= 0, image, jnp.where(image < NO_IMAGE, buffers + made_by(0) - image, 0))


def calls_needed(image: jax.Array) -> jax.Array:
    """Returns how many calls must have drawn so that all images [...] exist: int32 []."""
    return jnp.max(jnp.where(image < NO_IMAGE, made_by(0) - image + 1, 0))


def draw(
    buffers: jax.Array,
    drawings: Drawings,
    calls: jax.Array,
    tools: tuple[Tool, ...],
    pictures: ReturnedPictures | None = None,
) -> jax.Array:
    """Draws the images of one row's calls.

    Args:
      buffers: uint8 [C, H, W, 3] of the prompt.
      drawings: [N].
      calls: int32 [], how many of the N calls draw.
      tools: of the rollout.
      pictures: that host tools returned.

    Returns:
      uint8 [C + N, S, S, 3], the buffers, and behind them the images of the calls, zero beyond the size of each. S is the longest
      of H, W and the sides of `pictures`.
    """
    count, height, width, _ = buffers.shape
    side, calls_most = largest_side(height, width, pictures), drawings.tool.shape[0]
    every = jnp.pad(buffers, ((0, calls_most), (0, side - height), (0, side - width), (0, 0)))
    draws = {i: tool.draw for i, tool in enumerate(tools) if tool.draw is not None}
    index = jnp.arange(side)

    def step(number: jax.Array, every: jax.Array) -> jax.Array:
        tool, values, image, region, size, picture = jax.tree.map(lambda x: x[number], drawings)
        down, across = jnp.minimum(region[1] + index, side - 1), jnp.minimum(region[0] + index, side - 1)
        of = region_size(region)
        source = zero_beyond(every[buffer_index(image, count)][down][:, across], of)
        branches = [lambda i=i, draw=draw: draw(read(tools[i], values), source, of) for i, draw in draws.items()]
        which = sum(jnp.where(tool == i, branch, 0) for branch, i in enumerate(draws))
        drawn = jax.lax.switch(which, branches) if draws else source
        if pictures is not None:
            spare = side - pictures.pixels.shape[1]
            which = jnp.argmax(jnp.all(pictures.digest == picture, axis=1))
            returned = jnp.pad(jnp.asarray(pictures.pixels)[which], ((0, spare), (0, spare), (0, 0)))
            drawn = jnp.where(jnp.any(picture != 0), returned, drawn)
        return every.at[count + number].set(zero_beyond(drawn, size))

    with jax.named_scope("drawings"):
        return jax.lax.fori_loop(0, calls, step, every)


def largest_side(height: int, width: int, pictures: ReturnedPictures | None) -> int:
    """Returns the side in pixels of a square that holds every image of a row, whose buffers are [height, width]."""
    return max(height, width, 0 if pictures is None else pictures.pixels.shape[1])


def zero_beyond(pixels: jax.Array, size: jax.Array) -> jax.Array:
    """Sets pixels uint8 [S, S, 3] beyond `size` (height, width) to zero."""
    index = jnp.arange(pixels.shape[0])
    return jnp.where(((index < size[0])[:, None] & (index < size[1]))[..., None], pixels, 0).astype(jnp.uint8)


def row_images(images: Images, calls: Iterable[Calls], tools: Sequence[Tool]) -> dict[int, np.ndarray]:
    """Returns the images of a row on the host by index (`Views.image`): the prompt's, and those that its calls drew or returned.

    Args:
      images: of the prompt.
      calls: of the row, in order, each without axes.
      tools: of the rollout.
    """
    buffers = dict(enumerate(images.arrays))
    for number, call in enumerate(calls):
        if call.picture is not None and call.picture.any():
            buffers[made_by(number)] = images.find(call.picture)
        elif call.drawn.any():
            buffers[made_by(number)] = draw_on_host(tools[int(call.tool)], call, buffers[int(call.source.image[0])])
    return buffers


def draw_on_host(tool: Tool, call: Calls, source: np.ndarray) -> np.ndarray:
    """Draws the image of `call` of `tool` from `source` uint8 [h, w, 3], with the bits of the device."""
    side = 64 * -(-max(source.shape) // 64)  # rounded up, because each side is compiled
    x1, y1, x2, y2 = call.source.region[0]
    buffer = np.zeros((side, side, 3), np.uint8)
    buffer[: y2 - y1, : x2 - x1] = source[y1:y2, x1:x2]
    height, width = call.drawn
    drawn = _draw(tool, call.values, buffer, np.array([y2 - y1, x2 - x1], np.int32))
    return np.asarray(drawn)[:height, :width]


@functools.partial(jax.jit, static_argnames=("tool",))
def _draw(tool: Tool, values: Values, pixels: AnyArray, size: AnyArray) -> jax.Array:
    assert tool.draw is not None  # it has drawn the image before
    return tool.draw(read(tool, values), jnp.asarray(pixels), jnp.asarray(size))
