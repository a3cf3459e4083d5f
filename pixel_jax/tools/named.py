"""Finds tools and call formats by the names in a config: those of the package, and `module:name` for a user's own."""

from collections.abc import Sequence
from typing import TypeVar

from pixel_jax import named
from pixel_jax import tools as shipped
from pixel_jax.dialog.formats import FORMATS, CallFormat, call_format
from pixel_jax.tools.tool import Tool, ToolError, check_tools

T = TypeVar("T")
SHIPPED = {tool.name: tool for tool in vars(shipped).values() if isinstance(tool, Tool)}
DEFAULT = tuple(tool.name for tool in shipped.RELEASED)


def find_tools(names: Sequence[str]) -> tuple[Tool, ...]:
    """Returns the tools of these names, in order.

    `module:name` is a `Tool` in a Python module, which is imported; the current directory is searched last. So the names must
    come from a command line or a config file, never from a model's directory or from data.

    Raises:
      ToolError: a name has no tool, or the tools cannot be used together.
    """
    tools = tuple(_find(name) for name in names)
    check_tools(tools)
    return tools


def _find(name: str) -> Tool:
    if name in SHIPPED:
        return SHIPPED[name]
    if ":" not in name:
        raise ToolError(
            f"no tool is called {name!r}: those of the package are {', '.join(SHIPPED)}; name one of your "
            "own as module:name"
        )
    return imported(name, Tool, "tool")


def find_format(name: str) -> CallFormat:
    """Returns the call format of this name. A user's own is imported as by `find_tools`, and added to `FORMATS`.

    Raises:
      ToolError: no format has this name.
    """
    if name not in FORMATS and ":" in name:
        FORMATS[name] = imported(name, CallFormat, "call format")
    return call_format(name)


def imported(name: str, kind: type[T], what: str) -> T:
    """Imports what `module:name` names, which must be a `kind`; messages call it `what`.

    Raises:
      ToolError: the name is that of nothing, or of an object of another class.
    """
    try:
        value = named.find(name)
    except named.NamedError as error:
        raise ToolError(f"{what} {error}") from error
    if not isinstance(value, kind):
        raise ToolError(f"{what} {name!r} is a {type(value).__name__}, not a {kind.__name__}")
    return value
