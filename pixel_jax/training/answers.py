"""Finds the answer that a response gives, and compares answers (Pixel Reasoner's `rule_reward` without its faults).

Answers are compared as a person would; the released scorer is another rule (`released_scorer.py`). Strings are compared first,
then numbers, and formulas last (`algebra.py`), because thousands of rows are scored in a step, and sympy takes milliseconds for
each. Counts in words and ANLS are here, too; `choices.py` has multiple choice, and `scorers.py` names the rules.
"""

import ast
import math
import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

from pixel_jax.training import algebra

# A minus directly after a word or a number is a hyphen, as in "3-4 dogs", and not a sign.
NUMBER = re.compile(r"(?:(?<!\w)[-+])?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")
WRITTEN = re.compile(rf"{NUMBER.pattern}(?:[/:]\d+)*")  # a fraction, a time, a score or a date is one match
FRACTION = re.compile(r"([-+]?)(?:(\d{1,9})\s+)?(\d{1,20})\s*/\s*(\d{1,20})")
TAG = re.compile("<(/?)answer>", re.IGNORECASE)
THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)", re.IGNORECASE | re.DOTALL)
BOX = re.compile(r"\\boxed\s*\{")
BRACE = re.compile(r"(?<!\\)[{}]")
FULL_WIDTH = {0xFF01 + i: chr(0x21 + i) for i in range(94)}  # as typed in Chinese and Japanese
QUOTES = ("**", "__", "*", "`", '"', "'", "“”", "‘’", "«»", "「」", "『』", "[]")
LONGEST_NUMBER = 200  # characters of an answer in which a count is looked for


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete `\boxed{...}`, with braces nested to any depth; None if there is none."""
    closing, open_braces = {}, []
    for brace in BRACE.finditer(text):  # one pass, so that a response full of boxes costs no more than another
        if brace.group() == "{":
            open_braces.append(brace.start())
        elif open_braces:
            closing[open_braces.pop()] = brace.start()
    content = None
    for box in BOX.finditer(text):
        opening = box.end() - 1
        if opening in closing:
            content = text[opening + 1 : closing[opening]]
    return content


def references_of(answer: str | Sequence[str]) -> list[str]:
    r"""Reads the references of a data row: strings, each possibly within \boxed{} and possibly a list literal of several."""
    references = []
    for item in [answer] if isinstance(answer, str) else answer:
        boxed = last_boxed(item)
        item = item if boxed is None else boxed
        if re.match(r"\s*\[\s*['\"]", item):
            try:
                references.extend(str(x) for x in ast.literal_eval(item.strip()))
                continue
            except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two: nested thousands deep
                pass
        references.append(item)
    if not references:
        raise ValueError("a question without a reference answer cannot be scored")
    return references


def without_thoughts(response: str) -> str:
    """Removes thoughts within <think> from a response; the opening tag may be in the prompt, and the closing one missing."""
    return re.split("</think>", THOUGHTS.sub("", response), flags=re.IGNORECASE)[-1]


def given_answer(response: str) -> str | None:
    r"""What a response gives as its answer: the last complete \boxed{}, else the content of the last <answer>, else None.

    Text within <think> is no answer, unless there is none outside.
    """
    for text in dict.fromkeys((without_thoughts(response), response)):
        if (boxed := last_boxed(text)) is not None:
            return boxed
        if (tagged := last_tagged(text)) is not None:
            return tagged
    return None


def last_tagged(text: str) -> str | None:
    """The content of the last complete <answer>...</answer>, on however many lines; None when there is none."""
    opened, content = None, None
    for tag in TAG.finditer(text):
        if not tag[1]:
            opened = tag.end()
        elif opened is not None:
            content, opened = text[opened : tag.start()], None
    return content


def tidy(text: str) -> str:
    """Removes LaTeX, quotes, emphasis, units and brackets that do not change the meaning of an answer."""
    text = unicodedata.normalize("NFC", text).translate(FULL_WIDTH).strip()
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\(?:text|mathrm|mathbf|mathit|mathsf|textbf|textit|textrm|boldsymbol)\s*\{([^{}]*)\}", r"\1", text)
    text = text.replace("\\%", "%").replace("\\$", "").replace("$", "").replace("{,}", ",")
    text = re.sub(r"\\[()\[\]]|\\[,;!]", "", text)
    text = re.sub(r"\\ |\\q?quad(?![a-z])|~(?!\s*[\d.])", " ", text)
    text = re.sub(r"\b(?:minutes?|cm)\b", "", text, flags=re.IGNORECASE)
    text = re.sub(r"\s+", " ", text).strip().rstrip(".。").rstrip()
    for marks in QUOTES:
        left, right = marks if len(marks) == 2 and marks[0] != marks[1] else (marks, marks)
        inside = text[len(left) : len(text) - len(right)]
        if inside and text.startswith(left) and text.endswith(right) and left not in inside and right not in inside:
            return tidy(inside)
    return text


def normalise(text: str) -> str:
    """Returns `text` tidied and in lower case; "(A)" becomes "a"."""
    text = unicodedata.normalize("NFC", tidy(text).lower())
    single = re.fullmatch(r"\(\s*([a-z0-9])\s*\)", text)
    return single.group(1) if single else text


def number_of(text: str) -> tuple[Fraction, bool] | None:
    """Reads a plain number or fraction (also "1 1/2"), and whether it is a percentage; None for any other text.

    A fraction must be in lowest terms, because 24/12 may be a date or a score.
    """
    if parts := FRACTION.fullmatch(text):
        whole, above, below = (int(x or 0) for x in parts.groups()[1:])
        if below < 2 or math.gcd(above, below) > 1:
            return None
        value = whole + Fraction(above, below)
        return (-value if parts[1] == "-" else value), False
    body = text.removesuffix("%").strip()
    if not NUMBER.fullmatch(body) or len(body) > 40:
        return None
    return Fraction(body.replace(",", "")), text.endswith("%")


def equal(answer: str, reference: str) -> bool:
    """Whether two answers (contents of a box) mean the same. Case is ignored; 35 %, 35 and 0.35 all equal "35%"."""
    written = (tidy(answer), tidy(reference))
    answer, reference = normalise(answer), normalise(reference)
    if answer == reference:
        return True
    if not answer or not reference:
        return False
    left, right = number_of(answer), number_of(reference)
    if left and right:
        (a, a_percent), (b, b_percent) = left, right
        return a == b or (a_percent != b_percent and (a / 100 if a_percent else a) == (b / 100 if b_percent else b))
    if "," in reference and not right:
        return same_spans(answer, [x.strip() for x in reference.split(",") if x.strip()])
    readable = all(number or algebra.is_expression(x) for number, x in zip((left, right), written, strict=True))
    return readable and any(map(algebra.is_formula, written)) and algebra.same_value(answer, reference)


def same_spans(answer: str, spans: Sequence[str]) -> bool:
    """Whether `answer` lists all `spans`, in any order, and nothing else.

    A list of everything that could be right is therefore wrong, and so is "1/2" for "1, 2". (The released code, which looks for
    the spans as substrings, accepts both.)
    """
    if bracketed := re.fullmatch(r"\(([^()]*)\)|\\?\{([^{}]*?)\\?\}", answer):
        answer = bracketed[1] or bracketed[2] or ""
    for span in sorted(spans, key=len, reverse=True):
        match = re.search(rf"(?<!\w){re.escape(span)}(?!\w)", answer)
        if match is None:
            return False
        answer = f"{answer[: match.start()]},{answer[match.end() :]}"
    return re.fullmatch(r"(?:[\s,;\"']|\band\b|&)*", answer) is not None


def by_rule(response: str, references: Sequence[str]) -> float | None:
    """Scores a response (all that the model wrote): 1 if its answer is right, 0 if it is wrong, None if it has no answer.

    The answer is that of `given_answer`, or else the last number outside of <think>, as math-verify takes it. Without a number,
    or if an <answer> was cut off, there is no answer.
    """
    answer = given_answer(response)
    if answer is None:
        spoken = without_thoughts(response)
        numbers = [] if TAG.search(spoken) else WRITTEN.findall(spoken)
        if not numbers:
            return None
        answer = numbers[-1]
        references = [x for x in references if number_of(normalise(x))]
    return float(any(equal(answer, reference) for reference in references))


ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
WORDS = {word: value for value, word in enumerate(ONES.split())} | {"none": 0}
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
WORDS |= {word: 10 * value for value, word in enumerate(TENS.split(), 2)}
SCALES = {"hundred": 100, "thousand": 1000, "million": 1_000_000}
NO = re.compile(
    r"\bno\b(?=\s*$|\s+(?!one\b|more\b|fewer\b|less\b)[a-z])"
)  # "no dogs", not "no, 3" nor "no more than 3"
TOKEN = re.compile(rf"{NUMBER.pattern}|[a-z]+")


def numbers_in(text: str) -> list[Fraction]:
    """Finds all numbers of a text, in digits or in English words ("twenty-one", "two hundred and five"), in order."""
    numbers: list[Fraction] = []
    # A number in words so far: its thousands, the part below them, and the limit below which a further word may be added.
    thousands, below, limit = 0, None, 100

    def close() -> None:
        nonlocal thousands, below, limit
        if below is not None:
            numbers.append(Fraction(thousands + below))
        thousands, below, limit = 0, None, 100

    text = re.sub(r"(?<=[a-z])-(?=[a-z])", " ", text.lower())
    for token in TOKEN.findall(NO.sub("zero", text)):
        if token in WORDS:
            value = WORDS[token]
            needs = 100 if value >= 10 or value == 0 else 10
            if limit < needs:
                close()
            below = (below or 0) + value
            limit = 10 if value >= 20 else 0
        elif token in SCALES and below:
            if token == "hundred":
                below, limit = below * 100, 100
            else:
                thousands, below, limit = thousands + below * SCALES[token], 0, 100
        elif token != "and" or below is None:
            close()
            if token[-1].isdigit():
                numbers.append(Fraction(token.replace(",", "")))
    close()
    return numbers


def same_number(answer: str, reference: str) -> bool:
    """Whether `answer` has a single number, in digits or words ("three", "3 dogs"), and it equals that of `reference`."""
    wanted = numbers_in(normalise(reference))
    if len(wanted) != 1 or len(answer) > LONGEST_NUMBER:
        return False
    return numbers_in(normalise(answer)) == wanted


def anls(answer: str, references: Sequence[str], threshold: float = 0.5) -> float:
    """The normalised Levenshtein similarity of an answer with the nearest reference (ANLS of DocVQA, InfographicVQA), in [0, 1].

    It is 1 - distance / length of the longer text, ignoring case and extra spaces, and 0 below `threshold`.
    """
    from rapidfuzz.distance import Levenshtein

    def plain(text: str) -> str:
        return " ".join(text.lower().split())

    best = max(Levenshtein.normalized_similarity(plain(answer), plain(reference)) for reference in references)
    return best if best >= threshold else 0.0
