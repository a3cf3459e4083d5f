"""Endless random orders of rows.

Rows may be grouped into buckets, each of one static shape: then all rows of a batch come from one bucket. Every epoch has each
row once. Rows that do not fill a batch at the end of an epoch come first in the next.
"""

import bisect
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

T = TypeVar("T")
Buckets = list[list[T]]  # the rows of each bucket
ENDLESS = 1 << 48


def check_position(position: Any) -> int:
    """Returns the position of a saved state. ValueError: it is no position in an endless order."""
    if type(position) is not int or not 0 <= position < ENDLESS:
        raise ValueError(f"the position in the data is {position!r}, not a whole number from 0")
    return position


class ShuffledRows:
    """An endless order of the numbers below `count`: every epoch is a permutation, drawn from (seed, epoch).

    A batch may span two epochs.
    """

    def __init__(self, count: int, seed: int):
        shuffle = lambda epoch: np.random.default_rng([seed, epoch]).permutation(count)
        self.count, self.epoch = count, functools.lru_cache(2)(shuffle)  # threads read ahead, into the next epoch

    def __getitem__(self, position: int) -> int:
        epoch, index = divmod(int(position), self.count)
        return int(self.epoch(epoch)[index])


class BucketOrder(Generic[T]):
    """An endless order in which each batch of `size` rows comes from one bucket. Several threads may index it."""

    def __init__(self, rows: Callable[[int], Buckets], size: int, seed: int):
        """`rows`: a function from an epoch to its rows by bucket, in an order that depends on the epoch alone."""
        self.rows, self.size, self.seed = rows, size, seed
        self.lock = threading.Lock()
        self.starts = [0]  # first batch of every epoch seen so far, and of the next
        self.left: list[Buckets] = [[[] for _ in rows(0)]]  # by epoch, the rows that the one before it left over
        self.cache: dict[int, list[list[T]]] = {}  # the batches of two epochs: threads read ahead

    def __getitem__(self, position: int) -> T:
        batch, row = divmod(int(position), self.size)
        with self.lock:
            while self.starts[-1] <= batch:
                self._begin(len(self.starts) - 1)
            epoch = bisect.bisect_right(self.starts, batch) - 1
            if epoch not in self.cache:
                self._begin(epoch)
            return self.cache[epoch][batch - self.starts[epoch]][row]

    def _begin(self, epoch: int) -> None:
        batches, left = self.epoch(epoch, self.left[epoch])
        self.cache = {**dict(list(self.cache.items())[-1:]), epoch: batches}
        if epoch == len(self.starts) - 1:
            self.left.append(left)
            self.starts.append(self.starts[-1] + len(batches))

    def epoch(self, epoch: int, left: Buckets) -> tuple[list[list[T]], Buckets]:
        """Returns the batches of an epoch, which begins with the rows `left` of the one before, and the rows that fill none."""
        batches, rest = [], []
        for before, rows in zip(left, self.rows(epoch), strict=True):
            rows = [*before, *rows]
            whole = len(rows) // self.size * self.size
            batches += [rows[i : i + self.size] for i in range(0, whole, self.size)]
            rest.append(rows[whole:])
        order = np.random.default_rng([self.seed, epoch, 1]).permutation(len(batches))
        return [batches[i] for i in order], rest


def shuffled(buckets: Sequence[Sequence[int]], size: int, seed: int) -> BucketOrder[int]:
    """Makes the endless order of the numbers in `buckets`; the order of epoch e is drawn from (seed, e)."""

    def rows(epoch: int) -> Buckets:
        random = np.random.default_rng([seed, epoch])
        return [random.permutation(np.array(bucket, int)).tolist() for bucket in buckets]

    return BucketOrder(rows, size, seed)
