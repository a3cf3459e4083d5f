"""Call formats as values: the notation of a checkpoint's calls, and of the answers to them."""

from __future__ import annotations

import dataclasses
import enum
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


class Body(enum.Enum):
    """The notation of a call between its marks.

    JSON: an object, `{"name": ..., "arguments": {...}}`, or, where calls have no name, the arguments alone
    TAGS: `<function=NAME>`, for each argument `<parameter=KEY>`, its value and `</parameter>`, and `</function>`, each on a line
        of its own. Texts and options are written as they are, other values as JSON.
    """

    JSON = "json"
    TAGS = "tags"


@dataclasses.dataclass(frozen=True)
class Spelled:
    """The notation of an argument of a tool in calls.

    Args:
      argument: its name in the tool.
      written: the argument in calls. None: calls do not write it, its value is always `value`.
      add: number that is added to the integer that is written, or to the index of the option.
      value: the value if calls do not write it.
    """

    argument: str
    written: Argument | None = None
    add: int = 0
    value: Any = None


@dataclasses.dataclass(frozen=True)
class Spelling:
    """The notation of the calls of a tool.

    Args:
      tool: the name of the tool.
      name: its name in calls; None where calls have no name.
      arguments: all arguments of the tool.
      schema: its line in the system prompt. None: made from its name and arguments (`CallFormat.schema`).
      label: a key under which a call may say what it is about; parsers ignore it.
      texts: (name of an outcome, text) for outcomes whose text differs from the tool's; `{images}` stands for the images.
    """

    tool: str
    name: str | None
    arguments: tuple[Spelled, ...]
    schema: str | None = None
    label: str | None = None
    texts: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class CallFormat:
    """A notation of calls. Static and hashable.

    A call stands between two marks, in the form that `body` says.

    Args:
      name: its name in configs.
      opening: the mark before a call. Both marks begin with "<" and contain no other "<".
      closing: the mark behind a call.
      body: the notation between the marks. Only in JSON can calls be without a name.
      spellings: the notations of the tools whose names or arguments in calls differ from their own.
      coordinates: the unit of boxes, after their numbers are shifted by `places`.
      places: decimal places to shift the numbers of boxes by; -3 where 1000 stands for the whole side.
      pad: the padding of each side of a crop, as a share of the image; `RolloutConfig.pad` overrides it.
      response: the frame around the text and images of outcomes without a text in `Spelling.texts`, with `{text}` and `{images}`.
        None: no frame.
      system: the system message; `{tools}` stands for a line of JSON for each tool.
      malformed: the answer to malformed calls. None: this package's.
    """

    name: str
    opening: str = "<tool_call>"
    closing: str = "</tool_call>"
    body: Body = Body.JSON
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
        if self.body == Body.TAGS and any(spelling.name is None for spelling in self.spellings):
            raise ToolError(f"format {self.name!r}: calls between tags have a name, which a spelling lacks")
        if not 0 <= self.pad <= 1:
            raise ToolError(f"format {self.name!r}: pad is a share of the image, in [0, 1]: {self.pad}")
        if self.response is not None and any(self.response.count(x) != 1 for x in (TEXT, IMAGES)):
            raise ToolError(f"format {self.name!r}: the response has {TEXT} and {IMAGES}, each once: {self.response!r}")

    def spelling(self, tool: Tool) -> Spelling:
        """Returns how calls of `tool` are written: as in `spellings`, or else by the tool's own names.

        Raises:
          ToolError: calls of the format have no name, and it has no spelling for this tool.
        """
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
        """Returns the system message that describes `tools` and how to call them."""
        return self.system.replace("{tools}", "\n".join(map(self.schema, tools)))

    def schema(self, tool: Tool) -> str:
        """Returns the line of JSON that describes `tool`, with its names in calls.

        An argument without a description in the format has the tool's description.
        """
        spelling = self.spelling(tool)
        if spelling.schema is not None:
            return spelling.schema
        own = {argument.name: argument for argument in tool.arguments}
        written = []
        for x in spelling.arguments:
            if x.written is not None:
                description = x.written.description or own[x.argument].description
                description = self.box_description(description) if isinstance(x.written, Box) else description
                written.append(dataclasses.replace(x.written, description=description))
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

    def box_description(self, description: str) -> str:
        """Adds to the description of a box what its numbers are measured in."""
        if self.coordinates == Coordinates.EITHER:
            return description
        unit = IN_SHARES if self.places == 0 else f"Values are from 0 to {10**-self.places}, which is the whole side."
        if self.coordinates == Coordinates.PIXELS:
            unit = "Values are in pixels of the image."
        return f"{description.removesuffix(IN_SHARES).strip()} {unit}".strip()

    def text(self, tool: Tool, outcome: Outcome) -> str:
        """Returns the text that the model reads for an outcome of `tool`."""
        texts = dict(self.spelling(tool).texts)
        if outcome.name in texts or self.response is None:
            return texts.get(outcome.name, outcome.text)
        elsewhere = IMAGES in outcome.text or not outcome.images
        frame = self.response.replace(IMAGES, "") if elsewhere else self.response
        return frame.replace(TEXT, outcome.text.strip("\n"))

    def answer(self, tool: Tool, outcome: Outcome, text: str) -> tuple[str, str]:
        """Returns what the model reads for the `text` of a host tool: the text before its picture, and the text behind it."""
        frame = dict(self.spelling(tool).texts).get(outcome.name, self.response)
        if frame is None:
            return text, ""
        before, _, behind = frame.partition(IMAGES)
        return before.replace(TEXT, text.strip("\n")), behind.replace(TEXT, text.strip("\n"))
