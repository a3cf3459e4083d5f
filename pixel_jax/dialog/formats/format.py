"""What a call format is: how a checkpoint writes its calls, and how it is told what came of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from pixel_jax.tools.tool import IN_SHARES, Argument, Box, Coordinates, Outcome, Tool, ToolError

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
TEXT, IMAGES = "{text}", "{images}"
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
      schema: its line in the system prompt; None: made of its name and arguments (`CallFormat.schema`).
      label: the key under which a call may say what it is about; nobody reads it.
      texts: (name of an outcome, text) where it is told otherwise than by the tool; `{images}` is where its images are.
    """

    tool: str
    name: str | None
    arguments: tuple[Spelled, ...]
    schema: str | None = None
    label: str | None = None
    texts: tuple[tuple[str, str], ...] = ()


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
      pad: what is added to each side of a box that is cut out, as a share of the image (`RolloutConfig.pad` can say otherwise).
      response: what surrounds what a tool says and shows, where its spelling does not tell that otherwise: `{text}` and
        `{images}`. None: nothing does.
      system: the system message; `{tools}` stands for a line of JSON for each tool.
      malformed: what answers a call that cannot be read; None: the words of this package.
    """

    name: str
    opening: str = "<tool_call>"
    closing: str = "</tool_call>"
    spellings: tuple[Spelling, ...] = ()
    coordinates: Coordinates = Coordinates.EITHER
    places: int = 0
    pad: float = 0.0
    response: str | None = None
    system: str = SYSTEM
    malformed: str | None = None

    def __post_init__(self):
        for mark in (self.opening, self.closing):
            if len(mark) < 2 or not mark.startswith("<") or "<" in mark[1:] or mark[1] == "|" or not mark.isascii():
                raise ToolError(f"format {self.name!r}: a mark begins with its only '<' and is no token: {mark!r}")
        if self.opening.startswith(self.closing) or self.closing.startswith(self.opening):
            raise ToolError(f"format {self.name!r}: one mark begins with the other: {self.opening!r}, {self.closing!r}")
        if not 0 <= self.pad <= 1:
            raise ToolError(f"format {self.name!r}: pad is a share of the image, in [0, 1]: {self.pad}")
        if self.response is not None and any(self.response.count(x) != 1 for x in (TEXT, IMAGES)):
            raise ToolError(f"format {self.name!r}: the response has {TEXT} and {IMAGES}, each once: {self.response!r}")

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
        return self.system.replace("{tools}", "\n".join(map(self.schema, tools)))

    def schema(self, tool: Tool) -> str:
        """The line of JSON that describes `tool`, by the names that calls write; what the format's arguments do not describe is
        described as the tool's are.
        """
        spelling = self.spelling(tool)
        if spelling.schema is not None:
            return spelling.schema
        own = {argument.name: argument for argument in tool.arguments}
        written = []
        for x in spelling.arguments:
            if x.written is not None:
                said = x.written.description or own[x.argument].description
                said = self.measured(said) if isinstance(x.written, Box) else said
                written.append(dataclasses.replace(x.written, description=said))
        function = {
            "name": spelling.name or tool.name,
            "description": tool.description,
            "parameters": {
                "type": "object",
                "properties": {argument.name: argument.schema() for argument in written},
                "required": [argument.name for argument in written if argument.required],
            },
        }
        return json.dumps({"type": "function", "function": function}, ensure_ascii=False)

    def measured(self, description: str) -> str:
        """The description of a box, with what its numbers are measured in."""
        if self.coordinates == Coordinates.EITHER:
            return description
        said = IN_SHARES if self.places == 0 else f"Values are from 0 to {10**-self.places}, which is the whole side."
        if self.coordinates == Coordinates.PIXELS:
            said = "Values are in pixels of the image."
        return f"{description.removesuffix(IN_SHARES).strip()} {said}".strip()

    def text(self, tool: Tool, outcome: Outcome) -> str:
        """What the model reads of an outcome of `tool`."""
        told = dict(self.spelling(tool).texts)
        if outcome.name in told or self.response is None:
            return told.get(outcome.name, outcome.text)
        elsewhere = IMAGES in outcome.text or not outcome.images
        around = self.response.replace(IMAGES, "") if elsewhere else self.response
        return around.replace(TEXT, outcome.text.strip("\n"))

    def answer(self, tool: Tool, outcome: Outcome, text: str) -> tuple[str, str]:
        """What the model reads of what a `tool` of the host said: before the picture that it returned, and behind it."""
        told = dict(self.spelling(tool).texts).get(outcome.name, self.response)
        if told is None:
            return text, ""
        before, _, behind = told.partition(IMAGES)
        return before.replace(TEXT, text.strip("\n")), behind.replace(TEXT, text.strip("\n"))
