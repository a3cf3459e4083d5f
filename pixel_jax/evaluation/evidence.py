"""Whether what a model cut out holds the evidence, for questions whose data say where it lies.

The field `box` of an example has the reference: x1, y1, x2, y2 in pixels of its picture, or a list of such boxes (as the reward
`overlap` reads it).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pixel_jax.data.example import Example
from pixel_jax.rollouts.prompts import Query
from pixel_jax.rollouts.trajectory import Calls, CallStatus

FIELD = "box"
HELD = 0.9  # share of a reference box from which on a crop holds it
AROUND = 0.5  # of the longer side of the evidence, that `region_of` leaves on each side


class EvidenceError(ValueError):
    """A question without a reference box. The message has its id."""


def boxes_of(example: Example) -> np.ndarray | None:
    """The reference boxes of an example, float [n, 4]; None if it has none, or what it has are no boxes in pixels."""
    try:
        boxes = np.atleast_2d(np.array(example.fields.get(FIELD), float))
    except (TypeError, ValueError):
        return None
    good = boxes.ndim == 2 and boxes.shape[1] == 4 and len(boxes) > 0 and len(example.images) == 1 and not example.video
    return boxes if good and np.all(boxes >= 0) and np.all(boxes[:, :2] < boxes[:, 2:]) else None


def misread(examples: Sequence[Example]) -> list[str]:
    """The ids of examples that have the field and no boxes in it."""
    return [x.id for x in examples if x.fields.get(FIELD) is not None and boxes_of(x) is None]


def region_of(example: Example, query: Query) -> tuple[int, int, int, int]:
    """The region x1, y1, x2, y2 of a query's picture that holds all evidence, and some of what surrounds it.

    Raises:
        EvidenceError: the example has no reference box, or one outside the picture.
    """
    boxes = boxes_of(example)
    if boxes is None:
        raise EvidenceError(f"{example.id}: there is no reference box in the field {FIELD!r} to cut out")
    height, width = query.images[0].shape[:2]
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    if np.any(low >= (width, height)):
        raise EvidenceError(
            f"{example.id}: the reference {boxes.tolist()} lies outside the picture, {width} x {height}"
        )
    around = AROUND * max(high - low)
    x1, y1 = np.floor(np.maximum(low - around, 0)).astype(int).tolist()
    x2, y2 = np.ceil(np.minimum(high + around, (width, height))).astype(int).tolist()
    return x1, y1, x2, y2


def crops_of(calls: Calls) -> np.ndarray:
    """The regions of the first picture that the calls [N] of one row cut out: int [n, 4], in pixels of the rollout's picture."""
    cut = (calls.status == CallStatus.DONE) & (calls.source.image[:, 0] == 0) & np.all(calls.drawn == 0, axis=1)
    return np.asarray(calls.source.region[:, 0])[np.asarray(cut)]


def held(crops: np.ndarray, boxes: np.ndarray) -> float:
    """How much of the evidence crops [n, 4] hold: of each box [m, 4] the largest share within a crop, and of these the least."""
    if not len(crops):
        return 0.0
    low = np.maximum(crops[:, None, :2], boxes[None, :, :2])
    high = np.minimum(crops[:, None, 2:], boxes[None, :, 2:])
    both = np.prod(np.maximum(high - low, 0.0), axis=-1)
    return float((both / np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1)).max(axis=0).min())


def looked_at(
    example: Example, sizes: tuple[tuple[int, int], tuple[int, int]], rows: Sequence[Calls]
) -> dict[str, Any]:
    """What a record says of the evidence; nothing without a reference.

    Args:
        example: the question.
        sizes: the (height, width) of its picture in its file, and in the rollout.
        rows: the calls [N] of each answer.

    Returns:
        {"evidence": `held` of each answer, "crop_area": the share of the picture that its largest crop shows, 0 without one}.
    """
    boxes = boxes_of(example)
    if boxes is None:
        return {}
    (height, width), (shown_height, shown_width) = sizes
    scaled = boxes * np.array([shown_width / width, shown_height / height] * 2)
    crops = [crops_of(calls) for calls in rows]
    areas = [np.prod(x[:, 2:] - x[:, :2], axis=1) / (shown_height * shown_width) for x in crops]
    return {
        "evidence": [held(x, scaled) for x in crops],
        "crop_area": [float(x.max(initial=0.0)) for x in areas],
    }
