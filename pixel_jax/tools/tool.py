"""A tool as a value: a name, a description, typed arguments, the texts of its outcomes, and the functions that carry it out.

Everything else follows from this value: the schema in the system prompt (`schema`), the parser of its calls on the host and on
the device (`pixel_jax.dialog`), and the arrays in which `execute` gets the arguments.

    ROTATE = Tool(
        "rotate",
        "Turn an image by a multiple of 90 degrees, clockwise.",
        (Choice("angle", options=("90", "180", "270")), Integer("target_image", low=1)),
    )
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import jax

BOX_NUMBERS = 4
MAX_INTEGERS = 64  # the longest list that is stored
MAX_OPTIONS = 64
# Ends descriptions of boxes. A call format that measures boxes differently replaces it (`CallFormat.box_description`).
IN_SHARES = "Values should be within [0.0,1.0]."

# (arguments, pixels uint8 [S, S, 3], size int32 [2]) -> uint8 [S, S, 3]
Draw: TypeAlias = Callable[[Mapping[str, Any], jax.Array, jax.Array], jax.Array]
# (arguments, size int32 [2]) -> int32 [2]
DrawnSize: TypeAlias = Callable[[Mapping[str, Any], jax.Array], jax.Array]


class Coordinates(enum.IntEnum):
    """The unit of the numbers of a box; each call format has one."""

    EITHER = 0  # shares of the image if no number is above 1, else pixels of the image as it was shown
    SHARES = 1  # shares of the image
    PIXELS = 2  # pixels of the image at its own size


class ToolError(ValueError):
    """Raised for a tool, or a tuple of tools, that cannot be used; the message names it and the reason."""


@dataclasses.dataclass(frozen=True)
class Argument:
    """An argument of a tool. Its subclasses are the kinds that the parsers know.

    Args:
      name: the key in a call; it needs no escaping in JSON and has no "<".
      description: its description in the system prompt.
      default: the value in calls that leave it out. None: every call must have it.
    """

    name: str
    description: str = ""
    _: dataclasses.KW_ONLY
    default: Any = None

    kind: ClassVar[str] = ""

    def __post_init__(self):
        if not spellable(self.name) or not self.name:
            raise ToolError(f"an argument cannot be called {self.name!r}: letters and digits are best")
        if self.default is not None and (problem := self.problem(self.default)):
            raise ToolError(f"argument {self.name!r} cannot have the default {self.default!r}: {problem}")

    @property
    def required(self) -> bool:
        """Whether every call must have it."""
        return self.default is None

    @property
    def slots(self) -> int:
        """The number of slots that its value takes in arrays of calls."""
        return 1

    @property
    def usage(self) -> str:
        """Says what a call writes for it, in the message that answers malformed calls."""
        return {"box": "four numbers [x1, y1, x2, y2]", "integers": "a list of integers"}.get(
            self.kind, f"a {self.kind}"
        )

    def problem(self, value: Any) -> str | None:
        """Says why `value` is not allowed for this argument; None if it is."""
        raise NotImplementedError

    def type_schema(self) -> dict[str, Any]:
        """Returns the part of the JSON schema that follows from the kind."""
        raise NotImplementedError

    def schema(self) -> dict[str, Any]:
        """Returns the JSON schema, in the order of the released prompts: type, description, the rest."""
        rest = self.type_schema()
        description = {"description": self.description} if self.description else {}
        default = {} if self.default is None else {"default": _plain(self.default)}
        return {"type": rest.pop("type"), **description, **rest, **default}


@dataclasses.dataclass(frozen=True)
class Number(Argument):
    """A number, read to the millionth. Calls with a number outside [low, high] are malformed."""

    low: float = -math.inf
    high: float = math.inf
    kind: ClassVar[str] = "number"

    def __post_init__(self):
        if math.isnan(self.low) or math.isnan(self.high) or self.low > self.high:
            raise ToolError(f"argument {self.name!r}: [{self.low}, {self.high}] is no interval")
        super().__post_init__()

    def problem(self, value: Any) -> str | None:
        """Says why `value` is not a finite number within the bounds; None if it is."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return "it is no finite number"
        return None if self.low <= value <= self.high else f"it lies outside [{self.low}, {self.high}]"

    def type_schema(self) -> dict[str, Any]:
        """Returns the type and the bounds."""
        low = {"minimum": self.low} if math.isfinite(self.low) else {}
        return {"type": self.kind, **low, **({"maximum": self.high} if math.isfinite(self.high) else {})}


@dataclasses.dataclass(frozen=True)
class Integer(Number):
    """A number written without a decimal point or an exponent."""

    kind: ClassVar[str] = "integer"

    def problem(self, value: Any) -> str | None:
        """Says why `value` is not an int within the bounds; None if it is."""
        return super().problem(value) or (None if isinstance(value, int) else "it is no integer")


@dataclasses.dataclass(frozen=True)
class Box(Argument):
    """Four numbers x1, y1, x2, y2. The call format says what they are measured in."""

    kind: ClassVar[str] = "box"

    @property
    def slots(self) -> int:
        """Four, one for each side."""
        return BOX_NUMBERS

    def problem(self, value: Any) -> str | None:
        """Says why `value` is not four finite numbers; None if it is."""
        numbers = isinstance(value, tuple) and len(value) == BOX_NUMBERS
        return None if numbers and not any(map(Number("side").problem, value)) else "it is no tuple of four numbers"

    def type_schema(self) -> dict[str, Any]:
        """Returns the type of an array of numbers."""
        return {"type": "array", "items": {"type": "number"}}


@dataclasses.dataclass(frozen=True)
class Integers(Argument):
    """A list of integers of any length, of which the first `most` and the length are stored."""

    most: int = 16
    item_description: str = ""
    kind: ClassVar[str] = "integers"

    def __post_init__(self):
        if not 1 <= self.most <= MAX_INTEGERS:
            raise ToolError(f"argument {self.name!r} stores 1 to {MAX_INTEGERS} integers, not {self.most}")
        super().__post_init__()

    @property
    def slots(self) -> int:
        """The number of integers that are stored."""
        return self.most

    def problem(self, value: Any) -> str | None:
        """Says why `value` is not at most `most` integers; None if it is."""
        listed = isinstance(value, tuple) and len(value) <= self.most
        good = listed and all(Integer("item").problem(item) is None for item in value)
        return None if good else f"it is no tuple of at most {self.most} integers"

    def type_schema(self) -> dict[str, Any]:
        """Returns the type of an array of integers."""
        description = {"description": self.item_description} if self.item_description else {}
        return {"type": "array", "items": {"type": "integer", **description}}


@dataclasses.dataclass(frozen=True)
class Choice(Argument):
    """One of several texts; on the device, its index among `options`."""

    options: tuple[str, ...] = ()
    kind: ClassVar[str] = "choice"

    def __post_init__(self):
        if not 1 <= len(self.options) <= MAX_OPTIONS or len({*self.options}) < len(self.options):
            raise ToolError(f"argument {self.name!r}: 1 to {MAX_OPTIONS} different options, not {self.options}")
        if wrong := [option for option in self.options if not spellable(option)]:
            raise ToolError(f"argument {self.name!r} cannot have the option {wrong[0]!r}: letters and digits are best")
        super().__post_init__()

    def problem(self, value: Any) -> str | None:
        """Says why `value` is none of the options; None if it is one."""
        return None if value in self.options else f"it is none of {self.options}"

    @property
    def usage(self) -> str:
        """Lists the options."""
        return "one of " + ", ".join(f'"{option}"' for option in self.options)

    def type_schema(self) -> dict[str, Any]:
        """Returns the type of a string, with the options."""
        return {"type": "string", "enum": list(self.options)}


@dataclasses.dataclass(frozen=True)
class Text(Argument):
    """Any text. Only host tools can have such an argument."""

    kind: ClassVar[str] = "text"

    @property
    def slots(self) -> int:
        """Zero: texts are not stored in arrays."""
        return 0

    def problem(self, value: Any) -> str | None:
        """Says why `value` is no string; None if it is."""
        return None if isinstance(value, str) else "it is no text"

    def type_schema(self) -> dict[str, Any]:
        """Returns the type of a string."""
        return {"type": "string"}


class Outcome(NamedTuple):
    """One of the possible outcomes of a call.

    An outcome that shows images, or has `done`, is a success; any other is an error that the model can read.

    Args:
      name: its name in records.
      text: the text that the model reads; `{0}` to `{3}` stand for integers, `{list}` for a list of them.
      images: the most images that it shows.
      done: whether it is a success without showing an image.
    """

    name: str
    text: str
    images: int = 0
    done: bool = False


# The outcomes of host tools. The model reads the text that the tool returns, or the error.
ANSWERED = Outcome("answered", "", done=True)
FAILED = Outcome("failed", "")
TIMED_OUT = Outcome("timed out", "")


@dataclasses.dataclass(frozen=True)
class Tool:
    """An operation that a model can call. Static and hashable: equal tools share compiled programs.

    Args:
      name: its name in calls.
      description: its description in the system prompt.
      arguments: in the order of the schema.
      outcomes: the possible outcomes of a call. Malformed calls have an outcome that all tools share.
      execute: carries out a call; None for a tool that is only declared. Of a device tool, a pure function in the compiled
        rollout, (arguments, seen, limits) -> `Answer` (`pixel_jax.tools.device`). Of a host tool, any Python function,
        (images, **arguments) -> text (`pixel_jax.tools.host`).
      host: whether it is a host tool, which runs in a process of its own; its outcomes are fixed.
      picture: whether a call of a host tool may return a picture, too.
      draw: makes a new image from the region that `execute` chooses; a pure function in the compiled rollout. None: the region is
        shown as it is. (arguments, pixels uint8 [S, S, 3], size int32 [2]) -> uint8 [S, S, 3]. Pixels are zero beyond size
        (height, width); boxes among the arguments are in shares of it.
      drawn_size: (arguments, size int32 [2]) -> int32 [2], (height, width) of what `draw` returns. None: `size`.
      budget: whether images that it shows have the pixel budgets of crops or of selected frames (in the rollout's config).
      of_videos: whether it can only show frames of videos.
      usage: what a call writes, for the message that answers malformed calls. Empty: made from the arguments.
    """

    name: str
    description: str
    arguments: tuple[Argument, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    execute: Callable[..., Any] | None = None
    host: bool = False
    picture: bool = False
    draw: Draw | None = None
    drawn_size: DrawnSize | None = None
    budget: Literal["crop", "select"] = "crop"
    of_videos: bool = False
    usage: str = ""

    def __post_init__(self):
        if not self.name or not spellable(self.name):
            raise ToolError(f"a tool cannot be called {self.name!r}: letters and digits are best")
        for argument in self.arguments:
            if not isinstance(argument, Argument):
                raise ToolError(f"tool {self.name!r}: {argument!r} is no argument: Number, Integer, Box, ... are")
            if not isinstance(argument, Number | Box | Integers | Choice | Text):
                raise ToolError(
                    f"tool {self.name!r}: no parser can read the argument {argument.name!r}, a {type(argument).__name__}: "
                    "use Number, Integer, Box, Integers, Choice or, in host tools, Text"
                )
        if twice := _twice([argument.name for argument in self.arguments]):
            raise ToolError(f"tool {self.name!r} has two arguments called {twice!r}")
        if twice := _twice([outcome.name for outcome in self.outcomes]):
            raise ToolError(f"tool {self.name!r} has two outcomes called {twice!r}")
        texts = [argument.name for argument in self.arguments if isinstance(argument, Text)]
        if texts and not self.host:
            raise ToolError(
                f"tool {self.name!r} runs on the device, which cannot read the text {texts[0]!r}: make it a Choice, or "
                "the tool a host tool (host=True)"
            )
        if self.host:
            if self.execute is None:
                raise ToolError(f"tool {self.name!r} has no `execute`: it is declared, and does nothing")
            answered = ANSWERED._replace(images=int(self.picture))
            object.__setattr__(self, "outcomes", (answered, FAILED, TIMED_OUT))
        elif self.picture:
            raise ToolError(
                f"tool {self.name!r} runs on the device: only host tools have `picture`; device tools make pictures by `draw`"
            )
        if not self.usage:
            usages = [f"`{argument.name}`, {argument.usage}" for argument in self.arguments]
            object.__setattr__(self, "usage", ", and ".join(usages) or "no arguments")

    @property
    def schema(self) -> dict[str, Any]:
        """The tool's JSON schema, in the order of the released prompts."""
        return {
            "name": self.name,
            "description": self.description,
            "parameters": {
                "type": "object",
                "properties": {argument.name: argument.schema() for argument in self.arguments},
                "required": [argument.name for argument in self.arguments if argument.required],
            },
        }

    @property
    def starts(self) -> dict[str, int]:
        """The first slot of each argument, by name (`pixel_jax.tools.calls.ParsedCalls`)."""
        starts, slot = {}, 0
        for argument in self.arguments:
            starts[argument.name] = slot
            slot += argument.slots
        return starts

    @property
    def slots(self) -> int:
        """The number of slots of all arguments together."""
        return sum(argument.slots for argument in self.arguments)

    @property
    def lists(self) -> tuple[str, ...]:
        """The names of the arguments that are lists, in order."""
        return tuple(argument.name for argument in self.arguments if isinstance(argument, Integers))


def check_tools(tools: tuple[Tool, ...]) -> None:
    """Checks that tools can be used together.

    Arguments of one name must have one type in all tools, because `name` may come last in a call: its arguments are parsed before
    its tool is known.

    Raises:
      ToolError: the tools cannot be used together.
    """
    if not isinstance(tools, tuple) or not all(isinstance(tool, Tool) for tool in tools):
        raise ToolError(f"tools are a tuple of Tool values, not {tools!r}")
    for tool in tools:
        try:
            hash(tool)
        except TypeError as error:
            raise ToolError(
                f"the fields of tool {tool.name!r} must be hashable, tuples instead of lists: {error}"
            ) from None
    if twice := _twice([tool.name for tool in tools]):
        raise ToolError(f"two tools are called {twice!r}")
    check_arguments([(tool.name, argument) for tool in tools for argument in tool.arguments])


def check_arguments(written: Sequence[tuple[str, Argument]]) -> None:
    """Checks pairs of (tool's name, argument).

    Raises:
      ToolError: two arguments of one name have different types.
    """
    owner: dict[str, tuple[str, Argument]] = {}
    for tool, argument in written:
        name, other = owner.setdefault(argument.name, (tool, argument))
        if other.kind != argument.kind:
            raise ToolError(
                f"{argument.name!r} is of kind {other.kind} in {name!r} and of kind {argument.kind} in {tool!r}: give "
                "one of them another name"
            )
        if isinstance(argument, Choice) and isinstance(other, Choice) and argument.options != other.options:
            raise ToolError(
                f"{argument.name!r} of {name!r} and of {tool!r} have different options: give one of them another name"
            )


def spellable(text: str) -> bool:
    """Whether `text` can stand in a call without escapes, by JSON and by the grammar of calls."""
    return not any(
        character in '"\\<' or ord(character) < 32 or 0xD800 <= ord(character) < 0xE000 for character in text
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _twice(names: list[str]) -> str | None:
    return next((name for i, name in enumerate(names) if name in names[:i]), None)
