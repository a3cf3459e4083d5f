"""From the names in a config to tools and call formats: those that are shipped, and `module:name` for anybody's own."""

from collections.abc import Sequence
from typing import Any

from pixel_jax import named
from pixel_jax import tools as shipped
from pixel_jax.dialog.formats import FORMATS, CallFormat, call_format
from pixel_jax.tools.tool import Tool, ToolError, check_tools

SHIPPED = {tool.name: tool for tool in vars(shipped).values() if isinstance(tool, Tool)}
DEFAULT = tuple(tool.name for tool in shipped.RELEASED)


def find_tools(names: Sequence[str]) -> tuple[Tool, ...]:
    """The tools of these names, in order. `module:name` is a `Tool` in a Python module, which is imported; the current
    directory is searched last.

    To be called with what a command line or a config file says, and with nothing that a model's directory or data says.

    Raises:
        ToolError: there is none of a name, or they cannot be used together.
    """
    tools = tuple(_find(name) for name in names)
    check_tools(tools)
    return tools


def _find(name: str) -> Tool:
    if name in SHIPPED:
        return SHIPPED[name]
    if ":" not in name:
        raise ToolError(
            f"no tool is called {name!r}: those that come with the package are {', '.join(SHIPPED)}; one of your own is "
            "given as module:name"
        )
    return imported(name, Tool, "tool")


def find_format(name: str) -> CallFormat:
    """The call format of this name; one of a user's own is imported, as `find_tools` does, and known by this name from then on.

    Raises:
        ToolError: there is none.
    """
    if name not in FORMATS and ":" in name:
        FORMATS[name] = imported(name, CallFormat, "call format")
    return call_format(name)


def imported(name: str, kind: type, what: str) -> Any:
    """The `kind` that `module:name` names.

    Raises:
        ToolError: it names nothing, or something else.
    """
    try:
        found = named.find(name)
    except named.NamedError as error:
        raise ToolError(f"{what} {error}") from error
    if not isinstance(found, kind):
        raise ToolError(f"{what} {name!r} is a {type(found).__name__}, not a {kind.__name__}")
    return found
