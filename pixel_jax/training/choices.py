"""Multiple choice: finds the options of a question, and the option that an answer names."""

import re
from collections.abc import Mapping

from pixel_jax.training.answers import normalise, tidy

IN_PARENTHESES = re.compile(r"\(([A-Z])\)[ \t]*([^\n]*?)[ \t]*(?=\([A-Z]\)|\n|$)")
ON_LINES = re.compile(r"^[ \t]*([A-Z])[.:)][ \t]*(\S[^\n]*)$", re.MULTILINE)
PLACEHOLDER = re.compile(r"(?:<[^<>]*>\s*)*")  # where an option is a picture
LONGEST = 300  # characters of an answer that may name a choice by its letter

# Words before a choice that carry no meaning: "The correct answer is", "Answer:", "option", in English and Chinese.
LEAD = re.compile(
    r"\s*(?:(?:so|thus|therefore|hence)\b[,\s]*)?"
    r"(?:(?:the\s+|my\s+)?(?:(?:correct|right|best|final)\s+)?(?:answer|option|choice)\b(?:\s+is\b)?\s*[:=]?"
    r"|(?:正确)?(?:答案|选项|选择|选)\s*(?:是|为|选)?\s*[::=]?)\s*",
    re.IGNORECASE,
)
CHOICE = re.compile(r"[(\[{]?\s*([A-Za-z])\s*[)\]}]?(?:\s*[.:),;、,。\-–—]\s*|\s+|$)(.*)", re.DOTALL)
CLAIMED = re.compile(r"(?:is|would be)\s+(?:the\s+)?(?:correct|right|best|answer)\b.*", re.IGNORECASE | re.DOTALL)


def choices_of(question: str) -> dict[str, str]:
    """Reads the options of a multiple-choice question, normalised: {"a": "rubber", ...}; empty unless there are two.

    They are "(A) rubber" anywhere, or lines "A. rubber", "A: rubber" or "A) rubber", with letters from A on.
    """
    for options in (IN_PARENTHESES, ON_LINES):
        options_found = options.findall(question)
        letters = "".join(letter for letter, _ in options_found)
        if len(letters) > 1 and "ABCDEFGHIJKLMNOPQRSTUVWXYZ".startswith(letters):
            return {letter.lower(): normalise(text) for letter, text in options_found}
    return {}


def letter_of(answer: str, choices: Mapping[str, str]) -> str | None:
    """The letter of the choice that an answer names by letter, by letter and text, or by text.

    Brackets, emphasis and words like "The answer is option" around it are ignored. Of options with the same text the first is
    meant. None if it names no choice, several choices, or a letter with another choice's text.
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
    """[answer without leading words such as "The answer is"]; [] if it is too long to name a choice by its letter."""
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
    description = normalise(rest)
    if not description or CLAIMED.fullmatch(description) or choices.get(letter) == description:
        return letter
    if (
        re.match(r"[A-Za-z]\s", tidy(text)) or description in choices.values()
    ):  # "a lion" is no choice of A; "A. tiger" is neither
        return None
    others = [
        x for x in re.findall(r"(?<![\w'’])(?:[B-HJ-Z]|[A-Z](?=[).:,]|\s*$))(?![\w'’])", rest) if x.lower() != letter
    ]
    if re.fullmatch(r"[a-z]", description) or any(not choices or x.lower() in choices for x in others):
        return None  # "A, B": undecided
    return letter


def same_choice(answer: str, reference: str, choices: Mapping[str, str]) -> bool:
    """Whether `answer` and `reference` name the same choice, each by letter, text or both; options of equal text are the same."""
    wanted, chosen = letter_of(reference, choices), letter_of(answer, choices)
    if wanted is None or chosen is None:
        return False
    if wanted == chosen:
        return True
    text = choices.get(wanted, "")
    return text == choices.get(chosen) and not PLACEHOLDER.fullmatch(text)


def stated_choice(response: str, choices: Mapping[str, str]) -> str | None:
    """The choice of a response without a box: the whole text if it names a choice, or a last sentence "the answer is ..."."""
    response = response.strip()
    if letter_of(response, choices) is not None:
        return response
    last = re.split(r"\n|(?<=\w[.!?。])\s", response)[-1].strip()
    start = re.search(r"\b(?:answer|option|choice)\s+is\b|答案", last, re.IGNORECASE)
    if start and letter_of(last[start.start() :], choices) is not None:
        return last[start.start() :]
    return None
