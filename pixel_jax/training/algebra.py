"""Compares the values of two formulas by math-verify (sympy), within limits.

Answers are written by a policy that is rewarded for them, so they are checked first: only a formula is handed on (not a range, a
date, a score or prose), and only if evaluating it is cheap. A time limit and a budget of seconds stop what these checks miss.
"""

import contextlib
import contextvars
import functools
import logging as python_logging
import math
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

from absl import logging

# math-verify logs the whole of every text that it gives up, so that a policy could fill a disk. `charged` logs one line instead.
python_logging.getLogger("math_verify").setLevel(python_logging.ERROR)

LONGEST = 200  # characters of a formula
SECONDS = 5  # the time limit of one parse or comparison in the main thread, where a signal enforces it
LARGEST_POWER = 1000  # product of all exponents of a formula of numbers: its value has some thousand digits at most
LARGEST_EXPANSION = 12  # product of all exponents of a formula with variables, whose sums are multiplied out

COMMANDS = frozenset(
    "frac dfrac tfrac sqrt pi cdot times div left right text mathrm mathbf circ degree pm sin cos tan log ln "
    "alpha beta gamma delta theta lambda mu sigma phi omega".split()
)
TOKEN = re.compile(r"\\[a-z]+|\d+(?:\.\d+)?|\.\d+|[a-z]+|[-+*/^=(){}\[\]]|\s+", re.IGNORECASE)
NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d+)?|\.\d+|\d+/\d+)")
WRITTEN_FORM = re.compile(r"[\d\s.,:/()-]*")  # 3-9, 24/12, 2:1, 2010-2012, (555) 123-4567: never evaluated
# Factorials, numbers of many digits, and commands whose cost grows with the values of their arguments.
UNBOUNDED = re.compile(r"[\w)}\]]\s*!|\d{41}|\\(?:[dt]?binom|sum|prod|i*nt|lim|exp)(?![a-z])", re.IGNORECASE)
_POWER = r"[-+]?\s*(?:\d{1,4}(?![\d.])|[a-z]|\\circ|\\degree)"
# An exponent that is a number or a letter, and has no exponent itself.
EXPONENT = re.compile(rf"(?:\^|\*\*)\s*(?:\{{\s*{_POWER}\s*\}}|{_POWER})(?!\s*(?:\^|\*\*))", re.IGNORECASE)


def is_expression(text: str) -> bool:
    """Whether `text` is a number, a product of variables, or a formula.

    A formula is LaTeX and operators with their operands. Words, codes, ranges, dates and scores are not expressions.
    """
    if len(text) > LONGEST or re.search(r"\d\s+\.?\d", text):
        return False
    if WRITTEN_FORM.fullmatch(text):
        return NUMBER.fullmatch(text) is not None
    if re.match(r"\s*[*/^=]", text) or re.search(r"[-+*/^=]\s*$", text):  # "10+", "C++"
        return False
    tokens = TOKEN.findall(text)
    if sum(map(len, tokens)) != len(text):
        return False
    if any(x.startswith("\\") and x[1:].lower() not in COMMANDS for x in tokens):
        return False
    # Letters in a row are a product of variables where a number and an operator are near ("xy + 1", "0.5ab"), else they are a
    # word ("left-right") or a code ("AB-12").
    words = [x for x in tokens if x.isalpha() and len(x) > 1]
    return not words or (any(x[0].isdigit() for x in tokens) and all(_product(x, text) for x in words))


def _product(word: str, text: str) -> bool:
    beside = rf"(?:[-+*/^=]\s*|(?<=\d)){word}(?![A-Za-z])|(?<![A-Za-z\\]){word}\s*[-+*/^=]"
    return len(word) <= 3 and word.islower() and re.search(beside, text) is not None


def is_formula(text: str) -> bool:
    """Whether `text` is an expression that has to be evaluated."""
    return is_expression(text) and not NUMBER.fullmatch(text) and re.search(r"[-+*/^=\\]", text) is not None


def is_small(text: str) -> bool:
    """Whether evaluating `text` is certainly cheap: every exponent is a number or a letter, and their product is small."""
    if UNBOUNDED.search(text):
        return False
    exponents = list(EXPONENT.finditer(text))
    if len(exponents) != len(re.findall(r"\^|\*\*", text)):  # an exponent is a power, a sum or a fraction
        return False
    product = math.prod(max(int(x), 1) for x in re.findall(r"\d+", " ".join(found[0] for found in exponents)))
    variables = re.search(r"(?<![\\a-z])[a-z]", re.sub(r"\\[a-z]+", " ", text, flags=re.IGNORECASE), re.IGNORECASE)
    return product <= (LARGEST_EXPANSION if variables else LARGEST_POWER)


_left: contextvars.ContextVar[list[float] | None] = contextvars.ContextVar("seconds_left", default=None)


@contextlib.contextmanager
def budget(seconds: float) -> Iterator[None]:
    """Limits the total time of all comparisons in the context to about `seconds`.

    When it is spent, formulas count as different, which is logged. CPU time of the thread is measured, so that a busy machine
    does not change verdicts.
    """
    token = _left.set([seconds])
    try:
        yield
    finally:
        _left.reset(token)


@contextlib.contextmanager
def charged() -> Iterator[bool]:
    """Charges the time spent in the context to the budget. Yields whether any time is left."""
    left = _left.get() or [math.inf]
    if left[0] <= 0:
        yield False
        return
    began = time.thread_time()
    try:
        yield True
    finally:
        took = time.thread_time() - began
        left[0] -= took
        if took > 0.8 * SECONDS:
            logging.warning("an answer was given up after %.1f s, as too large a formula: it counts as different", took)
        if left[0] <= 0:
            logging.warning("the time for formulas is spent: those that are left count as different")


def time_limit() -> int | None:
    """The time limit of math-verify. It is a signal, which only the main thread may set; None in other threads."""
    return SECONDS if threading.current_thread() is threading.main_thread() else None


def same_value(answer: str, reference: str) -> bool:
    """Whether two formulas, or a formula and a number, have the same value. False if one is not a formula, or too large."""
    import math_verify  # noqa: F401, a missing package is an error at once

    if not (is_small(answer) and is_small(reference)):
        return False
    with charged() as allowed:
        return allowed and _verified(answer, reference)


def parsed(text: str) -> list[Any]:
    """Parses the formulas of a text by math-verify, within the time limit."""
    from math_verify import parse

    # None means no limit, which the stubs do not know.
    return parse(text, parsing_timeout=time_limit())  # pyright: ignore[reportArgumentType]


@functools.lru_cache(maxsize=4096)
def _verified(answer: str, reference: str) -> bool:
    from math_verify import verify

    gold, found = parsed(f"${reference}$"), parsed(f"${answer}$")
    return bool(gold and found and verify(gold, found, timeout_seconds=time_limit())) and not _differ(gold[0], found[0])


def _differ(a, b) -> bool:
    """Whether two numbers differ by more than rounding. math-verify rounds to six decimals, so that 1/2^98 equals 1/2^99."""
    import sympy

    if not all(isinstance(x, sympy.Expr) and x.is_number for x in (a, b)):
        return False
    a, b = (complex(sympy.N(x)) for x in (a, b))
    return abs(a - b) > 1e-5 * max(abs(a), abs(b))
