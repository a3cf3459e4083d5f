"""Works out batch shapes from the examples.

A step is compiled for every shape that its batches have, so there are few of them. They are chosen before training, from the
sizes in the headers of the images and the lengths of the texts.
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
PATCHES_PER_TOKEN = 8  # at most: a token covers four patches of one frame, or of two in a video
MOST_KINDS = 96  # most different needs, because all their pairs are compared
PACKED = 3  # leading sides of a shape that add up over the traces of a packed row: tokens, images, slices


def bucket_shapes(lengths: Sequence[int], largest: BatchShape) -> tuple[BatchShape, ...]:
    """A shape for every length in tokens, shortest first, and `largest` as the last one.

    A frame takes tokens in proportion to its patches, so the shapes of short rows hold smaller frames.

    Raises:
        ValueError: the lengths do not rise towards that of `largest`.
    """
    rising = (*lengths, largest.tokens)
    if list(rising) != sorted(set(rising)) or rising[0] < 1:
        raise ValueError(f"buckets {tuple(lengths)} must rise and stay under the tokens of a trace, {largest.tokens}")
    return tuple(
        largest._replace(tokens=length, patches=min(largest.patches, PATCHES_PER_TOKEN * length)) for length in rising
    )


class AutoShapes(NamedTuple):
    """The inputs from which shapes are worked out where the configuration fixes none."""

    cost: Callable[[BatchShape], float]  # operations for a row of a shape
    rows: int  # of a batch
    memory: int  # bytes that one row may take: of the pictures of a prompt, or of a step that tunes on it
    row_bytes: Callable[[BatchShape], int] = lambda shape: 0  # bytes of `memory` that tuning on a row takes


def training_work(network: ModelConfig) -> Callable[[BatchShape], float]:
    """Makes a function from a shape to the operations of a row's forward and backward pass, padding included."""

    @functools.cache
    def work(shape: BatchShape) -> float:
        return sum(training_flops(network, padded_work(1, shape.tokens, shape.slices, shape.patches, network)))

    return work


def rounded(need: BatchShape, coarse: int = 1) -> BatchShape:
    """Rounds the sides of `need` up, so that few needs differ and slightly larger data compiles nothing new."""

    def up(value: int, step: int) -> int:
        return -(-value // (coarse * step)) * (coarse * step)

    return need._replace(
        tokens=up(need.tokens, 64),
        images=up(need.images, 1),
        slices=up(need.slices, 1),
        patches=up(need.patches, 64),
        height=up(need.height, 32),
        width=up(need.width, 32),
    )


class Group(NamedTuple):
    """Examples that share a shape."""

    most: BatchShape  # each side is the largest of the examples'
    examples: int
    total: tuple[int, ...]  # tokens, images and slices of all together
    packed: bool  # whether several of them share a row

    @property
    def shapes(self) -> list[BatchShape]:
        """The shapes that the group may have.

        Those of packed rows have images and slices in proportion to tokens, so that a row does not run out of one much earlier
        than of the others.
        """
        if not self.packed:
            return [self.most]
        most, (tokens, images, slices) = self.most, self.total

        def capacity(largest: int, total: int, more: int) -> int:
            return max(largest, min(most.tokens * total // tokens + more, total))

        return [
            most._replace(images=capacity(most.images, images, more), slices=capacity(most.slices, slices, more))
            for more in (0, 1)
        ]

    def rows(self, shape: BatchShape) -> float:
        """Returns the number of rows of `shape` that all examples take."""
        if not self.packed:
            return self.examples
        return max(1.0, *(total / max(1, capacity) for total, capacity in zip(self.total, shape, strict=False)))

    def __or__(self, other: "Group") -> "Group":
        total = map(sum, zip(self.total, other.total, strict=True))
        return Group(largest([self.most, other.most]), self.examples + other.examples, tuple(total), self.packed)


def group_of(needs: Sequence[BatchShape], packed: bool) -> Group:
    """The group of examples that need these shapes."""
    sides = np.array(needs)
    most = rounded(largest(needs))
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
    """Finds few shapes that hold all `needs`, the cheapest first. Videos never share a shape with images.

    The needs that are most alike are merged as long as there are too many shapes, a shape has too few rows, or keeping them
    apart saves too little.

    Args:
      needs: the shape that each example needs.
      cost: the cost of a row of a shape.
      packed: whether several examples share a row.
      least: rows of a shape: those of a batch, which would take many epochs to fill otherwise.
      most: shapes of images, and as many of videos.
      gain: the share of all the work that one more shape has to save.
    """
    coarse = 1
    while len({rounded(need, coarse) for need in needs}) > MOST_KINDS:
        coarse *= 2
    alike = collections.defaultdict(list)
    for need in needs:
        alike[rounded(need, coarse)].append(need)
    groups = [group_of(kind, packed) for kind in alike.values()]
    shapes = []
    for video in {group.most.video for group in groups}:
        same_kind = [group for group in groups if group.most.video == video]
        shapes += [cheapest(group, cost) for group in merged(same_kind, cost, least, most, gain)]
    return sorted(shapes, key=lambda shape: (cost(shape), shape))


def largest(shapes: Sequence[BatchShape]) -> BatchShape:
    """The smallest shape that holds all `shapes`."""
    return BatchShape(*np.max(shapes, axis=0).tolist())


def cheapest(group: Group, cost: Callable[[BatchShape], float]) -> BatchShape:
    """The shape of the group in which its examples cost least."""
    return min(group.shapes, key=lambda shape: group.rows(shape) * cost(shape))


def merged(groups: list[Group], cost: Callable[[BatchShape], float], least: int, most: int, gain: float) -> list[Group]:
    """Merges groups, two at a time, as `cover` describes: first those whose merger adds the least cost."""
    shape = functools.cache(lambda group: cheapest(group, cost))
    work = functools.cache(lambda group: group.rows(shape(group)) * cost(shape(group)))
    added_cost = functools.cache(lambda a, b: work(a | b) - work(a) - work(b))
    total = sum(map(work, groups))
    while len(groups) > 1:
        few = [group for group in groups if group.rows(shape(group)) < least]
        pairs = ((a, b) for i, a in enumerate(groups) for b in groups[:i] if not few or a in few or b in few)
        more, a, b = min(((added_cost(a, b), a, b) for a, b in pairs), key=lambda pair: pair[0])
        if not few and len(groups) <= most and more > gain * total:
            break
        groups = [group for group in groups if group is not a and group is not b] + [a | b]
    return groups
