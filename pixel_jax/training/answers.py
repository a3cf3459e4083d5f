"""Do two answers say the same? The last \\boxed{} against one or several references (Pixel Reasoner's `rule_reward`, tidied).

Strings first, then numbers, then `math-verify` for what looks like mathematics: thousands of rows a step are scored
here, and sympy takes milliseconds where a comparison takes none. Beside the released rule there are three that it lacks:
choices by letter or by text, counts in words, and ANLS. `scorers.py` gives them their names.
"""

import ast
import re
import threading
from collections.abc import Mapping, Sequence
from fractions import Fraction

# What follows a word or a number is a hyphen, as in "3-4 dogs", not a sign.
NUMBER = re.compile(r"(?:(?<!\w)[-+])?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")
ANSWER = re.compile("<answer>(.*?)</answer>", re.IGNORECASE)
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
            except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two: nested thousands deep
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
    if "," in reference and not right:
        return same_spans(answer, [x.strip() for x in reference.split(",") if x.strip()])
    if not any(map(mathematical, (answer, reference))):
        return False
    return verify(answer, reference)


def same_spans(answer: str, spans: Sequence[str]) -> bool:
    """Whether `answer` names all `spans`, in any order, and nothing else: a list of all there could be is no answer. (To
    the released code, which asks for all of them as substrings, it is one.)"""
    for span in sorted(spans, key=len, reverse=True):
        found = re.search(rf"(?<!\w){re.escape(span)}(?!\w)", answer)
        if found is None:
            return False
        answer = f"{answer[: found.start()]},{answer[found.end() :]}"
    return set(re.findall(r"\w+", answer)) <= {"and"}


def mathematical(text: str) -> bool:
    """Whether there is anything for a computer algebra system to do: digits, operators or LaTeX, and no prose.

    Two or three letters beside an operator are a product of variables; others that follow each other are a word.
    """
    text = re.sub(r"(?<!\w)[a-z]{2,3}(?=\s*[-+*/^=])|(?<=[-+*/^=])\s*[a-z]{2,3}(?!\w)", "x", text)
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


def by_rule(response: str, references: Sequence[str]) -> float | None:
    """1 if `response` (all that the model wrote) answers right, 0 if wrong, None if it holds no answer at all.

    The last \\boxed{} counts, even when a right one comes before it; without a box, what is within the first <answer>.
    Without either the last number of the text is the answer (as math-verify takes it); without a number there is none.
    """
    found = last_boxed(response)
    if found is None and (tagged := ANSWER.search(response)):
        found = tagged[1]
    if found is None:
        numbers = NUMBER.findall(response)
        if not numbers:
            return None
        found = numbers[-1]
        references = [x for x in references if number_of(normalise(x))]
    return float(any(equal(found, reference) for reference in references))


def correctness(response: str, answer: str | Sequence[str], *, unparsable: float = 0.0) -> float:
    """`by_rule`, with `unparsable` where there is no answer: 0 here, -1 in the released code."""
    found = by_rule(response, references_of(answer))
    return float(unparsable) if found is None else found


IN_PARENTHESES = re.compile(r"\(([A-Z])\)[ \t]*([^\n]*?)[ \t]*(?=\([A-Z]\)|\n|$)")
ON_LINES = re.compile(r"^[ \t]*([A-Z])[.:)][ \t]*(\S[^\n]*)$", re.MULTILINE)


def choices_of(question: str) -> dict[str, str]:
    """The options of a multiple-choice question, normalised: {"a": "rubber", ...}; empty where there are not at least two.

    "(A) rubber" anywhere, or "A. rubber", "A: rubber", "A) rubber" on lines of their own; lettered from A on.
    """
    for options in (IN_PARENTHESES, ON_LINES):
        found = options.findall(question)
        letters = "".join(letter for letter, _ in found)
        if len(letters) > 1 and "ABCDEFGHIJKLMNOPQRSTUVWXYZ".startswith(letters):
            return {letter.lower(): normalise(text) for letter, text in found}
    return {}


def letter_of(answer: str, choices: Mapping[str, str]) -> str | None:
    """The choice that `answer` (the content of a box) names: by its letter, by letter and text, or by its text.

    None where it names none, or a letter with another choice's text.
    """
    answer = normalise(answer)
    by_text = [letter for letter, text in choices.items() if text == answer]
    if len(by_text) == 1:
        return by_text[0]
    found = re.fullmatch(r"\(?([a-z])\)?(?:\s*[.:)\-]\s*|\s+|$)(.*)", answer, re.DOTALL)
    if not found or (choices and found[1] not in choices):
        return None
    letter, text = found[1], found[2].strip()
    if not text or choices.get(letter) == text:
        return letter
    if re.match(r"[a-z]\s", answer) or text in choices.values():  # "a lion" is no choice of A; "A. tiger" is neither
        return None
    return letter


def same_choice(answer: str, reference: str, choices: Mapping[str, str]) -> bool:
    """Whether `answer` and `reference` name the same choice, each by letter, text or both."""
    wanted = letter_of(reference, choices)
    return wanted is not None and letter_of(answer, choices) == wanted


ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
WORDS = {word: value for value, word in enumerate(ONES.split())} | {"none": 0}
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
WORDS |= {word: 10 * value for value, word in enumerate(TENS.split(), 2)}
SCALES = {"hundred": 100, "thousand": 1000, "million": 1_000_000}
TOKEN = re.compile(rf"{NUMBER.pattern}|[a-z]+")


def numbers_in(text: str) -> list[Fraction]:
    """Every number of a text, in digits or in English words ("twenty-one", "two hundred and five"), in order."""
    found: list[Fraction] = []
    whole, part, room = 0, None, 100  # of a number in words: thousands, below them, and what may still be added below

    def close() -> None:
        nonlocal whole, part, room
        if part is not None:
            found.append(Fraction(whole + part))
        whole, part, room = 0, None, 100

    for token in TOKEN.findall(re.sub(r"(?<=[a-z])-(?=[a-z])", " ", text.lower())):
        if token in WORDS:
            value = WORDS[token]
            needs = 100 if value >= 10 or value == 0 else 10
            if room < needs:
                close()
            part = (part or 0) + value
            room = 10 if value >= 20 else 0
        elif token in SCALES and part:
            if token == "hundred":
                part, room = part * 100, 100
            else:
                whole, part, room = whole + part * SCALES[token], 0, 100
        elif token != "and" or part is None:
            close()
            if token[-1].isdigit():
                found.append(Fraction(token.replace(",", "")))
    close()
    return found


def same_number(answer: str, reference: str) -> bool:
    """Whether the only number of `answer`, in digits or words ("three", "3 dogs"), is the number that `reference` is."""
    wanted = numbers_in(normalise(reference))
    if len(wanted) != 1 or len(answer) > LONGEST_EXPRESSION:
        return False
    return numbers_in(normalise(answer)) == wanted


def anls(answer: str, references: Sequence[str], threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of one answer (DocVQA, InfographicVQA): in [0, 1].

    1 - distance / longer length, without case and extra spaces; below `threshold` it is 0; the best reference counts.
    """
    from rapidfuzz.distance import Levenshtein

    tidy = lambda text: " ".join(text.lower().split())
    best = max(Levenshtein.normalized_similarity(tidy(answer), tidy(reference)) for reference in references)
    return best if best >= threshold else 0.0
