"""Checks of the texts that an endpoint or a template writes for a trace.

The analysis of the whole image comes before the call, so it must not contain the answer; the analysis of what the call shows
must arrive at it. A check returns the problem in a few words, which the report counts, or None.
"""

import re
from collections.abc import Sequence

from pixel_jax.data.synthesis import final_answer
from pixel_jax.dialog.formats import FORMATS
from pixel_jax.dialog.grammar import RELEASED_LANGUAGE, Language
from pixel_jax.tools.named import SHIPPED
from pixel_jax.training.answers import equal, last_boxed, normalise

SHORTEST, LONGEST = 12, 2000  # characters of an analysis

# Names and markup of calls, chat templates and Markdown: they would be parsed as such, or learned.
NAMES = {name for tool in SHIPPED.values() for name in (tool.name, *(x.name for x in tool.arguments)) if "_" in name}
MARKUP = re.compile(
    r"</?\w*tool\w*>|<\|[^|>]*\|>|<(?:image|video|think|answer)\b|crop_image|```|" + "|".join(sorted(NAMES)),
    re.IGNORECASE,
)
# Phrases of a writer who was told the answer, or who mentions the task.
INSTRUCTED = re.compile(
    r"\b(?:reference answer|correct answer (?:given|provided)|as an ai|language model|your instructions?|the user"
    r"|provided (?:answer|hint)|i (?:was|am) (?:given|told|asked))\b",
    re.IGNORECASE,
)
BLIND = re.compile(
    r"\b(?:(?:can ?not|can't|could not|couldn't|unable to|impossible to) (?:be )?(?:clearly )?"
    r"(?:see|seen|read|tell|determine[d]?|make out|discern(?:ed)?|identify|identified|answer(?:ed)?)"
    r"|(?:is|are) not (?:clearly )?(?:visible|legible|shown|readable)|too (?:blurry|blurred|small|dark) to)\b",
    re.IGNORECASE,
)
STATED = re.compile(
    r"\banswer(?: to (?:the|this) question)?(?:\s+(?:is|would be|must be|should be)\b|\s*:)\s*(?:clearly\s+)?"
    r"(?:option\s+)?[\"'“(*]*([^\s.,;:!?\"'”)*]+)",
    re.IGNORECASE,
)
# Words after "the answer is" that do not state it: "not visible yet", "likely written on it".
UNDECIDED = frozenset(
    "not to in on at by near likely probably perhaps found visible written shown printed somewhere hidden located too".split()
)
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
YES_OR_NO = ("yes", "no", "true", "false")


def unfit(text: str, language: Language = RELEASED_LANGUAGE) -> str | None:
    """The problem of a text anywhere in a trace whose calls are in the `language`, or None."""
    if not text.strip():
        return "empty"
    names = [tool.name for tool in language.tools if "_" in tool.name]
    marks = [mark for known in (*FORMATS.values(), language.format) for mark in (known.opening, known.closing)]
    if MARKUP.search(text) or any(word in text for word in (*names, *marks)):
        return "markup in the text"
    if INSTRUCTED.search(text):
        return "talks about its instructions"
    if len(text) > LONGEST:
        return "too long"
    return None


def reveals(text: str, question: str, answers: Sequence[str]) -> bool:
    """Whether a text names the answer, or calls something the answer.

    A letter, yes and no, and words of the question itself count only where they are called the answer, because any description
    may contain them. Of listed options the right one counts where no other is named.
    """
    if "\\boxed" in text or any(x.group(1).lower() not in UNDECIDED for x in STATED.finditer(text)):
        return True
    text = normalise(text)
    named = {letter for letter, option in _options(question).items() if _holds(text, normalise(option))}
    if named and named <= {normalise(answer) for answer in answers}:
        return True
    return any(_names(text, normalise(question), normalise(answer)) for answer in answers)


def whole_problem(
    text: str, question: str, answers: Sequence[str], language: Language = RELEASED_LANGUAGE
) -> str | None:
    """The problem of an analysis of the whole image or video, or None."""
    if problem := unfit(text, language):
        return problem
    if len(text.strip()) < SHORTEST:
        return "too short"
    return "reveals the answer" if reveals(text, question, answers) else None


def local_problem(text: str, answers: Sequence[str], language: Language = RELEASED_LANGUAGE) -> str | None:
    """The problem of an analysis of what a call shows, which ends with its answer in a box, or None."""
    if problem := unfit(text, language):
        return problem
    final = last_boxed(text)
    if final is None:
        return "no final answer"
    if not right_answer(final, answers):
        return "wrong final answer"
    before = text[: text.rindex("\\boxed")]
    if len(before.strip()) < SHORTEST:
        return "no analysis"
    if BLIND.search(before):
        return "says that it cannot see"
    earlier = last_boxed(before)
    if earlier is not None and not right_answer(earlier, answers):
        return "contradicts its answer"
    if any(not _agrees(match.group(1), answers) for match in STATED.finditer(before)):
        return "contradicts its answer"
    return None


def right_answer(found: str, answers: Sequence[str]) -> bool:
    """Whether the content of a box is one of the answers; a letter may be followed by its option's text."""
    letter = re.match(r"\s*\(?([A-Za-z])\)?\s*[.:)]\s*\S", found)
    candidates = [found, letter.group(1)] if letter else [found]
    return any(equal(candidate, answer) for candidate in candidates for answer in answers)


def with_answer(text: str, answer: str) -> str:
    """The text up to its final box, followed by `answer` in a box."""
    before = re.sub(r"(?:\$+|\\[(\[]|\*+)\s*$", "", text[: text.rindex("\\boxed")])
    if before.endswith("\n") or not before.strip():
        return f"{before.strip()}\n{final_answer(answer)}"
    return f"{before.strip()} \\boxed{{{answer}}}"


def _names(text: str, question: str, answer: str) -> bool:
    if (len(answer) == 1 and not answer.isdigit()) or answer in YES_OR_NO or _holds(question, answer):
        return False
    spellings = [answer]  # `isdigit` would accept "①", which `int` refuses
    if re.fullmatch(r"[0-9]{1,2}", answer) and int(answer) < len(WORDS):
        spellings.append(WORDS[int(answer)])
    elif answer in WORDS:
        spellings.append(str(WORDS.index(answer)))
    return any(_holds(text, spelling) for spelling in spellings)


def _holds(text: str, words: str) -> bool:
    return bool(words) and re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def _options(question: str) -> dict[str, str]:
    """The options that a question lists as `A. ...` or `(A) ...`: letter (lower case) -> text."""
    listed = re.findall(r"(?:^|\s)\(?([A-Z])[.):]\s+(.+?)(?=\s+\(?[A-Z][.):]\s|\n|$)", question)
    return {letter.lower(): option for letter, option in listed}


def _agrees(stated: str, answers: Sequence[str]) -> bool:
    """Whether a word that a text calls the answer is one, or begins one. Only letters, numbers, yes and no can disagree."""
    if stated == "a" or not re.fullmatch(rf"[A-Z]|\d[\d,.%]*|{'|'.join(YES_OR_NO)}", stated, re.IGNORECASE):
        return True
    return any(equal(stated, answer) or normalise(answer).startswith(normalise(stated) + " ") for answer in answers)
