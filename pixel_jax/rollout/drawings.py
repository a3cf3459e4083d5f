"""Pictures that tools make of what a row has seen. They are never kept: whoever looks at one has it made again, bit for bit.

A row has the canvases of its prompt and, behind them, one for each of its calls. What call n made may be what call n + 1
looks at, so they are made in order, as far as they are wanted.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.rollout.config import RolloutConfig
from pixel_jax.rollout.images import Images
from pixel_jax.rollout.trajectory import NO_CANVAS, Calls, made_by
from pixel_jax.tools.calls import Values, read
from pixel_jax.tools.looking import region_size
from pixel_jax.tools.tool import Tool


class Drawings(NamedTuple):
    """What each of N calls made, as what it was made of: [..., N]."""

    tool: jax.Array  # int32 [..., N], index into the tools
    values: Values  # [..., N, ...], the arguments
    canvas: jax.Array  # int32 [..., N], as in `Views`
    region: jax.Array  # int32 [..., N, 4]
    size: jax.Array  # int32 [..., N, 2], (height, width) of what was made; zeros: nothing was


def drawings(calls: Calls, tools: tuple[Tool, ...], config: RolloutConfig) -> Drawings | None:
    """Those of the calls [..., N] that can be looked at; None where no tool makes pictures, or all are blanked."""
    if config.blank or all(tool.draw is None for tool in tools):
        return None
    first, most = calls.source.canvas[..., 0], config.max_calls
    found = Drawings(calls.tool, calls.values, first, calls.source.region[..., 0, :], calls.drawn)
    axis = first.ndim - 1
    return jax.tree.map(lambda x: x[(slice(None),) * axis + (slice(most),)], found)


def places(canvas: jax.Array, canvases: int) -> jax.Array:
    """Where canvases (`Views.canvas`) lie among those of a prompt and what was made of them."""
    return jnp.where(canvas >= 0, canvas, jnp.where(canvas < NO_CANVAS, canvases + made_by(0) - canvas, 0))


def reach(canvas: jax.Array) -> jax.Array:
    """How many calls must be carried out for the canvases [...] to be there: int32."""
    return jnp.max(jnp.where(canvas < NO_CANVAS, made_by(0) - canvas + 1, 0))


def draw(canvases: jax.Array, drawings: Drawings, calls: jax.Array, tools: tuple[Tool, ...]) -> jax.Array:
    """The canvases of one row uint8 [C, H, W, 3], and behind them what its first `calls` made: [C + N, S, S, 3], S the longer of
    H and W. Zero beyond the size of each."""
    count, height, width, _ = canvases.shape
    side, calls_most = max(height, width), drawings.tool.shape[0]
    room = jnp.pad(canvases, ((0, calls_most), (0, side - height), (0, side - width), (0, 0)))
    making = [i for i, tool in enumerate(tools) if tool.draw is not None]
    index = jnp.arange(side)

    def step(number: jax.Array, room: jax.Array) -> jax.Array:
        tool, values, canvas, region, size = jax.tree.map(lambda x: x[number], drawings)
        down, across = jnp.minimum(region[1] + index, side - 1), jnp.minimum(region[0] + index, side - 1)
        of = region_size(region)
        source = inside(room[places(canvas, count)][down][:, across], of)
        branches = [lambda i=i: tools[i].draw(read(tools[i], values), source, of) for i in making]
        which = sum(jnp.where(tool == i, place, 0) for place, i in enumerate(making))
        return room.at[count + number].set(inside(jax.lax.switch(which, branches), size))

    with jax.named_scope("drawings"):
        return jax.lax.fori_loop(0, calls, step, room)


def inside(pixels: jax.Array, size: jax.Array) -> jax.Array:
    """uint8 [S, S, 3] with zeros beyond (height, width)."""
    index = jnp.arange(pixels.shape[0])
    return jnp.where(((index < size[0])[:, None] & (index < size[1]))[..., None], pixels, 0).astype(jnp.uint8)


def canvases_of(images: Images, calls: Iterable[Calls], tools: Sequence[Tool]) -> dict[int, np.ndarray]:
    """The canvases of a row, as `Views.canvas` names them: the images of its prompt, and what its calls made, in order."""
    canvases = dict(enumerate(images.arrays))
    for number, call in enumerate(calls):
        if call.drawn.any():
            source = canvases[int(call.source.canvas[0])]
            canvases[made_by(number)] = draw_on_host(tools[call.tool], call, source)
    return canvases


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
