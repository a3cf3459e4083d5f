"""Texts as token ids: each word or punctuation mark is a token, and the vocabulary is made from the texts."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

PIECE = re.compile(r"\w+|[^\w\s]")
PAD, END, START = 0, 1, 2


class Words(NamedTuple):
    """A vocabulary of words, and the length of an example."""

    ids: Mapping[str, int]
    length: int  # input tokens of an example; the end token is only a label

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, str]]) -> "Words":
        """Makes the vocabulary of (question, answer) pairs; an example is as long as the longest of them."""
        pairs = list(pairs)
        words = sorted({word for pair in pairs for text in pair for word in PIECE.findall(text)})
        names = ["<pad>", "<end>", "<start>", *words]
        count = lambda text: len(PIECE.findall(text))
        longest = max(1 + count(question) + count(answer) for question, answer in pairs)
        return cls({word: i for i, word in enumerate(names)}, longest)

    def lacking(self, text: str) -> list[str]:
        """The words of a text that are not in the vocabulary."""
        return [word for word in PIECE.findall(text) if word not in self.ids]

    def fits(self, question: str, answer: str) -> bool:
        """Whether a question and its answer fit into an example."""
        return 1 + len(PIECE.findall(question)) + len(PIECE.findall(answer)) <= self.length

    def encode(self, pairs: Sequence[tuple[str, str]], masked: Sequence[Sequence[str]] = ()) -> dict[str, np.ndarray]:
        """Encodes pairs as {"tokens": int32, "labels": int32, "loss_mask": float32}, each [n, length].

        The answer and the end token carry loss.

        Args:
            pairs: questions and answers whose words are known.
            masked: for each pair, parts of the answer whose words carry no loss.
        """
        shape = len(pairs), self.length
        tokens, labels, mask = np.full(shape, PAD, np.int32), np.full(shape, PAD, np.int32), np.zeros(shape, np.float32)
        for row, (question, answer) in enumerate(pairs):
            prefix = [START, *(self.ids[word] for word in PIECE.findall(question))]
            ids = [*prefix, *(self.ids[word] for word in PIECE.findall(answer)), END]
            tokens[row, : len(ids) - 1], labels[row, : len(ids) - 1] = ids[:-1], ids[1:]
            mask[row, len(prefix) - 1 : len(ids) - 1] = 1
            for text in masked[row] if masked else ():
                begin = answer.index(text)
                for i, word in enumerate(PIECE.finditer(answer)):
                    if word.start() < begin + len(text) and word.end() > begin:
                        mask[row, len(prefix) - 1 + i] = 0
        return {"tokens": tokens, "labels": labels, "loss_mask": mask}

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Joins the words of ids up to the first end token."""
        names, words = list(self.ids), []
        for index in ids:
            if index == END:
                break
            words.append(names[index])
        return " ".join(words)
