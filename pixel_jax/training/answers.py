"""Is the answer right? The last \\boxed{} against one or several references (Pixel Reasoner's `rule_reward`, tidied).

Strings first, then numbers, then `math-verify` for what looks like mathematics: thousands of rows a step are scored
here, and sympy takes milliseconds where a comparison takes none.
"""

import ast
import re
import threading
from collections.abc import Sequence
from fractions import Fraction

NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")
BOX = re.compile(r"\\boxed\s*\{")
BRACE = re.compile(r"(?<!\\)[{}]")
LONGEST_EXPRESSION = 200  # characters given to math-verify: answers, not essays


def last_boxed(text: str) -> str | None:
    """The content of the last complete `\\boxed{...}`, braces nested to any depth; None when there is none."""
    closing, open_braces = {}, []
    for brace in BRACE.finditer(text):  # one pass, so that a response of nothing but boxes costs no more than another
        if brace.group() == "{":
            open_braces.append(brace.start())
        elif open_braces:
            closing[open_braces.pop()] = brace.start()
    found = None
    for box in BOX.finditer(text):
        opening = box.end() - 1
        if opening in closing:
            found = text[opening + 1 : closing[opening]]
    return found


def references_of(answer: str | Sequence[str]) -> list[str]:
    """The references a data row accepts: strings, each possibly inside \\boxed{} and possibly a list literal of several."""
    found = []
    for item in [answer] if isinstance(answer, str) else answer:
        boxed = last_boxed(item)
        item = item if boxed is None else boxed
        if re.match(r"\s*\[\s*['\"]", item):
            try:
                found.extend(str(x) for x in ast.literal_eval(item.strip()))
                continue
            except (ValueError, SyntaxError):
                pass
        found.append(item)
    if not found:
        raise ValueError("a question without a reference answer cannot be scored")
    return found


def normalise(text: str) -> str:
    """Lower case, without the LaTeX, units and brackets that do not change what an answer says."""
    text = text.strip().lower()
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", text)
    text = text.replace("\\%", "%").replace("\\$", "").replace("$", "").replace("\\ ", " ")
    text = re.sub(r"\b(?:minutes?|cm)\b", "", text)
    text = re.sub(r"\s+", " ", text).strip().rstrip(".")
    single = re.fullmatch(r"\(\s*([a-z0-9])\s*\)", text)
    return single.group(1) if single else text


def number_of(text: str) -> tuple[Fraction, bool] | None:
    """A plain number and whether it is a percentage; None for anything else."""
    body = text.removesuffix("%").strip()
    if not NUMBER.fullmatch(body) or len(body) > 40:
        return None
    return Fraction(body.replace(",", "")), text.endswith("%")


def equal(answer: str, reference: str) -> bool:
    """Whether two answers (contents of a box) say the same. Case does not matter; 35 %, 35 and 0.35 answer "35%"."""
    answer, reference = normalise(answer), normalise(reference)
    if answer == reference:
        return True
    if not answer or not reference:
        return False
    left, right = number_of(answer), number_of(reference)
    if left and right:
        (a, a_percent), (b, b_percent) = left, right
        return a == b or (a_percent != b_percent and (a / 100 if a_percent else a) == (b / 100 if b_percent else b))
    if "," in reference and not right:  # several spans: all of them, in any order
        return sorted(x.strip() for x in answer.split(",")) == sorted(x.strip() for x in reference.split(","))
    if not any(map(mathematical, (answer, reference))):
        return False
    return verify(answer, reference)


def mathematical(text: str) -> bool:
    """Whether there is anything for a computer algebra system to do: digits, operators or LaTeX, and no prose."""
    words = re.findall(r"(?<!\\)\b[a-z]{2,}", text)
    return bool(re.search(r"[\d\\^=+*/]", text)) and not words


def verify(answer: str, reference: str) -> bool:
    """math-verify's verdict. Its time limit is a signal, which only the main thread may set: in any other thread
    expressions that can grow without bound (powers, factorials) are wrong rather than evaluated without a limit."""
    if max(len(answer), len(reference)) > LONGEST_EXPRESSION:
        return False
    from math_verify import parse, verify

    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    if seconds is None and re.search(r"\^|\*\*|!", answer + reference):
        return False
    gold, found = (parse(f"${x}$", parsing_timeout=seconds) for x in (reference, answer))
    return bool(gold and found and verify(gold, found, timeout_seconds=seconds))


def correctness(response: str, answer: str | Sequence[str], *, unparsable: float = 0.0) -> float:
    """1 if `response` (all that the model wrote) answers right, 0 if wrong, `unparsable` if it holds no answer at all.

    The last \\boxed{} counts, even when a right one comes before it. Without a box the last number of the text is the
    answer (as math-verify takes it); without a number there is none: 0 here, -1 in the released code.
    """
    references = references_of(answer)
    found = last_boxed(response)
    if found is None:
        numbers = NUMBER.findall(response)
        if not numbers:
            return float(unparsable)
        found = numbers[-1]
        references = [x for x in references if number_of(normalise(x))]
    return float(any(equal(found, reference) for reference in references))
