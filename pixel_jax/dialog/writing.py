"""Calls written as a format has them: the inverse of the parser."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pixel_jax.dialog.formats import Coordinates, Spelled
from pixel_jax.dialog.grammar import Language
from pixel_jax.tools import tool as kinds

HUNDREDTHS = 2  # decimals of a share


class UnwritableError(ValueError):
    """A call that a format has no words for; the message names the format and the value."""


def write_call(
    language: Language, tool: str, values: Mapping[str, Any], *, size: tuple[int, int] = (1, 1), label: str = ""
) -> str:
    """The text of a call of `tool`.

    Args:
      values: of its arguments, by the tool's names: a box is shares of a picture in whole hundredths, a choice its text.
      size: (height, width) of the picture that boxes are of.
      label: what it is about, where the format has a place for that.

    Raises:
      UnwritableError: the format cannot write it.
    """
    names = [x.name for x in language.tools]
    if tool not in names:
        raise UnwritableError(f"{tool!r} is none of the tools {', '.join(names)}")
    spelling = language.spellings[names.index(tool)]
    pairs = [pair for x in spelling.arguments if (pair := _member(language, x, values[x.argument], size))]
    members = dict(pairs)
    if spelling.label is not None and label:
        members[spelling.label] = _string(label)
    arguments = "{" + ", ".join(f"{_string(key)}: {text}" for key, text in members.items()) + "}"
    opening, closing = language.format.opening, language.format.closing
    if spelling.name is None:
        return f"{opening}{arguments}{closing}"
    return f'{opening}\n{{"name": {_string(spelling.name)}, "arguments": {arguments}}}\n{closing}'


def _member(language: Language, spelled: Spelled, value: Any, size: tuple[int, int]) -> tuple[str, str] | None:
    """Key and text of an argument; None where a call does not write it."""
    argument, known = spelled.written, language.format.name
    if argument is None:
        if value != spelled.value:
            raise UnwritableError(f"{spelled.argument} is always {spelled.value} in the format {known!r}, not {value}")
        return None
    if isinstance(argument, kinds.Box):
        return argument.name, f"[{written_box(language, value, size)}]"
    if isinstance(argument, kinds.Choice):
        place = value - spelled.add if isinstance(value, int) else argument.options.index(value)
        if not 0 <= place < len(argument.options):
            raise UnwritableError(f"{spelled.argument} {value} has no name in the format {known!r}")
        return argument.name, _string(argument.options[place])
    if isinstance(argument, kinds.Integers):
        return argument.name, json.dumps(list(value))
    return argument.name, _string(value) if isinstance(value, str) else json.dumps(value - spelled.add)


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("<", "\\u003c")  # which no call has


def written_box(language: Language, box: Sequence[float], size: tuple[int, int]) -> str:
    """The four numbers of a box in hundredths: shares to two decimals, moved as the format says, or whole pixels."""
    if language.format.coordinates == Coordinates.PIXELS:
        pairs = zip(as_written(language, box, size), size[::-1] * 2, strict=True)
        return ", ".join(str(round(side * share)) for share, side in pairs)
    places = -language.format.places
    return ", ".join(f"{x * 10**places:.{max(HUNDREDTHS - places, 0)}f}" for x in box)


def as_written(language: Language, box: Sequence[float], size: tuple[int, int]) -> tuple[float, ...]:
    """The shares that `written_box` says: in whole pixels, which hold the box, they are others than in hundredths."""
    if language.format.coordinates != Coordinates.PIXELS:
        return tuple(box)
    height, width = size
    edges = (round(x * side, 6) for x, side in zip(box, (width, height) * 2, strict=True))
    whole = [math.floor(x) if i < 2 else math.ceil(x) for i, x in enumerate(edges)]
    return tuple(x / side for x, side in zip(whole, (width, height) * 2, strict=True))
