"""ROUGE-L (Lin 2004): the overlap of a generated text with a reference."""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

WORD = re.compile(r"[a-z0-9]+")
SHORT = 3  # words of at most so many letters are not stemmed


class RougeL(NamedTuple):
    """The share that the longest common subsequence of words has of each text, and their harmonic mean."""

    precision: float  # of the generated text
    recall: float  # of the reference
    fmeasure: float


def rouge_l(generated: str, reference: str, *, stem: Callable[[str], str] | None = None) -> RougeL:
    """ROUGE-L of a generated text, as the package `rouge_score` computes it. TOFU reports its recall, MUSE its F-measure.

    Args:
        generated: the text of the model.
        reference: the text that was learned.
        stem: applied to words of more than three letters; the released numbers are with Porter's
            (`nltk.stem.porter.PorterStemmer().stem`). None: words are compared as they are, in lower case.
    """
    one, two = (_words(text, stem) for text in (generated, reference))
    if not one or not two:
        return RougeL(0.0, 0.0, 0.0)
    common = _common(one, two)
    precision, recall = common / len(one), common / len(two)
    total = precision + recall
    return RougeL(precision, recall, 2 * precision * recall / total if total else 0.0)


def _words(text: str, stem: Callable[[str], str] | None) -> list[str]:
    words = WORD.findall(text.lower())
    return words if stem is None else [stem(word) if len(word) > SHORT else word for word in words]


def _common(one: list[str], two: list[str]) -> int:
    """Length of the longest common subsequence."""
    lengths = np.zeros(len(two) + 1, int)
    for word in one:
        extended = np.concatenate([[0], lengths[:-1] + np.array([word == other for other in two])])
        lengths = np.maximum.accumulate(np.maximum(lengths, extended))
    return int(lengths[-1])
