"""Writes calls in a format: the inverse of the parser."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pixel_jax.dialog.formats import Body, CallFormat, Coordinates, Spelled
from pixel_jax.dialog.grammar import Language
from pixel_jax.tools import tool as kinds

HUNDREDTHS = 2  # decimals of a share


class UnwritableError(ValueError):
    """Raised for a call that a format cannot write; the message names the format and the value."""


def write_call(
    language: Language, tool: str, values: Mapping[str, Any], *, size: tuple[int, int] = (1, 1), label: str = ""
) -> str:
    """Returns the text of a call of `tool`.

    Args:
      language: the tools and the format.
      tool: its name.
      values: the arguments, by their names in the tool; a box is in shares of a picture, in whole hundredths; a choice is a text.
      size: (height, width) of the picture that boxes are of.
      label: what the call is about, for formats that have a key for it.

    Raises:
      UnwritableError: the format cannot write the call.
    """
    names = [x.name for x in language.tools]
    if tool not in names:
        raise UnwritableError(f"{tool!r} is none of the tools {', '.join(names)}")
    spelling = language.spellings[names.index(tool)]
    pairs = [pair for x in spelling.arguments if (pair := _member(language, x, values[x.argument], size))]
    members = dict(pairs)
    if spelling.label is not None and label:
        # Parsers ignore the label, so where "<" cannot be written a similar character replaces it.
        members[spelling.label] = label.replace("<", "\u2039") if language.format.body == Body.TAGS else label
    return write_members(language.format, spelling.name, members)


class Json(str):
    """JSON text of a value that is not a string."""


def write_members(call_format: CallFormat, name: str | None, members: Mapping[str, str | Json]) -> str:
    """Returns the text of a call.

    Args:
      call_format: the format of the call.
      name: None: the format's calls have none.
      members: values by key: texts, or JSON.

    Raises:
      UnwritableError: the format cannot write the call.
    """
    opening, closing = call_format.opening, call_format.closing
    if call_format.body == Body.TAGS:
        if cut := [text for text in members.values() if "<" in text]:
            raise UnwritableError(f"a value in the format {call_format.name!r} has no '<': {cut[0]!r}")
        lines = [f"<parameter={key}>\n{text}\n</parameter>" for key, text in members.items()]
        return "\n".join([opening, f"<function={name}>", *lines, "</function>", closing])
    texts = {key: text if isinstance(text, Json) else _string(text) for key, text in members.items()}
    arguments = "{" + ", ".join(f"{_string(key)}: {text}" for key, text in texts.items()) + "}"
    if name is None:
        return f"{opening}{arguments}{closing}"
    return f'{opening}\n{{"name": {_string(name)}, "arguments": {arguments}}}\n{closing}'


def _member(language: Language, spelled: Spelled, value: Any, size: tuple[int, int]) -> tuple[str, str | Json] | None:
    """Returns key and value of an argument; None where calls do not write it."""
    argument, format_name = spelled.written, language.format.name
    if argument is None:
        if value != spelled.value:
            raise UnwritableError(
                f"{spelled.argument} is always {spelled.value} in the format {format_name!r}, not {value}"
            )
        return None
    if isinstance(argument, kinds.Box):
        return argument.name, Json(f"[{written_box(language, value, size)}]")
    if isinstance(argument, kinds.Choice):
        index = value - spelled.add if isinstance(value, int) else argument.options.index(value)
        if not 0 <= index < len(argument.options):
            raise UnwritableError(f"{spelled.argument} {value} has no name in the format {format_name!r}")
        return argument.name, argument.options[index]
    if isinstance(argument, kinds.Integers):
        return argument.name, Json(json.dumps(list(value)))
    return argument.name, value if isinstance(value, str) else Json(json.dumps(value - spelled.add))


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("<", "\\u003c")  # strings in calls have no "<"


def written_box(language: Language, box: Sequence[float], size: tuple[int, int]) -> str:
    """Writes the numbers of a box in hundredths: shares with two decimals, shifted by the format's `places`, or whole pixels."""
    if language.format.coordinates == Coordinates.PIXELS:
        pairs = zip(as_written(language, box, size), size[::-1] * 2, strict=True)
        return ", ".join(str(round(side * share)) for share, side in pairs)
    places = -language.format.places
    return ", ".join(f"{x * 10**places:.{max(HUNDREDTHS - places, 0)}f}" for x in box)


def as_written(language: Language, box: Sequence[float], size: tuple[int, int]) -> tuple[float, ...]:
    """Returns the shares that `written_box` writes. They differ from `box` in a format of whole pixels, which enclose the box."""
    if language.format.coordinates != Coordinates.PIXELS:
        return tuple(box)
    height, width = size
    edges = (round(x * side, 6) for x, side in zip(box, (width, height) * 2, strict=True))
    whole = [math.floor(x) if i < 2 else math.ceil(x) for i, x in enumerate(edges)]
    return tuple(x / side for x, side in zip(whole, (width, height) * 2, strict=True))
