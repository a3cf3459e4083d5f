"""How large batches are. A step is compiled for every shape that its batches have, so there are few, worked out from what the
examples take: from the headers of their pictures and the words of their texts, before anything is trained.
"""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pixel_jax.models.config import ModelConfig
from pixel_jax.models.flops import padded_work, training_flops
from pixel_jax.rollouts.shapes import BatchShape

GAIN = 0.03  # share of all the work that one more compilation has to save
MOST_SHAPES = 4  # compilations of a step
PATCHES_PER_TOKEN = 8  # at most: four, and a video's token covers two frames
MOST_KINDS = 96  # different needs that are compared with one another: their pairs are many


PACKED = 3  # the sides of a row that traces share add up: tokens, images, slices


def bucket_shapes(lengths: Sequence[int], largest: BatchShape) -> tuple[BatchShape, ...]:
    """A room for every length, shortest first, the last being `largest`; ValueError unless they rise towards it.

    A frame takes tokens in proportion to its patches, so short rows need no room for large ones.
    """
    rising = (*lengths, largest.tokens)
    if list(rising) != sorted(set(rising)) or rising[0] < 1:
        raise ValueError(f"buckets {tuple(lengths)} must rise and stay under the room of a trace, {largest.tokens}")
    return tuple(
        largest._replace(tokens=length, patches=min(largest.patches, PATCHES_PER_TOKEN * length)) for length in rising
    )


class Measured(NamedTuple):
    """By what shapes are worked out, where none are given."""

    cost: Callable[[BatchShape], float]  # of a row of a shape
    rows: int  # of a batch
    memory: int  # bytes that one row may take: of the pictures of a prompt, or of a step that tunes on it
    takes: Callable[[BatchShape], int] | None = None  # of these, a row that is tuned on


def training_work(network: ModelConfig) -> Callable[[BatchShape], float]:
    """What a row of a shape costs: operations of its forward and backward pass, padding included."""

    @functools.cache
    def work(shape: BatchShape) -> float:
        return sum(training_flops(network, padded_work(1, shape.tokens, shape.slices, shape.patches, network)))

    return work


def rounded(need: BatchShape, coarse: int = 1) -> BatchShape:
    """`need` with sides in steps, so that few needs differ and data that grows a little compiles nothing anew."""
    up = lambda value, step: -(-value // (coarse * step)) * (coarse * step)
    return need._replace(
        tokens=up(need.tokens, 64),
        images=up(need.images, 1),
        slices=up(need.slices, 1),
        patches=up(need.patches, 64),
        height=up(need.height, 32),
        width=up(need.width, 32),
    )


class Group(NamedTuple):
    """Examples of one shape."""

    most: BatchShape  # each of its sides is the largest
    examples: int
    total: tuple[int, ...]  # tokens, images and slices of all together
    packed: bool  # whether a row has as many of them as it has room for

    @property
    def shapes(self) -> list[BatchShape]:
        """That the group may have; of packed rows with about as many pictures as go with the tokens, lest a row is full of
        pictures and short of text, or the other way round.
        """
        if not self.packed:
            return [self.most]
        tokens, *pictures = self.total

        def room(most: int, count: int, more: int) -> int:
            return max(most, min(self.most.tokens * count // tokens + more, count))

        pictures = [(most, count) for most, count in zip(self.most[1:PACKED], pictures, strict=True)]
        return [
            BatchShape(self.most.tokens, *(room(*x, more) for x in pictures), *self.most[PACKED:]) for more in (0, 1)
        ]

    def rows(self, shape: BatchShape) -> float:
        """Of that shape, for all examples."""
        if not self.packed:
            return self.examples
        return max(1.0, *(total / room for total, room in zip(self.total, shape, strict=False)))

    def __or__(self, other: "Group") -> "Group":
        most, total = BatchShape(*map(max, self.most, other.most)), map(sum, zip(self.total, other.total, strict=True))
        return Group(most, self.examples + other.examples, tuple(total), self.packed)


def group_of(needs: Sequence[BatchShape], packed: bool) -> Group:
    sides = np.array(needs)
    most = rounded(BatchShape(*sides.max(axis=0).tolist()))
    return Group(most, len(needs), tuple(sides[:, :PACKED].sum(axis=0).tolist()), packed)


def cover(
    needs: Sequence[BatchShape],
    cost: Callable[[BatchShape], float],
    *,
    packed: bool = False,
    least: int = 1,
    most: int = MOST_SHAPES,
    gain: float = GAIN,
) -> list[BatchShape]:
    """At most `most` shapes (of videos and of others) that hold all `needs`, the cheapest first.

    Needs that are most alike share a shape as long as there are more shapes than that, as long as a shape has fewer rows
    than `least` (those of a batch, which would take many epochs to fill), or as long as keeping them apart saves less than a
    share `gain` of all the work.

    Args:
      cost: of a row of a shape.
      packed: rows have room for several examples each.
    """
    coarse = 1
    while len({rounded(need, coarse) for need in needs}) > MOST_KINDS:
        coarse *= 2
    alike = collections.defaultdict(list)
    for need in needs:
        alike[rounded(need, coarse)].append(need)
    groups = [group_of(kind, packed) for kind in alike.values()]
    found = []
    for video in {group.most.video for group in groups}:
        mine = [group for group in groups if group.most.video == video]
        found += [cheapest(group, cost) for group in merged(mine, cost, least, most, gain)]
    return sorted(found, key=lambda shape: (cost(shape), shape))


def cheapest(group: Group, cost: Callable[[BatchShape], float]) -> BatchShape:
    return min(group.shapes, key=lambda shape: group.rows(shape) * cost(shape))


def merged(groups: list[Group], cost: Callable[[BatchShape], float], least: int, most: int, gain: float) -> list[Group]:
    """Two groups at a time become one, those first whose rows it makes least dearer (`cover`)."""
    shape = functools.cache(lambda group: cheapest(group, cost))
    work = functools.cache(lambda group: group.rows(shape(group)) * cost(shape(group)))
    dearer = functools.cache(lambda a, b: work(a | b) - work(a) - work(b))
    total = sum(map(work, groups))
    while len(groups) > 1:
        few = [group for group in groups if group.rows(shape(group)) < least]
        pairs = ((a, b) for i, a in enumerate(groups) for b in groups[:i] if not few or a in few or b in few)
        more, a, b = min(((dearer(a, b), a, b) for a, b in pairs), key=lambda found: found[0])
        if not few and len(groups) <= most and more > gain * total:
            break
        groups = [group for group in groups if group is not a and group is not b] + [a | b]
    return groups
