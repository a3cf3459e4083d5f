"""Turns that look like a call and are none in the format that a rollout reads: a checkpoint that writes its calls otherwise
would count as one that never looks.

A turn looks like a call if it holds the opening mark of a known format, or a JSON object that begins with the name of a
function and what it is given. A turn that was cut short in the middle of a call is not one.
"""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Iterable

from pixel_jax.dialog.formats import FORMATS
from pixel_jax.dialog.grammar import END, Language, parse_turn
from pixel_jax.tools import CROP_IMAGE, RELEASED

OFTEN = 0.05  # share of the answers above which a warning says so
_NAME = r'"(?:name|function|tool)"\s*:\s*"[^"]*"'
_GIVEN = r'"(?:arguments|parameters|bbox_2d)"\s*:\s*[\[{]'
# Two members in either order. Of what the first one is given, only its end matters.
OBJECT = re.compile(rf"\{{\s*(?:{_NAME}\s*,\s*{_GIVEN}|{_GIVEN}[^{{}}]*[\]}}]\s*,\s*{_NAME})")


def unrecognised_turns(text: str, language: Language) -> list[str]:
    """The turns of a row that look like a call and are none in this language.

    Args:
      text: all that the policy wrote, special tokens written out.
    """
    *ended, rest = text.split(END.decode())
    turns = ended + ([rest] if any(known.closing in rest for known in FORMATS.values()) else [])
    return [turn for turn in turns if looks_like_call(turn) and parse_turn(turn, language).call is None]


def unrecognised_rate(texts: Iterable[str], language: Language) -> float:
    """Of what rows wrote: the share of those with an unrecognised call; 0 of none."""
    found = [bool(unrecognised_turns(text, language)) for text in texts]
    return sum(found) / max(len(found), 1)


def looks_like_call(turn: str) -> bool:
    """Whether a turn holds a mark that opens a call, of any format, or a JSON object with a name and arguments."""
    return any(known.opening in turn for known in FORMATS.values()) or OBJECT.search(turn) is not None


def fitting_formats(turns: Iterable[str]) -> dict[str, int]:
    """Of the known formats: how many of `turns` are calls in it, the one with the most first; without those of none."""
    counts = collections.Counter(
        name for turn in turns for name, language in _known().items() if parse_turn(turn, language).call is not None
    )
    return dict(counts.most_common())


@functools.cache
def _known() -> dict[str, Language]:
    nameless = {name for name, known in FORMATS.items() if any(x.name is None for x in known.spellings)}
    found = {name: Language((CROP_IMAGE,) if name in nameless else RELEASED, FORMATS[name]) for name in FORMATS}
    # Of two formats that read the same call, the one that reads more of it is meant: it comes first.
    return dict(sorted(found.items(), key=lambda item: -len(item[1].keys)))


def format_warning(texts: Iterable[str], language: Language) -> str | None:
    """What to tell about answers of which more than `OFTEN` hold unrecognised calls; None where fewer do."""
    found = [unrecognised_turns(text, language) for text in texts]
    odd = [turns for turns in found if turns]
    if len(odd) <= OFTEN * len(found):
        return None
    fits = fitting_formats(turn for turns in odd for turn in turns)
    said = f"{len(odd)} of {len(found)} answers hold calls that are none in the format {language.format.name!r}"
    if not fits:
        return f"{said}, nor in any other that is known; one is {odd[0][0][-200:]!r}"
    name, count = next(iter(fits.items()))
    return f"{said}: {count} of them are calls in {name!r}: set rollout.call_format to it"
