"""What a tool is: a value with a name, a description, typed arguments, the texts of its outcomes, and what it does.

Everything that is said about a tool follows from this value: the schema in the system prompt (`schema`), the parser of
its calls on the host and on the device (`pixel_jax.dialog`), and the arrays in which `execute` gets what was written.

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
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

BOX_NUMBERS = 4
MAX_INTEGERS = 64  # the longest list that is read
MAX_OPTIONS = 64
IN_SHARES = (
    "Values should be within [0.0,1.0]."  # of boxes; a call format that measures otherwise says that in its place
)


class Coordinates(enum.IntEnum):
    """What the numbers of a box are measured in; a call format says so."""

    EITHER = 0  # shares of the image where none is above 1, else pixels of the image as it was shown
    SHARES = 1  # shares of the image
    PIXELS = 2  # pixels of the image at its own size


class ToolError(ValueError):
    """A tool, or a tuple of tools, that cannot be used; the message names it and says why."""


@dataclasses.dataclass(frozen=True)
class Argument:
    """An argument of a tool.

    Args:
      name: the key that a call writes; it needs no escaping in JSON and has no "<".
      description: what the system prompt says of it.
      default: what counts where a call does not write it. None: a call must write it.
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
        return self.default is None

    @property
    def slots(self) -> int:
        """Numbers that its value is kept in."""
        return 1

    @property
    def usage(self) -> str:
        """What a call writes for it."""
        return {"box": "four numbers [x1, y1, x2, y2]", "integers": "a list of integers"}.get(
            self.kind, f"a {self.kind}"
        )

    def problem(self, value: Any) -> str | None:
        """Why `value` is none of this argument; None where it is one."""
        raise NotImplementedError

    def type_schema(self) -> dict[str, Any]:
        raise NotImplementedError

    def schema(self) -> dict[str, Any]:
        """JSON schema, in the order of the released prompts: type, description, the rest."""
        facts = self.type_schema()
        said = {"description": self.description} if self.description else {}
        default = {} if self.default is None else {"default": _plain(self.default)}
        return {"type": facts.pop("type"), **said, **facts, **default}


@dataclasses.dataclass(frozen=True)
class Number(Argument):
    """A number, read to the millionth; a call with one outside [low, high] cannot be carried out."""

    low: float = -math.inf
    high: float = math.inf
    kind: ClassVar[str] = "number"

    def __post_init__(self):
        if math.isnan(self.low) or math.isnan(self.high) or self.low > self.high:
            raise ToolError(f"argument {self.name!r}: [{self.low}, {self.high}] is no interval")
        super().__post_init__()

    def problem(self, value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return "it is no finite number"
        return None if self.low <= value <= self.high else f"it lies outside [{self.low}, {self.high}]"

    def type_schema(self) -> dict[str, Any]:
        low = {"minimum": self.low} if math.isfinite(self.low) else {}
        return {"type": self.kind, **low, **({"maximum": self.high} if math.isfinite(self.high) else {})}


@dataclasses.dataclass(frozen=True)
class Integer(Number):
    """A number that is written without a point or an exponent."""

    kind: ClassVar[str] = "integer"

    def problem(self, value: Any) -> str | None:
        return super().problem(value) or (None if isinstance(value, int) else "it is no integer")


@dataclasses.dataclass(frozen=True)
class Box(Argument):
    """x1, y1, x2, y2. What they are measured in is said by the call format."""

    kind: ClassVar[str] = "box"

    @property
    def slots(self) -> int:
        return BOX_NUMBERS

    def problem(self, value: Any) -> str | None:
        numbers = isinstance(value, tuple) and len(value) == BOX_NUMBERS
        return None if numbers and not any(map(Number("side").problem, value)) else "it is no tuple of four numbers"

    def type_schema(self) -> dict[str, Any]:
        return {"type": "array", "items": {"type": "number"}}


@dataclasses.dataclass(frozen=True)
class Integers(Argument):
    """A list of integers, of any length; the first `most` are kept, and how many there were."""

    most: int = 16
    item_description: str = ""
    kind: ClassVar[str] = "integers"

    def __post_init__(self):
        if not 1 <= self.most <= MAX_INTEGERS:
            raise ToolError(f"argument {self.name!r} keeps 1 to {MAX_INTEGERS} integers, not {self.most}")
        super().__post_init__()

    @property
    def slots(self) -> int:
        return self.most

    def problem(self, value: Any) -> str | None:
        listed = isinstance(value, tuple) and len(value) <= self.most
        good = listed and all(Integer("item").problem(item) is None for item in value)
        return None if good else f"it is no tuple of at most {self.most} integers"

    def type_schema(self) -> dict[str, Any]:
        said = {"description": self.item_description} if self.item_description else {}
        return {"type": "array", "items": {"type": "integer", **said}}


@dataclasses.dataclass(frozen=True)
class Choice(Argument):
    """One of some texts. On the device: its place among `options`."""

    options: tuple[str, ...] = ()
    kind: ClassVar[str] = "choice"

    def __post_init__(self):
        if not 1 <= len(self.options) <= MAX_OPTIONS or len({*self.options}) < len(self.options):
            raise ToolError(f"argument {self.name!r}: 1 to {MAX_OPTIONS} different options, not {self.options}")
        if wrong := [option for option in self.options if not spellable(option)]:
            raise ToolError(f"argument {self.name!r} cannot have the option {wrong[0]!r}: letters and digits are best")
        super().__post_init__()

    def problem(self, value: Any) -> str | None:
        return None if value in self.options else f"it is none of {self.options}"

    @property
    def usage(self) -> str:
        return "one of " + ", ".join(f'"{option}"' for option in self.options)

    def type_schema(self) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.options)}


@dataclasses.dataclass(frozen=True)
class Text(Argument):
    """Any text. Only tools that run on the host can read one."""

    kind: ClassVar[str] = "text"

    @property
    def slots(self) -> int:
        return 0

    def problem(self, value: Any) -> str | None:
        return None if isinstance(value, str) else "it is no text"

    def type_schema(self) -> dict[str, Any]:
        return {"type": "string"}


class Outcome(NamedTuple):
    """One of the things that a call can come to.

    Args:
      name: known to `execute` and in records.
      text: what the model reads: `{0}` to `{3}` stand for integers, `{list}` for a list of them.
      images: the most images that it shows.
      done: it is what the call asked for, though it shows no image; one that shows some is, and any other is a failure.
    """

    name: str
    text: str
    images: int = 0
    done: bool = False


# What becomes of a call of a tool of the host; what the model reads is what the tool says, or what is wrong.
ANSWERED = Outcome("answered", "", done=True)
FAILED = Outcome("failed", "")
TIMED_OUT = Outcome("timed out", "")


@dataclasses.dataclass(frozen=True)
class Tool:
    """An operation that a model can call. Static and hashable: equal tools share compiled programs.

    Args:
      name: what a call names it by.
      description: what the system prompt says of it.
      arguments: in the order of the schema.
      outcomes: everything that a call can come to, but for what all tools share (a call that cannot be read).
      execute: what it does; None where it is only declared. (arguments, seen, limits) -> `Answer`, all of
        `pixel_jax.tools.device`.
      host: `execute` is any Python callable, (images, **arguments) -> text, and runs on the host
        (`pixel_jax.tools.host`), whose outcomes the tool has. Otherwise it is a pure function inside the compiled rollout,
        as is `draw`.
      picture: of a tool of the host: a call may return a picture, too.
      draw: where the tool makes a new picture: (arguments, pixels uint8 [S, S, 3], size int32 [2]) -> uint8 [S, S, 3], of
        what `execute` looks at; pixels are zero beyond size (height, width), boxes are in shares of that (`Answer.shown`). None:
        it shows that as it is.
      drawn_size: (arguments, size) -> int32 [2], of what `draw` makes. None: that of what it is made of.
      budget: whose pixel budgets of the rollout's config its pictures have: those of crops or of selected frames.
      of_videos: it shows frames of videos, and nothing where there is none.
      usage: how a call of it is written, for the message that answers calls that cannot be carried out.
    """

    name: str
    description: str
    arguments: tuple[Argument, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    execute: Callable[..., Any] | None = None
    host: bool = False
    picture: bool = False
    draw: Callable[..., Any] | None = None
    drawn_size: Callable[..., Any] | None = None
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
                    "there are Number, Integer, Box, Integers, Choice and, on the host, Text"
                )
        if twice := _twice([argument.name for argument in self.arguments]):
            raise ToolError(f"tool {self.name!r} has two arguments called {twice!r}")
        if twice := _twice([outcome.name for outcome in self.outcomes]):
            raise ToolError(f"tool {self.name!r} has two outcomes called {twice!r}")
        texts = [argument.name for argument in self.arguments if isinstance(argument, Text)]
        if texts and not self.host:
            raise ToolError(
                f"tool {self.name!r} runs on the device, which cannot read the text {texts[0]!r}: make it a Choice, or "
                f"the tool one of the host (host=True)"
            )
        if self.host:
            if self.execute is None:
                raise ToolError(f"tool {self.name!r} has no `execute`: it is declared, and does nothing")
            answered = ANSWERED._replace(images=int(self.picture))
            object.__setattr__(self, "outcomes", (answered, FAILED, TIMED_OUT))
        elif self.picture:
            raise ToolError(
                f"tool {self.name!r} runs on the device: `picture` is of tools of the host; its pictures are what `draw` makes"
            )
        if not self.usage:
            said = [f"`{argument.name}`, {argument.usage}" for argument in self.arguments]
            object.__setattr__(self, "usage", ", and ".join(said) or "no arguments")

    @property
    def schema(self) -> dict[str, Any]:
        """The function's JSON schema, in the order of the released prompts."""
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
        """Argument -> the first of its number slots (`pixel_jax.dialog.automaton.Calls`)."""
        starts, at = {}, 0
        for argument in self.arguments:
            starts[argument.name] = at
            at += argument.slots
        return starts

    @property
    def slots(self) -> int:
        """Number slots of all arguments together."""
        return sum(argument.slots for argument in self.arguments)

    @property
    def lists(self) -> tuple[str, ...]:
        """The arguments that are lists, in order."""
        return tuple(argument.name for argument in self.arguments if isinstance(argument, Integers))


def check_tools(tools: tuple[Tool, ...]) -> None:
    """Raises `ToolError` where tools cannot be used together.

    What a call writes is read before its tool is known (`name` may come last), so an argument's name says its type.
    """
    if not isinstance(tools, tuple) or not all(isinstance(tool, Tool) for tool in tools):
        raise ToolError(f"tools are a tuple of Tool values, not {tools!r}")
    for tool in tools:
        try:
            hash(tool)
        except TypeError as error:
            raise ToolError(f"the parts of tool {tool.name!r} are tuples and no lists: {error}") from None
    if twice := _twice([tool.name for tool in tools]):
        raise ToolError(f"two tools are called {twice!r}")
    check_arguments([(tool.name, argument) for tool in tools for argument in tool.arguments])


def check_arguments(written: Sequence[tuple[str, Argument]]) -> None:
    """Raises `ToolError` where two tools' arguments of one name are not read alike. Pairs of (tool, argument)."""
    owner: dict[str, tuple[str, Argument]] = {}
    for tool, argument in written:
        name, other = owner.setdefault(argument.name, (tool, argument))
        if other.kind != argument.kind:
            raise ToolError(
                f"{argument.name!r} is of kind {other.kind} in {name!r} and of kind {argument.kind} in {tool!r}: give "
                "one of them another name"
            )
        if isinstance(argument, Choice) and argument.options != other.options:
            raise ToolError(
                f"{argument.name!r} of {name!r} and of {tool!r} have different options: give one of them another name"
            )


def spellable(text: str) -> bool:
    """Whether JSON and the grammar of calls can spell `text` as it is."""
    return not any(
        character in '"\\<' or ord(character) < 32 or 0xD800 <= ord(character) < 0xE000 for character in text
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _twice(names: list[str]) -> str | None:
    return next((name for i, name in enumerate(names) if name in names[:i]), None)
