"""Batches for training, read ahead by Grain: an endless order, of which every process takes its part.

What batch k holds follows from the order alone. So the state of a run is the number of batches it has seen; it may go on
with another number of processes, and all processes together see what one would.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import grain
import jax
import numpy as np

from pixel_jax.data.buckets import ENDLESS, check_position

T = TypeVar("T")


class Order(Protocol):
    """What comes at every place of an endless order: the key of one row. A pure function."""

    def __getitem__(self, place: int) -> Any: ...


class Share:
    """The rows of one process, as a sequence for Grain: of every batch of `size` rows the `index`-th of `count` parts."""

    def __init__(self, order: Order, size: int, index: int, count: int):
        if size % count:
            raise ValueError(f"a batch of {size} rows cannot be shared by {count} processes")
        self.order, self.size, self.index, self.own = order, size, index, size // count

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, place: int) -> Any:
        batch, row = divmod(int(place), self.own)
        return self.order[batch * self.size + self.index * self.own + row]


def stack(rows: Iterator[T], count: int, room: Callable[[T], T] = lambda like: like) -> T:
    """`count` rows (trees of arrays with a leading axis of 1) as one tree of arrays.

    `room` may enlarge the shapes, which are those of the first row; the rest of an array is zero. A row is let go as soon
    as it is copied.
    """
    first = next(rows)
    like = room(jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), first))
    stacked = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    for i, row in enumerate(itertools.chain([first], rows)):
        for whole, part in zip(jax.tree.leaves(stacked), jax.tree.leaves(row), strict=True):
            whole[(i, *map(slice, part.shape[1:]))] = part[0]
    return stacked


class Batches:
    """Endless batches `collate(rows, count)`, `rows` being an iterator of `load(key)` for the order's keys.

    `size` are the rows of all processes together, `count` those of this one. `load` runs in threads; at most `ahead` rows
    wait for their batch, so memory is bounded whatever the consumer does.
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
        """`same`: numbers that the order is drawn from; a checkpoint with other ones is refused."""
        self.rows = grain.MapDataset.source(Share(order, size, process_index, process_count)).map(load)
        self.own = size // process_count
        self.collate = collate
        self.same = {"size": size, **same}
        self.reading = grain.ReadOptions(num_threads=min(threads, ahead), prefetch_buffer_size=ahead)
        self.position = 0  # batches seen
        self.iterator = None

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Any:
        if self.iterator is None:
            self.iterator = iter(self.rows[self.position * self.own :].to_iter_dataset(self.reading))
        batch = self.collate(itertools.islice(self.iterator, self.own), self.own)
        self.position += 1
        return batch

    def close(self) -> None:
        """End the threads; the next batch starts new ones."""
        if self.iterator is not None:
            self.iterator.close()
        self.iterator = None

    def get_state(self) -> dict[str, int]:
        return {"position": self.position, **self.same}

    def set_state(self, state: Mapping[str, int]) -> None:
        for name, value in self.same.items():
            if state.get(name) != value:
                raise ValueError(f"the checkpoint was made with {state.get(name)} for {name}, now it is {value}")
        self.close()
        self.position = check_position(state.get("position"))
