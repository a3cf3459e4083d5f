"""Checks, before anything is compiled, that device tools can be part of a compiled rollout."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.dialog.observations import NUM_INTEGERS
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.tools.calls import no_values, read
from pixel_jax.tools.device import Answer, ImageHistory, Seen, size_of_drawing
from pixel_jax.tools.tool import Outcome, Tool, ToolError

SIDE, SLOTS = 64, 3  # side of the images, and number of images of the row, with which a tool is traced
HOST = ("callback", "infeed", "outfeed", "debug_print")  # parts of names of operations that communicate with the host


def check_device_tool(tool: Tool, limits: RolloutConfig = RolloutConfig(pad=0.0)) -> None:  # noqa: B008, never changed
    """Checks that the functions of `tool` are pure and that their results have the right shapes.

    They are traced, not run, so what they compute is not checked.

    Raises:
      ToolError: a function is not pure, raises an error, or returns something else.
    """
    if tool.execute is None:
        raise ToolError(f"tool {tool.name!r} has no `execute`: it is declared, and does nothing")
    values = jax.eval_shape(lambda: no_values((), (tool,), jnp))
    pictures, pixels = jax.eval_shape(_seen), jax.ShapeDtypeStruct((SIDE, SIDE, 3), jnp.uint8)
    size = jax.ShapeDtypeStruct((2,), jnp.int32)
    if (draw := tool.draw) is not None:
        drawn = _traced(tool, "draw", lambda *x: draw(read(tool, x[0]), *x[1:]), values, pixels, size)
        if getattr(drawn, "shape", None) != pixels.shape or drawn.dtype != jnp.uint8:
            raise ToolError(
                f"`draw` of tool {tool.name!r} makes {_said(drawn)} of {_said(pixels)}: it must return as many pixels as it gets"
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
    """Checks the tool's answer and returns its images, int32 [V]."""
    assert tool.execute is not None
    answer = tool.execute(arguments, seen, limits)
    if not isinstance(answer, Answer):
        raise ToolError(f"`execute` of tool {tool.name!r} gives a {type(answer).__name__}, not an `Answer`")
    for _, outcome, integers in [*answer.outcomes, (True, *answer.last)]:
        if outcome is not None and (not isinstance(outcome, Outcome) or outcome not in tool.outcomes):
            raise ToolError(f"tool {tool.name!r} answers with {outcome!r}, which is none of its outcomes")
        if len(integers) > NUM_INTEGERS:
            raise ToolError(
                f"tool {tool.name!r} gives {len(integers)} integers to one outcome; {NUM_INTEGERS} are allowed"
            )
    count = answer.image.shape[0]
    for name, shape in (("image", (count,)), ("region", (count, 4)), ("size", (count, 2))):
        if jnp.shape(getattr(answer, name)) != shape:
            raise ToolError(
                f"`{name}` of what tool {tool.name!r} answers is {jnp.shape(getattr(answer, name))}, not {shape}"
            )
    return answer.image


def _traced(tool: Tool, part: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Traces a function of a tool, which must be pure, and returns its abstract result."""
    try:
        program, result = jax.make_jaxpr(function, return_shape=True)(*arguments)
    except ToolError:
        raise
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise ToolError(
            f"`{part}` of tool {tool.name!r} needs a value that only the running program has: "
            f"{str(error).splitlines()[0]} (jnp.where and jax.lax.cond choose inside a program)"
        ) from None
    except Exception as error:
        text = (str(error).splitlines() or [""])[0]
        raise ToolError(f"`{part}` of tool {tool.name!r} raises {type(error).__name__}: {text}") from error
    if operation := next((name for name in _primitives(program) if any(word in name for word in HOST)), None):
        raise ToolError(
            f"`{part}` of tool {tool.name!r} is not pure: it communicates with the host ({operation}). Make it a host tool "
            "(host=True)"
        )
    return result


def _primitives(program: Any) -> Iterator[str]:
    """Yields the names of the operations of a jaxpr and of the jaxprs in it."""
    program = getattr(program, "jaxpr", program)
    for equation in program.eqns:
        yield equation.primitive.name
        for value in equation.params.values():
            parts = value if isinstance(value, tuple | list) else (value,)
            inner = [part for part in parts if hasattr(part, "eqns") or hasattr(part, "jaxpr")]
            yield from itertools.chain.from_iterable(map(_primitives, inner))


def _said(x: Any) -> str:
    return f"{np.dtype(x.dtype)} {list(x.shape)}" if hasattr(x, "shape") else type(x).__name__
