"""The grammar of a tool call, and its parser on the host.

A *response* is the text of one assistant turn. All occurrences of `<|im_end|>` are taken out of it, once, from left to
right. If what is left ends with `</tool_call>` and perhaps white space, a call is **required**: the policy waits for an answer.
The call is the text between the last `<tool_call>` and that closing tag. It is **valid** if it is in this language and
nothing else:

    call      = ws object ws
    object    = "{" ws member (ws "," ws member)* ws "}"
    member    = key ws ":" ws value        of these, or any other key and a scalar, which is not looked at:
                "name"          "crop_image_normalized" or "select_frames"
                "arguments"     an object; of its keys
                "bbox_2d"       "[" number, number, number, number (, number)* "]"     those behind the fourth do not count
                "target_image"  number
                "target_frames" "[" integer, ... "]"                                   any count, none included
    scalar    = number | "true" | "false" | "null" | string
    number    = integer ("." [0-9]+)? ([eE] [-+]? [0-9]+)?
    integer   = "-"? ("0" | [1-9][0-9]*)
    key       = a string without a backslash
    string    = JSON's, without "<"; its bytes outside ASCII may be any
    ws        = any count of space, tab, line feed, carriage return; also between all tokens of the objects and arrays

and has a name and the keys that belong to it: `bbox_2d` and `target_image`, or `target_frames`. Of a key that is there
twice the last value counts. Everything else gets one fixed error message. A number is read as whole units, at most
`MAX_UNITS` (beyond, it stays there), and millionths; further decimals are cut off, before the exponent is applied.

These are the calls that the released code carries out (`json.loads`, then what it looks up), but for what a finite
automaton cannot decide or nobody writes, which it takes and we do not: an array or an object as the value of a further
key; a further key with a backslash or a "<" in it; `name`, `bbox_2d`, `target_image` or `target_frames` with a value of
another kind where it does not belong or is given again; NaN, Infinity, and true or false for a number; and text between
the call's closing tag and a second one. Two things are wider than there: white space behind the closing tag (there it
ends the conversation), and integers that are too long for Python.

`automaton.py` decides the same language on the device, and reads the same values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from pixel_jax.dialog.template import CROP, SELECT

OPEN, CLOSE, END = b"<tool_call>", b"</tool_call>", b"<|im_end|>"
TOOL_NAMES = (CROP, SELECT)  # a tool is known by its place here
BOX_NUMBERS = 4
MAX_UNITS = 999_999_999
MAX_SHIFT = 16  # places that an exponent moves a number by: more make no difference to what is read of it
WHITE_SPACE = b" \t\n\r"


class Number(NamedTuple):
    """A decimal number: (-1)^negative * (units + micros / 10^6)."""

    units: int
    micros: int
    negative: bool
    integer: bool  # written without a decimal point or an exponent: what Python's json reads as an int

    def signed_units(self) -> int:
        return -self.units if self.negative else self.units


class Call(NamedTuple):
    """A valid call. `box` and `target_image` belong to crop_image_normalized, `frames` to select_frames."""

    tool: int
    box: tuple[Number, ...] = ()
    target_image: Number | None = None
    frames: tuple[int, ...] = ()


class Turn(NamedTuple):
    """What a response asks for: nothing, a call, or (required, but call is None) something malformed."""

    required: bool
    call: Call | None


class MalformedCallError(ValueError):
    """A call outside the grammar."""


def parse_turn(response: str | bytes) -> Turn:
    """Whether a response requires a call, and which. Never raises, whatever the text."""
    data = response.encode("utf-8", "surrogatepass") if isinstance(response, str) else bytes(response)
    data = data.replace(END, b"").rstrip(WHITE_SPACE)
    if not data.endswith(CLOSE):
        return Turn(False, None)
    before, opening, body = data.removesuffix(CLOSE).rpartition(OPEN)
    try:
        return Turn(True, parse_call(body) if opening else None)
    except MalformedCallError:
        return Turn(True, None)


def parse_call(body: bytes) -> Call:
    """The call in the text between the tags, or `MalformedCallError`."""
    members: dict[bytes, object] = {}
    text = _Text(body)
    for key in text.members():
        if key == b'"name"':
            members[key] = _tool(text.take("string"))
        elif key == b'"arguments"':
            members[key] = dict(_arguments(text))
        else:
            text.take("string", "number", "literal")
    text.end()
    if members.keys() != {b'"name"', b'"arguments"'}:
        raise MalformedCallError(f"a call has a name and arguments, not only {[*members]}")
    tool, arguments = members[b'"name"'], members[b'"arguments"']
    wanted = {CROP: ("box", "target_image"), SELECT: ("frames",)}[TOOL_NAMES[tool]]
    if missing := [key for key in wanted if key not in arguments]:
        raise MalformedCallError(f"{TOOL_NAMES[tool]} needs {missing}")
    return Call(tool, **{key: arguments[key] for key in wanted})


def _tool(name: bytes) -> int:
    for tool, known in enumerate(TOOL_NAMES):
        if name == b'"%s"' % known.encode():
            return tool
    raise MalformedCallError(f"no tool is called {name!r}")


def _arguments(text: _Text) -> Iterator[tuple[str, object]]:
    for key in text.members():
        if key == b'"bbox_2d"':
            numbers = [_read_number(number) for number in text.numbers()]
            if len(numbers) < BOX_NUMBERS:
                raise MalformedCallError(f"bbox_2d is {BOX_NUMBERS} numbers, not {numbers!r}")
            yield "box", tuple(numbers[:BOX_NUMBERS])
        elif key == b'"target_image"':
            yield "target_image", _read_number(text.take("number"))
        elif key == b'"target_frames"':
            numbers = [_read_number(number) for number in text.numbers()]
            if not all(number.integer for number in numbers):
                raise MalformedCallError(f"target_frames is a list of integers, not {numbers!r}")
            yield "frames", tuple(number.signed_units() for number in numbers)
        else:
            text.take("string", "number", "literal")


class _Text:
    """The tokens of a call, in order."""

    TOKEN = re.compile(
        rb"(?P<mark>[{}\[\]:,])"
        rb"|(?P<number>-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)"
        rb"|(?P<literal>true|false|null)"
        rb'|(?P<string>"(?:[^"\\<\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*")'
    )
    SPACE = re.compile(rb"[ \t\n\r]*")

    def __init__(self, body: bytes):
        self.body, self.at = body, 0
        self._skip_space()

    def _skip_space(self) -> None:
        self.at = self.SPACE.match(self.body, self.at).end()

    def take(self, *kinds: str) -> bytes:
        """The next token, which must be of one of these kinds; a mark is a kind of its own."""
        found = self.TOKEN.match(self.body, self.at)
        kind = found and (found.group().decode("latin-1") if found.lastgroup == "mark" else found.lastgroup)
        if kind not in kinds:
            raise MalformedCallError(f"one of {kinds} is wanted at {self.body[self.at : self.at + 20]!r}")
        self.at = found.end()
        self._skip_space()
        return found.group()

    def members(self) -> Iterator[bytes]:
        """The keys of the object that comes next; its values are for the caller to take."""
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
        """The numbers of the array that comes next."""
        self.take("[")
        token = self.take("number", "]")
        while token != b"]":
            yield token
            token = self.take(",", "]")
            token = self.take("number") if token == b"," else token

    def end(self) -> None:
        if self.at < len(self.body):
            raise MalformedCallError(f"a call ends with its object, not with {self.body[self.at : self.at + 20]!r}")


def _read_number(text: bytes) -> Number:
    mantissa, *exponent = re.split(rb"[eE]", text)
    whole, point, decimals = mantissa.removeprefix(b"-").partition(b".")
    units = int(whole) if len(whole) <= len(str(MAX_UNITS)) else MAX_UNITS
    micros = int((decimals + b"000000")[:6])
    for _ in range(abs(shift := _shift(*exponent))):
        if shift > 0:
            units, micros = min(units * 10 + micros // 100_000, MAX_UNITS), micros % 100_000 * 10
        else:
            units, micros = units // 10, (units % 10 * 10**6 + micros) // 10
    return Number(units, micros, text.startswith(b"-"), not point and not exponent)


def _shift(exponent: bytes = b"0") -> int:
    """The places that an exponent, [-+]?[0-9]+, moves a number by to the left; at most MAX_SHIFT either way."""
    digits = exponent.lstrip(b"-+").lstrip(b"0") or b"0"
    places = int(digits) if len(digits) <= len(str(MAX_SHIFT)) else MAX_SHIFT
    return min(places, MAX_SHIFT) * (-1 if exponent.startswith(b"-") else 1)
