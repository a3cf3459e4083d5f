"""The grammar of a tool call, and its parser on the host.

A *response* is the text of one assistant turn. All occurrences of `<|im_end|>` are taken out of it, once, from left to
right. If what is left ends with `</tool_call>`, a call is **required**: the policy waits for an answer. The call is the
text between the last `<tool_call>` and that closing tag. It is **valid** if it is in this language and nothing else:

    call      = ws "{" ws member ws "," ws member ws "}" ws     the two members below, each once, in any order
    members   : "name" ws ":" ws NAME                           NAME: "crop_image_normalized" or "select_frames"
                "arguments" ws ":" ws object                    the object that belongs to NAME
    crop      = "{" "bbox_2d": "[" number × 4 "]", "target_image": number "}"            in any order
    select    = "{" "target_frames": "[" integer, ... "]" "}"                            any count, none included
    number    = "-"? ("0" | [1-9][0-9]*) ("." [0-9]+)?          at most 12 characters
    integer   = "-"? ("0" | [1-9][0-9]*)                        at most 12 characters
    ws        = any count of space, tab, line feed, carriage return; also between all tokens of the objects and arrays

It is a part of JSON: no duplicate or further keys, no escapes in strings, no exponents (a number is read digit by digit
and 1e-3 is rarely written for a coordinate), no other nesting, no byte outside ASCII. Everything else gets one fixed
error message. A number is read as whole units, at most `MAX_UNITS` (beyond, it stays there), and millionths, further
decimals being cut off.

`automaton.py` decides the same language on the device, and reads the same values.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from pixel_jax.dialog.template import CROP, SELECT

OPEN, CLOSE, END = b"<tool_call>", b"</tool_call>", b"<|im_end|>"
TOOL_NAMES = (CROP, SELECT)  # a tool is known by its place here
BOX_NUMBERS = 4
MAX_CHARACTERS = 12
MAX_UNITS = 999_999_999


class Number(NamedTuple):
    """A decimal number: (-1)^negative * (units + micros / 10^6)."""

    units: int
    micros: int
    negative: bool
    integer: bool  # written without a decimal point: what Python's json reads as an int

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
    data = data.replace(END, b"")
    if not data.endswith(CLOSE):
        return Turn(False, None)
    before, opening, body = data.removesuffix(CLOSE).rpartition(OPEN)
    try:
        return Turn(True, parse_call(body) if opening else None)
    except MalformedCallError:
        return Turn(True, None)


def parse_call(body: bytes) -> Call:
    """The call in the text between the tags, or `MalformedCallError`."""
    if not body.isascii() or b"\\" in body:
        raise MalformedCallError("a call is ASCII and has no escapes")
    try:
        value = json.loads(
            body.decode("ascii"),
            parse_int=_read_number,
            parse_float=_read_number,
            parse_constant=_no_constant,
            object_pairs_hook=_unique_keys,
        )
    except (ValueError, RecursionError) as error:
        raise MalformedCallError(f"not JSON: {error}") from error
    call = _members(value, {"name", "arguments"})
    if call["name"] == CROP:
        arguments = _members(call["arguments"], {"bbox_2d", "target_image"})
        box, target = arguments["bbox_2d"], arguments["target_image"]
        if not _is_list_of_numbers(box) or len(box) != BOX_NUMBERS:
            raise MalformedCallError(f"bbox_2d is {BOX_NUMBERS} numbers, not {box!r}")
        if not isinstance(target, Number):
            raise MalformedCallError(f"target_image is a number, not {target!r}")
        return Call(TOOL_NAMES.index(CROP), box=tuple(box), target_image=target)
    if call["name"] == SELECT:
        frames = _members(call["arguments"], {"target_frames"})["target_frames"]
        if not _is_list_of_numbers(frames) or not all(number.integer for number in frames):
            raise MalformedCallError(f"target_frames is a list of integers, not {frames!r}")
        return Call(TOOL_NAMES.index(SELECT), frames=tuple(number.signed_units() for number in frames))
    raise MalformedCallError(f"no tool is called {call['name']!r}")


def _read_number(text: str) -> Number:
    if len(text) > MAX_CHARACTERS:
        raise MalformedCallError(f"{text} has more than {MAX_CHARACTERS} characters")
    if "e" in text or "E" in text:
        raise MalformedCallError(f"{text} has an exponent")
    whole, point, decimals = text.removeprefix("-").partition(".")
    micros = int((decimals + "000000")[:6])
    return Number(min(int(whole), MAX_UNITS), micros, text.startswith("-"), not point)


def _no_constant(text: str):
    raise MalformedCallError(f"{text} is no number")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise MalformedCallError(f"duplicate keys among {[key for key, _ in pairs]}")
    return members


def _members(value: object, keys: set[str]) -> dict[str, object]:
    if not isinstance(value, dict) or value.keys() != keys:
        raise MalformedCallError(f"an object with the keys {sorted(keys)} is wanted, not {value!r}")
    return value


def _is_list_of_numbers(value: object) -> bool:
    # A Number is a tuple, JSON's arrays are lists: they cannot be confused.
    return isinstance(value, list) and all(isinstance(number, Number) for number in value)
