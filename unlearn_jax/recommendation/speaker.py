"""The protocol by which a prompt form asks a model about test rows."""

from typing import Protocol

import numpy as np


class Speaker(Protocol):
    """A model that has read the questions of n test rows."""

    def token(self, text: str) -> int:
        """The first token id of an answer `text`."""
        ...

    def first_logits(self) -> np.ndarray:
        """Logits of the first token of each answer, [n, vocabulary]."""
        ...

    def answers(self) -> list[str]:
        """The greedy answer to each question: its first line, at most `config.data.answer` tokens."""
        ...
