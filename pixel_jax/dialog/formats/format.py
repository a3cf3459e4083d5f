"""What a call format is: how a checkpoint writes its calls, and how it is told what came of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from pixel_jax.tools.tool import Argument, Coordinates, Outcome, Tool, ToolError

# The rendering of Qwen-Agent's NousFnCallPrompt.
TOOLS_PROMPT = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""
SYSTEM = "You are a helpful assistant.\n\n" + TOOLS_PROMPT


@dataclasses.dataclass(frozen=True)
class Spelled:
    """How a call writes an argument of a tool.

    Args:
      argument: the tool's name for it.
      written: what a call writes; None: nothing, it always is `value`.
      add: what is added to the integer that is written, or to the place of the option.
    """

    argument: str
    written: Argument | None = None
    add: int = 0
    value: Any = None


@dataclasses.dataclass(frozen=True)
class Spelling:
    """How the calls of a tool are written.

    Args:
      tool: whose.
      name: what a call names it by; None where calls have no name.
      arguments: all of the tool's.
      schema: its line in the system prompt; None: its own.
      label: the key under which a call may say what it is about; nobody reads it.
      told: (name of an outcome, text) where it is told otherwise than by the tool; `{images}` is where its images are.
    """

    tool: str
    name: str | None
    arguments: tuple[Spelled, ...]
    schema: str | None = None
    label: str | None = None
    told: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class CallFormat:
    """How calls are written. Static and hashable.

    A call is one JSON object between two marks: `{"name": ..., "arguments": {...}}`, or, where calls have no name, the
    arguments alone.

    Args:
      name: what a config calls the format.
      opening, closing: the marks. They begin with "<" and have no other.
      spellings: of the tools that are not written by their own names and arguments.
      coordinates: what boxes are measured in, once their numbers are moved by
      places: to the left: -3 where 1000 is the whole side.
      system: the system message; `{tools}` stands for a line of JSON for each tool.
      malformed: what answers a call that cannot be read; None: the words of this package.
    """

    name: str
    opening: str = "<tool_call>"
    closing: str = "</tool_call>"
    spellings: tuple[Spelling, ...] = ()
    coordinates: Coordinates = Coordinates.EITHER
    places: int = 0
    system: str = SYSTEM
    malformed: str | None = None

    def __post_init__(self):
        for mark in (self.opening, self.closing):
            if len(mark) < 2 or not mark.startswith("<") or "<" in mark[1:] or mark[1] == "|" or not mark.isascii():
                raise ToolError(f"format {self.name!r}: a mark begins with its only '<' and is no token: {mark!r}")
        if self.opening.startswith(self.closing) or self.closing.startswith(self.opening):
            raise ToolError(f"format {self.name!r}: one mark begins with the other: {self.opening!r}, {self.closing!r}")

    def spelling(self, tool: Tool) -> Spelling:
        """How `tool` is written: as the format says, else by its own names."""
        own = tuple(Spelled(argument.name, argument) for argument in tool.arguments)
        special = {spelling.tool: spelling for spelling in self.spellings}
        if tool.name in special:
            return special[tool.name]
        if any(spelling.name is None for spelling in self.spellings):
            raise ToolError(
                f"calls of the format {self.name!r} have no name: it can only write {[*special]}, not {tool.name!r}"
            )
        return Spelling(tool.name, tool.name, own)

    def system_prompt(self, tools: Sequence[Tool]) -> str:
        """The system message that says how `tools` are called."""
        lines = []
        for tool in tools:
            schema = {"type": "function", "function": tool.schema}
            lines.append(self.spelling(tool).schema or json.dumps(schema, ensure_ascii=False))
        return self.system.replace("{tools}", "\n".join(lines))

    def text(self, tool: Tool, outcome: Outcome) -> str:
        """What the model reads of an outcome of `tool`."""
        return dict(self.spelling(tool).told).get(outcome.name, outcome.text)
