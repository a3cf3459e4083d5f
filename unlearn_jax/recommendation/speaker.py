"""What a form may ask of a model, about test rows that it has read."""

from typing import Protocol

import numpy as np


class Speaker(Protocol):
    """A model that has read the questions of n test rows."""

    def token(self, text: str) -> int:
        """The first token of an answer."""
        ...

    def first_logits(self) -> np.ndarray:
        """Logits of the first token of each answer, [n, vocabulary]."""
        ...

    def answers(self) -> list[str]:
        """The greedy answer to each question, at most `config.data.generated` tokens, without what follows its first line."""
        ...
