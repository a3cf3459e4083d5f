"""Multiple choice: finds the options of a question, and the option that an answer names."""

import re
from collections.abc import Mapping

from pixel_jax.training.answers import normalise, tidy

IN_PARENTHESES = re.compile(r"\(([A-Z])\)[ \t]*([^\n]*?)[ \t]*(?=\([A-Z]\)|\n|$)")
ON_LINES = re.compile(r"^[ \t]*([A-Z])[.:)][ \t]*(\S[^\n]*)$", re.MULTILINE)
PLACEHOLDER = re.compile(r"(?:<[^<>]*>\s*)*")  # where an option is a picture
LONGEST = 300  # characters of an answer that can name a choice otherwise than by its text

# "The correct answer is", "Answer:", "option", in English and Chinese; what may stand before a choice and says nothing else.
LEAD = re.compile(
    r"\s*(?:(?:so|thus|therefore|hence)\b[,\s]*)?"
    r"(?:(?:the\s+|my\s+)?(?:(?:correct|right|best|final)\s+)?(?:answer|option|choice)\b(?:\s+is\b)?\s*[:=]?"
    r"|(?:正确)?(?:答案|选项|选择|选)\s*(?:是|为|选)?\s*[::=]?)\s*",
    re.IGNORECASE,
)
CHOICE = re.compile(r"[(\[{]?\s*([A-Za-z])\s*[)\]}]?(?:\s*[.:),;、,。\-–—]\s*|\s+|$)(.*)", re.DOTALL)
CLAIMED = re.compile(r"(?:is|would be)\s+(?:the\s+)?(?:correct|right|best|answer)\b.*", re.IGNORECASE | re.DOTALL)


def choices_of(question: str) -> dict[str, str]:
    """The options of a multiple-choice question, normalised: {"a": "rubber", ...}; empty where there are not at least two.

    "(A) rubber" anywhere, or "A. rubber", "A: rubber", "A) rubber" on lines of their own; lettered from A on.
    """
    for options in (IN_PARENTHESES, ON_LINES):
        options_found = options.findall(question)
        letters = "".join(letter for letter, _ in options_found)
        if len(letters) > 1 and "ABCDEFGHIJKLMNOPQRSTUVWXYZ".startswith(letters):
            return {letter.lower(): normalise(text) for letter, text in options_found}
    return {}


def letter_of(answer: str, choices: Mapping[str, str]) -> str | None:
    """The choice that `answer` (what a response gives as its answer) names: by its letter, by letter and text, or by its text.

    Brackets, emphasis and words like "The answer is option" around it do not matter. Of options with the same text the
    first one is meant. None where it names no choice, more than one, or a letter with another choice's text.
    """
    options = reversed(list(choices.items()))
    by_text = {text: letter for letter, text in options if not PLACEHOLDER.fullmatch(text)}
    for text in dict.fromkeys((answer, *_without_lead(answer))):
        if (letter := by_text.get(normalise(text))) is not None:
            return letter
        if (letter := _by_letter(text, choices)) is not None:
            return letter
    return None


def _without_lead(answer: str) -> list[str]:
    """`answer` without what may stand before a choice, if it begins with that."""
    if len(answer) > LONGEST:
        return []
    text = re.sub(r"[*_`]+", "", tidy(answer))
    while (lead := LEAD.match(text)) and lead.end() and (rest := text[lead.end() :].strip()):
        text = rest
    return [text]


def _by_letter(text: str, choices: Mapping[str, str]) -> str | None:
    match = CHOICE.fullmatch(tidy(text)) if len(text) <= LONGEST else None
    if not match or (choices and match[1].lower() not in choices):
        return None
    letter, rest = match[1].lower(), match[2].strip()
    said = normalise(rest)
    if not said or CLAIMED.fullmatch(said) or choices.get(letter) == said:
        return letter
    if (
        re.match(r"[A-Za-z]\s", tidy(text)) or said in choices.values()
    ):  # "a lion" is no choice of A; "A. tiger" is neither
        return None
    other = [
        x for x in re.findall(r"(?<![\w'’])(?:[B-HJ-Z]|[A-Z](?=[).:,]|\s*$))(?![\w'’])", rest) if x.lower() != letter
    ]
    if re.fullmatch(r"[a-z]", said) or any(not choices or x.lower() in choices for x in other):  # "A, B": undecided
        return None
    return letter


def same_choice(answer: str, reference: str, choices: Mapping[str, str]) -> bool:
    """Whether `answer` and `reference` name the same choice, each by letter, text or both; options of one text are one."""
    wanted, given = letter_of(reference, choices), letter_of(answer, choices)
    if wanted is None or given is None:
        return False
    if wanted == given:
        return True
    text = choices.get(wanted, "")
    return text == choices.get(given) and not PLACEHOLDER.fullmatch(text)


def stated_choice(response: str, choices: Mapping[str, str]) -> str | None:
    """What a response without a box gives as its choice: all of it if it names one, or a last sentence "the answer is ..."."""
    response = response.strip()
    if letter_of(response, choices) is not None:
        return response
    last = re.split(r"\n|(?<=\w[.!?。])\s", response)[-1].strip()
    start = re.search(r"\b(?:answer|option|choice)\s+is\b|答案", last, re.IGNORECASE)
    if start and letter_of(last[start.start() :], choices) is not None:
        return last[start.start() :]
    return None
