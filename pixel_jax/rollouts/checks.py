"""Tools that a compiled rollout cannot have, refused by name before anything is compiled."""

import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.dialog.observations import NUM_INTEGERS
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.tools.calls import no_values, read
from pixel_jax.tools.device import Answer, ImageHistory, Seen, size_of_drawing
from pixel_jax.tools.tool import Outcome, Tool, ToolError

SIDE, SLOTS = 64, 3  # of the pictures, and pictures of the row, that a tool is tried with
HOST = ("callback", "infeed", "outfeed", "debug_print")  # in the names of what talks to the host


def check_device_tool(tool: Tool, limits: RolloutConfig = RolloutConfig(pad=0.0)) -> None:  # noqa: B008, never changed
    """Raises `ToolError` where `tool` is no pure function of what it is given, or gives back what there is no room for.

    It is traced, not run: what it computes with pixels and numbers stays unknown.
    """
    if tool.execute is None:
        raise ToolError(f"tool {tool.name!r} has no `execute`: it is declared, and does nothing")
    values = jax.eval_shape(lambda: no_values((), (tool,), jnp))
    pictures, pixels = jax.eval_shape(_seen), jax.ShapeDtypeStruct((SIDE, SIDE, 3), jnp.uint8)
    size = jax.ShapeDtypeStruct((2,), jnp.int32)
    if tool.draw is not None:
        made = _traced(tool, "draw", lambda *x: tool.draw(read(tool, x[0]), *x[1:]), values, pixels, size)
        if getattr(made, "shape", None) != pixels.shape or made.dtype != jnp.uint8:
            raise ToolError(
                f"`draw` of tool {tool.name!r} makes {_said(made)} of {_said(pixels)}: there is room for as many pixels as it "
                "is given and no more"
            )
        new = _traced(
            tool, "drawn_size", lambda values, size: size_of_drawing(tool, read(tool, values), size), values, size
        )
        if getattr(new, "shape", None) != (2,) or not jnp.issubdtype(new.dtype, jnp.integer):
            raise ToolError(f"`drawn_size` of tool {tool.name!r} is {_said(new)}, not int32 [2], (height, width)")
    answer = _traced(
        tool, "execute", lambda values, seen: _checked(tool, read(tool, values), seen, limits), values, pictures
    )
    if answer.shape[0] > (most := max((outcome.images for outcome in tool.outcomes), default=0)):
        raise ToolError(
            f"tool {tool.name!r} gives {answer.shape[0]} pictures, but its outcomes show {most} at most: set `images`"
        )


def _seen() -> Seen:
    zeros = lambda *shape: jnp.zeros(shape, jnp.int32)
    history = ImageHistory(zeros(SLOTS), zeros(SLOTS, 4), zeros(SLOTS, 2), zeros())
    return Seen(history, jnp.bool_(False), zeros(SLOTS, 2), zeros())


def _checked(tool: Tool, arguments, seen: Seen, limits: RolloutConfig) -> jax.Array:
    """The buffers of the tool's answer, whose parts fit together."""
    answer = tool.execute(arguments, seen, limits)
    if not isinstance(answer, Answer):
        raise ToolError(f"`execute` of tool {tool.name!r} gives a {type(answer).__name__}, not an `Answer`")
    for _, outcome, integers in [*answer.outcomes, (True, *answer.last)]:
        if outcome is not None and (not isinstance(outcome, Outcome) or outcome not in tool.outcomes):
            raise ToolError(f"tool {tool.name!r} answers with {outcome!r}, which is none of its outcomes")
        if len(integers) > NUM_INTEGERS:
            raise ToolError(
                f"tool {tool.name!r} says {len(integers)} integers at once; there is room for {NUM_INTEGERS}"
            )
    count = answer.image.shape[0]
    for name, shape in (("image", (count,)), ("region", (count, 4)), ("size", (count, 2))):
        if jnp.shape(getattr(answer, name)) != shape:
            raise ToolError(
                f"`{name}` of what tool {tool.name!r} answers is {jnp.shape(getattr(answer, name))}, not {shape}"
            )
    return answer.image


def _traced(tool: Tool, part: str, function, *given):
    """The abstract result of a part of a tool that is pure."""
    try:
        program, result = jax.make_jaxpr(function, return_shape=True)(*given)
    except ToolError:
        raise
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise ToolError(
            f"`{part}` of tool {tool.name!r} asks for the value of something that only the running program knows: "
            f"{str(error).splitlines()[0]} (jnp.where and jax.lax.cond choose inside a program)"
        ) from None
    except Exception as error:
        said = (str(error).splitlines() or [""])[0]
        raise ToolError(f"`{part}` of tool {tool.name!r} raises {type(error).__name__}: {said}") from error
    if found := next((name for name in _primitives(program) if any(word in name for word in HOST)), None):
        raise ToolError(
            f"`{part}` of tool {tool.name!r} is not pure: it talks to the host ({found}). A tool that must is one of the "
            "host (host=True)"
        )
    return result


def _primitives(program) -> Iterator[str]:
    """Names of the operations of a jaxpr and of those in it."""
    program = getattr(program, "jaxpr", program)
    for equation in program.eqns:
        yield equation.primitive.name
        for value in equation.params.values():
            parts = value if isinstance(value, tuple | list) else (value,)
            inner = [part for part in parts if hasattr(part, "eqns") or hasattr(part, "jaxpr")]
            yield from itertools.chain.from_iterable(map(_primitives, inner))


def _said(x) -> str:
    return f"{np.dtype(x.dtype)} {list(x.shape)}" if hasattr(x, "shape") else type(x).__name__
