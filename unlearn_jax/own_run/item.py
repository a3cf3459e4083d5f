"""The content of a training example of a run, and its forms after requests."""

import json
from typing import Any, NamedTuple

from pixel_jax.data.images import read_image
from pixel_jax.data.own import written_turns
from pixel_jax.data.traces import Turn
from pixel_jax.training.answers import BOX, last_boxed
from unlearn_jax.requests.request import EditRequestError, Request, refuse_kind


class RunItem(NamedTuple):
    """The texts and pictures of a row of the data. Pictures are given by their content."""

    question: str
    pictures: tuple[str | bytes, ...]  # the digest of a picture of the data, or the bytes of a request's new image
    turns: tuple[Turn, ...]
    answer: tuple[str, ...]
    video: bool
    seconds: float | None
    text_first: bool
    masked: tuple[str, ...] = ()  # parts of the learned text that carry no loss

    @property
    def learned(self) -> list[str]:
        """The learned texts, one for each contiguous part of a turn."""
        return [text for turn in self.turns for text, learned in turn.parts if learned]


def changed(item: RunItem, request: Request) -> RunItem:
    """Returns an example with another question, answer, image, part or trace, or with a part masked.

    Raises:
        EditRequestError: the request does not fit the example.
    """
    name = request.ids[0]
    refuse_kind(request, "question", "answer", "image", "mask", "part", "trace")
    match request.kind:
        case "mask":
            if request.value in item.masked:
                return item
            _find(item, request.value, name)
            return item._replace(masked=(*item.masked, request.value))
        case "question":
            new = item._replace(question=request.value)
        case "answer":
            new = item._replace(turns=_answered(item.turns, request.value), answer=(request.value,))
        case "image":
            new = _shown(item, request)
        case "part":
            _find(item, request.value, name)
            new = item._replace(turns=tuple(_replaced(turn, request.value, request.becomes) for turn in item.turns))
        case _:
            refuse = lambda why: EditRequestError(f"the new turns of {name!r}: {why}")
            turns: Any = json.loads(request.value)
            new = item._replace(turns=written_turns(turns, refuse))
    # A masked text is dropped unless it occurs exactly once in the new form.
    return new._replace(masked=tuple(x for x in item.masked if sum(text.count(x) for text in new.learned) == 1))


def _find(item: RunItem, text: str, name: str) -> None:
    if (count := sum(learned.count(text) for learned in item.learned)) != 1:
        raise EditRequestError(
            f"the given part occurs {count} times in what {name!r} teaches: give one that occurs once, with what stands "
            f"around it"
        )


def _replaced(turn: Turn, old: str, new: str) -> Turn:
    return turn._replace(
        parts=tuple((text.replace(old, new) if learned else text, learned) for text, learned in turn.parts)
    )


def _answered(turns: tuple[Turn, ...], answer: str) -> tuple[Turn, ...]:
    r"""The turns with another answer in the last \boxed{} of the last turn; without one the last turn is the answer."""
    *before, last = turns
    for number in reversed(range(len(last.parts))):
        text, learned = last.parts[number]
        old = last_boxed(text)
        if old is None:
            continue
        places = [box.end() for box in BOX.finditer(text) if text.startswith(f"{old}}}", box.end())]
        text = text[: places[-1]] + answer + text[places[-1] + len(old) :]
        parts = (*last.parts[:number], (text, learned), *last.parts[number + 1 :])
        return (*before, last._replace(parts=parts))
    return (*before, last._replace(parts=((answer, True),)))


def _shown(item: RunItem, request: Request) -> RunItem:
    if item.video or len(item.pictures) != 1:
        kind = "a video" if item.video else f"{len(item.pictures)} images"
        raise EditRequestError(f"{request.ids[0]!r} shows {kind}: only a single image is changed")
    try:
        read_image(request.image, name=request.image_name)
    except ValueError as error:
        raise EditRequestError(f"the new image of {request.ids[0]!r}: {error}") from None
    return item._replace(pictures=(request.image,))
