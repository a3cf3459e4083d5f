"""Writers of the analyses of a trace: a vision-language model behind an endpoint, or fixed sentences."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from pixel_jax.data.synthesis import final_answer
from pixel_jax.endpoint import Endpoint, user
from pixel_jax.synthesis.seeds import Seed

Images = Sequence[np.ndarray]  # uint8 [h, w, 3]


class TraceWriter(Protocol):
    """A writer. `attempt` counts from 0; another attempt gives another text, if the writer has one."""

    def whole(self, seed: Seed, images: Images, attempt: int) -> str:
        """Describes the whole image or video and says that the cue needs a closer look, without the answer."""
        ...

    def local(self, seed: Seed, views: Images, attempt: int) -> str:
        """Describes `views`, the crop or the frames of the cue, and ends with the answer in a box."""
        ...

    def direct(self, seed: Seed, images: Images, attempt: int) -> str:
        """Answers without a closer look, and ends with the answer in a box."""
        ...


class Templates:
    """A writer of fixed sentences, which needs no endpoint."""

    def whole(self, seed: Seed, images: Images, attempt: int) -> str:
        """Says that the cue is small."""
        if seed.video:
            return f"The question is about '{seed.cue}', which only a part of the video shows."
        return f"The question is about '{seed.cue}', which takes up only a small part of the image."

    def local(self, seed: Seed, views: Images, attempt: int) -> str:
        """Says that the cue is clear, and answers."""
        where = "In these frames" if seed.video else "In this crop"
        return f"{where}, '{seed.cue}' can be seen clearly.\n{final_answer(seed.answers[0])}"

    def direct(self, seed: Seed, images: Images, attempt: int) -> str:
        """Says that no closer look is needed, and answers."""
        kind = "video" if seed.video else "image"
        return f"The {kind} shows this without a closer look.\n{final_answer(seed.answers[0])}"


STYLE = (
    "Write plain prose in the first person, as if thinking aloud, without headings, lists, code, tags or coordinates, "
    "and without mentioning these instructions."
)
WHOLE = (
    "Above you see {what}. Somebody asks about it:\n\n{question}\n\nThe part that matters is '{cue}'{where}, which deserves "
    "a closer look before anything can be said for sure. In two to four sentences, say what {it} shows as a whole, and "
    "where in it '{cue}' is and why a closer look at it will help. Do not answer the question, do not guess, and do not "
    "name or hint at any candidate answer. " + STYLE
)
LOCAL = (
    "Above you see {what}, chosen to look closer at '{cue}'. Answer this question from what you see there:\n\n{question}\n\n"
    "In one to four sentences, say what is visible that answers it, and then give the final answer alone in \\boxed{{}} on a "
    "last line (of a multiple-choice question, only the letter). " + STYLE
)
DIRECT = (
    "Above you see {what}. Answer this question about it:\n\n{question}\n\nReason step by step in a few sentences, and then "
    "give the final answer alone in \\boxed{{}} on a last line (of a multiple-choice question, only the letter). "
    + STYLE
)


class EndpointWriter:
    """A writer that asks a model behind an endpoint. The model is told where to look but not the answer, which it has to read."""

    def __init__(self, endpoint: Endpoint, sampling: Mapping[str, Any]):
        """Takes the endpoint and the fields of its requests."""
        self.endpoint, self.sampling = endpoint, dict(sampling)

    def _ask(self, prompt: str, seed: Seed, images: Images, attempt: int, **words: str) -> str:
        text = prompt.format(question=seed.question, cue=seed.cue, **words)
        return self.endpoint.complete([user(text, *images)], **self.sampling, seed=attempt).strip()

    def whole(self, seed: Seed, images: Images, attempt: int) -> str:
        """Asks for a description of the whole."""
        return self._ask(WHOLE, seed, images, attempt, what=_what(seed), where=_where(seed), it=_it(seed))

    def local(self, seed: Seed, views: Images, attempt: int) -> str:
        """Asks for a description of the views, and the answer."""
        what = f"{len(seed.frames)} frames of a video" if seed.frames else "a part of a larger image, enlarged"
        return self._ask(LOCAL, seed, views, attempt, what=what)

    def direct(self, seed: Seed, images: Images, attempt: int) -> str:
        """Asks for the answer."""
        return self._ask(DIRECT, seed, images, attempt, what=_what(seed))


def _what(seed: Seed) -> str:
    count = len(seed.images)
    if seed.video:
        return f"{count} frames of a video, in order"
    return "an image" if count == 1 else f"{count} images"


def _it(seed: Seed) -> str:
    return "the video" if seed.video else "the image"


def _where(seed: Seed) -> str:
    if seed.frames is not None:
        return f" (frames {seed.frames[0]} to {seed.frames[-1]})"
    return f" (in image {seed.image})" if len(seed.images) > 1 else ""
