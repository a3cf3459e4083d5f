"""Batches of rows, read ahead by Grain. For training the order of rows is endless, and every process takes its shard.

The rows of batch k depend on the order alone. So the state of a run is the number of batches that it has read: it may resume
with another number of processes, and all processes together read the rows that a single one would read.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import grain
import jax
import numpy as np

from pixel_jax.data.buckets import ENDLESS, ShuffledRows, check_position

T = TypeVar("T")


class Order(Protocol):
    """An endless order of rows: a pure function from a position to the key of the row there."""

    def __getitem__(self, position: int, /) -> Any: ...


class ProcessRows:
    """The keys of one process's rows, as a source for Grain: the `index`-th of `count` shards of every batch of `size` rows."""

    def __init__(self, order: Order, size: int, index: int, count: int):
        if size % count:
            raise ValueError(f"a batch of {size} rows cannot be split over {count} processes")
        self.order, self.size, self.index, self.own = order, size, index, size // count

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Any:
        batch, row = divmod(int(index), self.own)
        return self.order[batch * self.size + self.index * self.own + row]


def read_ahead(keys: Any, load: Callable[[Any], Any], *, threads: int, ahead: int, start: int = 0) -> Any:
    """Iterates over `load(key)` for the keys of a sequence, in order, from number `start` on.

    `load` runs in threads, and at most `ahead` results wait, so memory is bounded whatever the consumer does. The iterator's
    `close` ends the threads.
    """
    reading = grain.ReadOptions(num_threads=min(threads, ahead), prefetch_buffer_size=ahead)
    return iter(grain.MapDataset.source(keys).map(load)[start:].to_iter_dataset(reading))


def stack(rows: Iterator[T], count: int, enlarge: Callable[[T], T] = lambda like: like) -> T:
    """Stacks `count` rows, trees of arrays [1, ...], to one tree of arrays [count, ...].

    Args:
        rows: are read one at a time, and each is freed as soon as it is copied.
        count: number of rows to read.
        enlarge: maps the shapes of the batch that follow from its first row, a tree of `jax.ShapeDtypeStruct`, to larger ones;
            elements that no row fills are zero.
    """
    first = next(rows)
    like = enlarge(jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), first))
    stacked = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    for i, row in enumerate(itertools.chain([first], rows)):
        for batch, array in zip(jax.tree.leaves(stacked), jax.tree.leaves(row), strict=True):
            batch[(i, *map(slice, array.shape[1:]))] = array[0]
    return stacked


class Batches:
    """Endless batches `collate(rows, count)`, where `rows` iterates over `load(key)` for the keys of an order.

    `size` counts the rows of all processes together, `count` those of this one. `load` runs in threads; at most `ahead` rows
    wait for their batch (`read_ahead`).
    """

    def __init__(
        self,
        order: Order,
        load: Callable[[Any], Any],
        collate: Callable[[Iterator[Any], int], Any],
        size: int,
        *,
        same: Mapping[str, int],
        process_index: int = 0,
        process_count: int = 1,
        threads: int = 16,
        ahead: int = 32,
    ):
        """`same`: numbers that determine the order, such as a seed; `set_state` refuses a state in which they differ."""
        self.order = order
        self.keys = ProcessRows(order, size, process_index, process_count)
        self.own = size // process_count
        self.load, self.collate = load, collate
        self.same = {"size": size, **same}
        self.reading = {"threads": threads, "ahead": ahead}
        self.position = 0  # batches read
        self.iterator = None

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Any:
        if self.iterator is None:
            self.iterator = read_ahead(self.keys, self.load, start=self.position * self.own, **self.reading)
        batch = self.collate(itertools.islice(self.iterator, self.own), self.own)
        self.position += 1
        return batch

    def close(self) -> None:
        """Ends the threads; the next batch starts new ones."""
        if self.iterator is not None:
            self.iterator.close()
        self.iterator = None

    def get_state(self) -> dict[str, int]:
        """Returns the number of batches read, and the numbers that determine the order."""
        return {"position": self.position, **self.same}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Resumes at a state of `get_state`. ValueError: the state belongs to another order."""
        for name, value in self.same.items():
            if state.get(name) != value:
                raise ValueError(f"the checkpoint was made with {state.get(name)} for {name}, now it is {value}")
        self.close()
        self.position = check_position(state.get("position"))


class MemoryBatches(Batches):
    """Endless batches of `size` rows that are in memory, in a new order every epoch (`ShuffledRows`)."""

    def __init__(self, rows: Any, size: int, seed: int, *, process_index: int = 0, process_count: int = 1):
        """`rows`: a tree of arrays [n, ...]."""
        rows = jax.tree.map(np.asarray, rows)
        count = len(jax.tree.leaves(rows)[0])
        super().__init__(
            ShuffledRows(count, seed),
            lambda i: jax.tree.map(lambda x: x[i : i + 1], rows),
            stack,
            size,
            same={"rows": count, "seed": seed},
            process_index=process_index,
            process_count=process_count,
        )
