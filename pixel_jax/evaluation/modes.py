"""The ways in which a benchmark is asked, of which a run may have several, to tell what looking closer is worth.

A mode is a value: the limits of its rollouts, the guidelines of its prompts, and what the model is shown of the pictures.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from pixel_jax.data.example import Example
from pixel_jax.evaluation.evidence import region_of
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.prompts import Query
from pixel_jax.rollouts.views import GREY

USED = "operations"  # the name of the mode in which a model is used


def as_it_is(example: Example, query: Query) -> Query:
    """The query with its pictures as they are."""
    return query


def without_pictures(example: Example, query: Query) -> Query:
    """The query with grey pictures of the same sizes."""
    return query._replace(images=[np.broadcast_to(np.uint8(GREY), image.shape) for image in query.images])


def evidence_alone(example: Example, query: Query) -> Query:
    """The query about the part of its picture that holds the evidence, the best zoom that there is.

    Raises:
        EvidenceError: the example has no reference box, or is about several pictures.
    """
    (x1, y1, x2, y2), image = region_of(example, query), query.images[0]
    return query._replace(images=[image[y1:y2, x1:x2]])


def no_calls(limits: RolloutConfig) -> RolloutConfig:
    """Limits with which nothing is executed, also if the model calls out of habit."""
    return dataclasses.replace(limits, max_calls=0)


@dataclasses.dataclass(frozen=True)
class Mode:
    """A way of asking."""

    what: str  # in words, for reports
    limits: Callable[[RolloutConfig], RolloutConfig] = lambda limits: limits
    guidelines: str = "vcot"  # of the prompt: the released `vcot`, or `notool`
    show: Callable[[Example, Query], Query] = as_it_is  # also of queries whose pixels are not read


MODES: Mapping[str, Mode] = {
    USED: Mode("with operations, as trained"),
    "none": Mode("without operations: the overview alone", no_calls, "notool"),
    "blank": Mode("with operations that show grey", lambda limits: dataclasses.replace(limits, blank=True)),
    "blind": Mode("without looking: grey in the place of the pictures", no_calls, "notool", without_pictures),
    "evidence": Mode("the evidence alone, cut out by the reference box", no_calls, "notool", evidence_alone),
}
