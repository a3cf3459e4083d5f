"""Finds turns that look like a call but are none in the format of the rollout.

Without this, a checkpoint that writes its calls in another format would count as one that never calls a tool. A turn looks like a
call if it contains the opening mark of a known format, or a JSON object that begins with the name of a function and its
arguments. A turn that was cut short in the middle of a call does not count.
"""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Iterable

from pixel_jax.dialog.formats import FORMATS
from pixel_jax.dialog.grammar import END, Language, parse_turn
from pixel_jax.tools import CROP_IMAGE, RELEASED

WARNING_RATE = 0.05  # share of the answers with unrecognised calls above which there is a warning
_NAME = r'"(?:name|function|tool)"\s*:\s*"[^"]*"'
_GIVEN = r'"(?:arguments|parameters|bbox_2d)"\s*:\s*[\[{]'
# Two members in either order. If the arguments come first, only their end is matched.
OBJECT = re.compile(rf"\{{\s*(?:{_NAME}\s*,\s*{_GIVEN}|{_GIVEN}[^{{}}]*[\]}}]\s*,\s*{_NAME})")


def unrecognised_turns(text: str, language: Language) -> list[str]:
    """Returns the turns of a row that look like a call but are none in this language.

    Args:
      text: all text of the policy, special tokens written out.
      language: the language of the rollout.
    """
    *ended, rest = text.split(END.decode())
    turns = ended + ([rest] if any(known.closing in rest for known in FORMATS.values()) else [])
    return [turn for turn in turns if looks_like_call(turn) and parse_turn(turn, language).call is None]


def unrecognised_rate(texts: Iterable[str], language: Language) -> float:
    """Returns the share of rows with an unrecognised call; 0 without rows."""
    unrecognised = [bool(unrecognised_turns(text, language)) for text in texts]
    return sum(unrecognised) / max(len(unrecognised), 1)


def looks_like_call(turn: str) -> bool:
    """Whether a turn contains the opening mark of any format, or a JSON object with a name and arguments."""
    return any(known.opening in turn for known in FORMATS.values()) or OBJECT.search(turn) is not None


def fitting_formats(turns: Iterable[str]) -> dict[str, int]:
    """Counts by known format how many of `turns` are calls in it, the most frequent first; formats without any are left out."""
    counts = collections.Counter(
        name for turn in turns for name, language in _known().items() if parse_turn(turn, language).call is not None
    )
    return dict(counts.most_common())


@functools.cache
def _known() -> dict[str, Language]:
    nameless = {name for name, known in FORMATS.items() if any(x.name is None for x in known.spellings)}
    languages = {name: Language((CROP_IMAGE,) if name in nameless else RELEASED, FORMATS[name]) for name in FORMATS}
    # If two formats can read the same call, the one that reads more of its keys comes first.
    return dict(sorted(languages.items(), key=lambda item: -len(item[1].keys)))


def format_warning(texts: Iterable[str], language: Language) -> str | None:
    """Returns a warning if more than `WARNING_RATE` of the answers have unrecognised calls, else None."""
    by_text = [unrecognised_turns(text, language) for text in texts]
    unrecognised = [turns for turns in by_text if turns]
    if len(unrecognised) <= WARNING_RATE * len(by_text):
        return None
    fits = fitting_formats(turn for turns in unrecognised for turn in turns)
    warning = (
        f"{len(unrecognised)} of {len(by_text)} answers hold calls that are none in the format {language.format.name!r}"
    )
    if not fits:
        return f"{warning}, nor in any other that is known; one is {unrecognised[0][0][-200:]!r}"
    name, count = next(iter(fits.items()))
    return f"{warning}: {count} of them are calls in {name!r}: set rollout.call_format to it"
