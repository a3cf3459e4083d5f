"""The language of tool calls, and its parser on the host.

A *response* is the text of one assistant turn. All occurrences of `<|im_end|>` are removed from it, in one pass from left to
right. If the rest ends with the format's closing mark, perhaps followed by white space, a call is **required**: the policy waits
for an answer. The call is the text between the last opening mark and that closing mark. It is **valid** if it is exactly one call
of this language:

    call      = ws object ws
    object    = "{" ws member (ws "," ws member)* ws "}"
    member    = key ws ":" ws value        one of these keys, or any other key with a scalar, which is ignored:
                "name"          a string: the name of a tool
                "arguments"     an object; its keys are those of the tools' arguments, with values by their kind:
                                a number, an integer
                                box       "[" number, number, number, number (, number)* "]", the first four of which count
                                integers  "[" integer, ... "]"                                 any count, none included
                                choice    a string, one of the options
                                text      a string
    scalar    = number | "true" | "false" | "null" | string
    number    = integer ("." [0-9]+)? ([eE] [-+]? [0-9]+)?
    integer   = "-"? ("0" | [1-9][0-9]*)
    key       = a string without a backslash
    string    = JSON's, without "<"; its bytes outside ASCII may be any
    ws        = any count of space, tab, line feed, carriage return; also between all tokens of the objects and arrays

and has a name and all required arguments of this tool, within their bounds. Where a format's calls have no name, the call
is the object of the arguments. Where calls are written between tags (`Body.TAGS`), it is

    call      = ws "<function=" name ">" ws (parameter ws)* "</function>" ws
    parameter = "<parameter=" key ">" value "</parameter>"     one of these keys, or any other with a text, which is ignored
    value     = ws number ws, and so for integer, box and integers
              | LF option LF ws | LF text LF
    text      = any bytes without "<"

with a key without quotation mark, backslash, "<", ">" and control characters. If a key appears twice, the last value counts.
Everything else gets one fixed error message. A number is read as whole units, clipped to `MAX_UNITS`, and millionths; further
decimals are cut off before the exponent is applied.

With the tools and the format of the released checkpoints these are the calls that the released code carries out (by
`json.loads`), with a few exceptions that a finite automaton cannot decide or nobody writes. Refused here, and accepted there,
are an array or an object as the value of a further key; a further key with a backslash or a "<" in it; `name`, `bbox_2d`,
`target_image` or `target_frames` with a value of another kind in another object or a second time; NaN, Infinity, and true or
false for a number; and text between the call's closing tag and a second one. Accepted here, and refused there, are white space
behind the closing tag (there it ends the conversation), and integers that are too long for Python.

`call_parser.py` decides the same language on the device, and reads the same values.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pixel_jax.dialog.formats import PIXEL_REASONER, Body, CallFormat, Spelling
from pixel_jax.tools import RELEASED
from pixel_jax.tools import tool as kinds
from pixel_jax.tools.tool import BOX_NUMBERS, Argument, Tool, ToolError, check_arguments, check_tools

END = b"<|im_end|>"
MAX_UNITS = 999_999_999
MAX_SHIFT = 16  # decimal places that an exponent shifts a number by; larger shifts give the same result
MAX_KEYS = 31
WHITE_SPACE = b" \t\n\r"


class DecimalNumber(NamedTuple):
    """A decimal number: (-1)^negative * (units + micros / 10^6)."""

    units: int
    micros: int
    negative: bool
    integer: bool  # written without a decimal point or an exponent: what Python's json reads as an int

    @classmethod
    def of(cls, value: float) -> DecimalNumber:
        """Reads a Python number as if a call had written it."""
        return read_number(json.dumps(value).encode())

    def signed_units(self) -> int:
        """The number without its decimals."""
        return -self.units if self.negative else self.units

    def signed(self) -> tuple[int, int]:
        """Units and millionths with their sign: pairs that compare as the numbers do."""
        return (-self.units, -self.micros) if self.negative else (self.units, self.micros)


Value = DecimalNumber | int | str | tuple[DecimalNumber, ...] | tuple[int, ...]


class ToolCall(NamedTuple):
    """A valid call."""

    tool: int  # index among the tools
    arguments: dict[str, Value]  # by kind: DecimalNumber, int, four DecimalNumbers, ints, a text


class ParsedTurn(NamedTuple):
    """A parsed response: no call, a valid one, or (if required, but call is None) a malformed one."""

    required: bool
    call: ToolCall | None


class MalformedCallError(ValueError):
    """Raised for a call outside the language."""


class ArgumentSource(NamedTuple):
    """The source of the value of an argument."""

    argument: Argument
    key: str | None  # in the call; None: the value is always the default
    add: int  # number that is added to the integer, or to the index of the option
    default: Value | None  # None: a call must have the key


@dataclasses.dataclass(frozen=True)
class Language:
    """The calls of some tools in a call format.

    Raises:
      ToolError: the tools cannot be used together in this format; the message names the conflict.
    """

    tools: tuple[Tool, ...] = RELEASED
    format: CallFormat = PIXEL_REASONER

    def __post_init__(self):
        check_tools(self.tools)
        check_arguments([(tool.name, written) for tool, written in self._written()])
        names = [spelling.name for spelling in self.spellings]
        if len({*names}) < len(names):
            raise ToolError(f"the format {self.format.name!r} gives two tools one name: {names}")
        if not self.named and len(names) > 1:
            raise ToolError(f"calls of the format {self.format.name!r} have no name: it can have one tool, not {names}")
        if len(self.keys) > MAX_KEYS:
            raise ToolError(f"tools have {len(self.keys)} arguments of different names: {MAX_KEYS} can be read")
        _ = self.sources  # raises where an argument has none

    @functools.cached_property
    def spellings(self) -> tuple[Spelling, ...]:
        """The notation of the calls of each tool in the format."""
        return tuple(self.format.spelling(tool) for tool in self.tools)

    def _written(self) -> list[tuple[Tool, Argument]]:
        pairs = zip(self.tools, self.spellings, strict=True)
        return [(tool, x.written) for tool, spelling in pairs for x in spelling.arguments if x.written is not None]

    @property
    def named(self) -> bool:
        """Whether calls have a name."""
        return all(spelling.name is not None for spelling in self.spellings)

    @functools.cached_property
    def keys(self) -> dict[str, Argument]:
        """The keys of arguments in calls. A list has the length of the longest of its tools."""
        keys: dict[str, Argument] = {}
        for _, written in self._written():
            known = keys.setdefault(written.name, written)
            if isinstance(written, kinds.Integers) and isinstance(known, kinds.Integers) and written.most > known.most:
                keys[written.name] = written
        return keys

    @functools.cached_property
    def sources(self) -> tuple[tuple[ArgumentSource, ...], ...]:
        """The source of the value of every argument of every tool."""
        return tuple(map(self._sources, self.tools, self.spellings))

    def _sources(self, tool: Tool, spelling: Spelling) -> tuple[ArgumentSource, ...]:
        spelled = {x.argument: x for x in spelling.arguments}
        if {*spelled} != {argument.name for argument in tool.arguments}:
            raise ToolError(
                f"the format {self.format.name!r} writes {[*spelled]} of the tool {tool.name!r}, whose arguments are "
                f"{[argument.name for argument in tool.arguments]}"
            )
        outcomes = [outcome.name for outcome in tool.outcomes]
        if unknown := [name for name, _ in spelling.texts if name not in outcomes]:
            raise ToolError(
                f"the format {self.format.name!r} has a text for the outcome {unknown[0]!r} of the tool {tool.name!r}, "
                f"whose outcomes are {outcomes}"
            )
        sources = []
        for argument in tool.arguments:
            written, default = spelled[argument.name].written, spelled[argument.name].value
            default = argument.default if default is None else default
            if written is None and default is None:
                raise ToolError(f"the format {self.format.name!r} neither writes nor fixes {argument.name!r}")
            if written is not None and not _reads_as(written, argument, spelled[argument.name].add):
                raise ToolError(
                    f"the format {self.format.name!r} writes a {written.kind} for the {argument.kind} {argument.name!r} of "
                    f"{tool.name!r}, plus {spelled[argument.name].add}"
                )
            value = None if default is None else value_of(argument, default)
            sources.append(ArgumentSource(argument, written and written.name, spelled[argument.name].add, value))
        return tuple(sources)


def _reads_as(written: Argument, argument: Argument, add: int) -> bool:
    """Whether the value of `argument` can be computed from the argument `written` in a call, plus `add`."""
    if isinstance(argument, kinds.Number) and isinstance(written, kinds.Integer | kinds.Choice):
        return True
    if isinstance(argument, kinds.Integers) and isinstance(written, kinds.Integers):
        return not add and written.most >= argument.most
    if isinstance(argument, kinds.Choice) and isinstance(written, kinds.Choice):
        return not add and written.options == argument.options
    return not add and written.kind == argument.kind


def value_of(argument: Argument, value: Any) -> Value:
    """Converts a default, a Python value of the argument's kind, to the form of values in calls."""
    match argument:
        case kinds.Integer() | kinds.Choice() | kinds.Text() | kinds.Integers():
            return value
        case kinds.Box():
            return tuple(map(DecimalNumber.of, value))
    return DecimalNumber.of(value)


RELEASED_LANGUAGE = Language()


def parse_turn(response: str | bytes, language: Language = RELEASED_LANGUAGE) -> ParsedTurn:
    """Parses a response, whatever its text. Never raises."""
    data = response.encode("utf-8", "surrogatepass") if isinstance(response, str) else bytes(response)
    data = data.replace(END, b"").rstrip(WHITE_SPACE)
    opening, closing = language.format.opening.encode(), language.format.closing.encode()
    if not data.endswith(closing):
        return ParsedTurn(False, None)
    _, opened, body = data.removesuffix(closing).rpartition(opening)
    try:
        return ParsedTurn(True, parse_call(body, language) if opened else None)
    except MalformedCallError:
        return ParsedTurn(True, None)


def parse_call(body: bytes, language: Language = RELEASED_LANGUAGE) -> ToolCall:
    """Parses the text between the marks.

    Raises:
      MalformedCallError: the text is no valid call.
    """
    text = _Text(body)
    if language.format.body == Body.TAGS:
        tool, written = _tagged(text, language)
    elif language.named:
        tool, written = _named(text, language)
    else:
        tool, written = 0, dict(_arguments(text, language))
    text.end()
    return ToolCall(
        tool, {source.argument.name: _value(source, written, language) for source in language.sources[tool]}
    )


# The value of a key in a call: of a choice the index of the option, of a text the JSON string.
Written = DecimalNumber | int | bytes | tuple[DecimalNumber, ...] | tuple[int, ...]


def _named(text: _Text, language: Language) -> tuple[int, dict[str, Written]]:
    names = [_quoted(spelling.name) for spelling in language.spellings if spelling.name is not None]
    tool, arguments = None, None
    for key in text.members():
        if key == b'"name"':
            if (name := text.take("string")) not in names:
                raise MalformedCallError(f"no tool is called {name!r}")
            tool = names.index(name)
        elif key == b'"arguments"':
            arguments = dict(_arguments(text, language))
        else:
            text.take("string", "number", "literal")
    if tool is None or arguments is None:
        raise MalformedCallError(
            f"a call has a name and arguments; this one lacks {'name' if tool is None else 'arguments'}"
        )
    return tool, arguments


def _tagged(text: _Text, language: Language) -> tuple[int, dict[str, Written]]:
    names = [spelling.name for spelling in language.spellings]
    if (name := text.read(rb"<function=([^<>]*)>").decode("utf-8", "replace")) not in names:
        raise MalformedCallError(f"no tool is called {name!r}")
    text.read(SPACE)
    arguments: dict[str, Written] = {}
    while not text.starts(b"</function>"):
        key = text.read(rb'<parameter=([^<>"\\\x00-\x1f]*)>').decode("utf-8", "replace")
        argument = language.keys.get(key)
        match argument:
            case None:
                text.read(rb"[^<]*")
            case kinds.Text():
                written = text.read(rb"\n([^<]*)\n").decode("utf-8", "replace")
                arguments[key] = json.dumps(written).encode()
            case kinds.Choice():
                option = text.read(rb"\n([^<\n]*)\n").decode("utf-8", "replace")
                if option not in argument.options:
                    raise MalformedCallError(f"{key} is one of {argument.options}, not {option!r}")
                arguments[key] = argument.options.index(option)
                text.read(SPACE)
            case _:
                text.read(SPACE)
                arguments[key] = _written(text, argument, language.format.places)
        text.read(b"</parameter>")
        text.read(SPACE)
    text.read(b"</function>")
    text.read(SPACE)
    return names.index(name), arguments


def _arguments(text: _Text, language: Language) -> Iterator[tuple[str, Written]]:
    keys = {_quoted(key): argument for key, argument in language.keys.items()}
    for key in text.members():
        argument = keys.get(key)
        if argument is None:
            text.take("string", "number", "literal")
        else:
            yield argument.name, _written(text, argument, language.format.places)


def _written(text: _Text, argument: Argument, places: int) -> Written:
    match argument:
        case kinds.Box():
            numbers = [read_number(number, places) for number in text.numbers()]
            if len(numbers) < BOX_NUMBERS:
                raise MalformedCallError(f"{argument.name} is {BOX_NUMBERS} numbers, not {numbers!r}")
            return tuple(numbers[:BOX_NUMBERS])
        case kinds.Integers():
            numbers = [read_number(number) for number in text.numbers()]
            if not all(number.integer for number in numbers):
                raise MalformedCallError(f"{argument.name} is a list of integers, not {numbers!r}")
            return tuple(number.signed_units() for number in numbers)
        case kinds.Choice():
            options = [*map(_quoted, argument.options)]
            if (option := text.take("string")) not in options:
                raise MalformedCallError(f"{argument.name} is one of {argument.options}, not {option!r}")
            return options.index(option)
        case kinds.Text():
            return text.take("string")
    number = read_number(text.take("number"))
    if isinstance(argument, kinds.Integer) and not number.integer:
        raise MalformedCallError(f"{argument.name} is an integer, not {number!r}")
    return number


def _quoted(text: str) -> bytes:
    return b'"%s"' % text.encode()


def _value(source: ArgumentSource, written: Mapping[str, Written], language: Language) -> Value:
    """Computes the value of an argument from a call."""
    argument = source.argument
    if source.key is None or source.key not in written:
        if source.default is None:
            raise MalformedCallError(f"{argument.name} is missing")
        return source.default
    value = written[source.key]
    if isinstance(value, bytes):
        text = json.loads(value.decode("utf-8", "replace"))
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # replaces halves of surrogate pairs
    if isinstance(argument, kinds.Choice):
        assert isinstance(value, int)  # an index among the same options
        return argument.options[value]
    if not isinstance(argument, kinds.Number):
        return value
    number = DecimalNumber(value, 0, False, True) if isinstance(value, int) else value
    assert isinstance(number, DecimalNumber)
    if source.add:
        total = number.signed_units() + source.add
        number = number._replace(units=abs(total), negative=total < 0)
    low, high = (
        DecimalNumber.of(x).signed() if abs(x) != float("inf") else None for x in (argument.low, argument.high)
    )
    if (low and number.signed() < low) or (high and number.signed() > high):
        raise MalformedCallError(f"{argument.name} lies outside [{argument.low}, {argument.high}]")
    return number.signed_units() if isinstance(argument, kinds.Integer) else number


SPACE = rb"[ \t\n\r]*"


class _Text:
    """The text of a call, read token by token."""

    TOKEN = re.compile(
        rb"(?P<mark>[{}\[\]:,])"
        rb"|(?P<number>-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)"
        rb"|(?P<literal>true|false|null)"
        rb'|(?P<string>"(?:[^"\\<\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*")'
    )

    def __init__(self, body: bytes):
        self.body, self.at = body, 0
        self.read(SPACE)

    def starts(self, text: bytes) -> bool:
        """Whether `text` comes next."""
        return self.body.startswith(text, self.at)

    def read(self, pattern: bytes) -> bytes:
        """Reads what must match `pattern`; returns its group, or all of it where there is none."""
        matched = re.compile(pattern).match(self.body, self.at)
        if matched is None:
            raise MalformedCallError(f"{pattern!r} is expected at {self.body[self.at : self.at + 20]!r}")
        self.at = matched.end()
        return matched[matched.re.groups]

    def take(self, *kinds: str) -> bytes:
        """Reads the next token, which must be of one of these kinds. Each mark is a kind, too."""
        token = self.TOKEN.match(self.body, self.at)
        kind = token and (token.group().decode("latin-1") if token.lastgroup == "mark" else token.lastgroup)
        if token is None or kind not in kinds:
            raise MalformedCallError(f"one of {kinds} is expected at {self.body[self.at : self.at + 20]!r}")
        self.at = token.end()
        self.read(SPACE)
        return token.group()

    def members(self) -> Iterator[bytes]:
        """Reads the object that comes next and yields its keys; the caller must take the values."""
        self.take("{")
        while True:
            key = self.take("string")
            if b"\\" in key:
                raise MalformedCallError(f"the key {key!r} has a backslash")
            self.take(":")
            yield key
            if self.take(",", "}") == b"}":
                return

    def numbers(self) -> Iterator[bytes]:
        """Reads the array that comes next and yields its numbers."""
        self.take("[")
        token = self.take("number", "]")
        while token != b"]":
            yield token
            token = self.take(",", "]")
            token = self.take("number") if token == b"," else token

    def end(self) -> None:
        """Checks that nothing follows."""
        if self.at < len(self.body):
            raise MalformedCallError(f"a call ends with its object, not with {self.body[self.at : self.at + 20]!r}")


def read_number(text: bytes, places: int = 0) -> DecimalNumber:
    """Reads a number of the language; `places` is added to its exponent."""
    mantissa, *exponent = re.split(rb"[eE]", text)
    whole, point, decimals = mantissa.removeprefix(b"-").partition(b".")
    units = int(whole) if len(whole) <= len(str(MAX_UNITS)) else MAX_UNITS
    micros = int((decimals + b"000000")[:6])
    for _ in range(abs(shift := _shift(*exponent) + places)):
        if shift > 0:
            units, micros = min(units * 10 + micros // 100_000, MAX_UNITS), micros % 100_000 * 10
        else:
            units, micros = units // 10, (units % 10 * 10**6 + micros) // 10
    return DecimalNumber(units, micros, text.startswith(b"-"), not point and not exponent)


def _shift(exponent: bytes = b"0") -> int:
    """Reads an exponent, [-+]?[0-9]+, clipped to MAX_SHIFT either way."""
    digits = exponent.lstrip(b"-+").lstrip(b"0") or b"0"
    places = int(digits) if len(digits) <= len(str(MAX_SHIFT)) else MAX_SHIFT
    return min(places, MAX_SHIFT) * (-1 if exponent.startswith(b"-") else 1)
