"""Examples with ids, on the host, read when they are needed.

A dictionary (or another pytree) of arrays with a leading example axis is a dataset; so is anything with `len` and integer
`[...]` that returns examples, such as a Grain source. Examples are named by their field "id", or else by their row number;
the loss does not see that field. A `Dataset` is never changed: an edited one refers to the same source.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from unlearn_jax.arrays import Example
from unlearn_jax.loss import has_field

ID = "id"
MOST = 2**40  # examples; a longer source repeats endlessly


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """n examples of a source: some may be left out, replaced, or divided by another number of elements than they have."""

    source: "_Arrays | _Examples"
    rows: np.ndarray  # int [n], where in the source each example lies
    ids: np.ndarray  # [n]
    weights: np.ndarray  # float64 [n], how much each example counts in the objective
    replaced: Mapping[int, Example] = dataclasses.field(default_factory=dict)  # by row
    normalizers: Mapping[int, float] = dataclasses.field(default_factory=dict)  # by row; others: their own elements

    @classmethod
    def of(cls, data: Any, weights: np.ndarray | None = None) -> "Dataset":
        """Makes a dataset of any form of data that `erase` takes.

        Args:
            data: a pytree of arrays with a leading example axis, a sequence of examples, or a `Dataset`.
            weights: [n], how much each example counts; None: all the same.

        Raises:
            ValueError: no examples, fields of different lengths, two examples with the same id, invalid weights.
        """
        if isinstance(data, Dataset):
            if weights is not None:
                raise ValueError("the dataset has weights already")
            return data
        source = _Arrays(data) if _is_tree_of_arrays(data) else _Examples(data)
        count = len(source)
        weights = np.ones(count) if weights is None else np.asarray(weights, np.float64)
        if weights.shape != (count,):
            raise ValueError(f"weights of shape {weights.shape} for {count} examples")
        if not (np.all(np.isfinite(weights) & (weights >= 0)) and weights.any()):
            raise ValueError(f"weights must be finite, not negative and not all zero; they are {weights}")
        ids = source.ids()
        ids = np.arange(count) if ids is None else np.asarray(ids)
        if ids.shape != (count,):
            raise ValueError(f"the field {ID!r} has shape {ids.shape} for {count} examples")
        if len(set(ids.tolist())) < count:
            values, counts = np.unique(ids, return_counts=True)
            raise ValueError(f"two examples have the id {values[counts > 1][0].item()!r}")
        return cls(source, np.arange(count), ids, weights)

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def _position(self) -> dict[Any, int]:
        return {name: position for position, name in enumerate(self.ids.tolist())}

    def positions(self, ids: Sequence[Any]) -> np.ndarray:
        """Where the examples called `ids` are, int [k]."""
        indices = []
        for name in ids:
            name = name.item() if hasattr(name, "item") else name
            if name not in self._position:
                shown = ", ".join(repr(x) for x in self.ids[:3].tolist()) + (", ..." if len(self) > 3 else "")
                raise ValueError(f"no example has the id {name!r}; the {len(self)} ids are {shown}")
            indices.append(self._position[name])
        return np.array(indices, int)

    def take(self, positions: Sequence[int] | np.ndarray | None = None) -> Example:
        """The examples at `positions` (all of them without), each field NumPy [k, ...]."""
        rows = self.rows if positions is None else self.rows[np.asarray(positions, int)]
        batch = self.source.take(rows)
        replacements = [(index, self.replaced[row]) for index, row in enumerate(rows.tolist()) if row in self.replaced]
        if not replacements:
            return batch
        leaves, structure = jax.tree.flatten(batch)
        for index, example in replacements:
            for leaf, new in zip(leaves, structure.flatten_up_to(example), strict=True):
                leaf[index] = new
        return structure.unflatten(leaves)

    def select(self, positions: Sequence[int] | np.ndarray) -> "Dataset":
        """The dataset of the examples at `positions` alone."""
        positions = np.asarray(positions, int)
        return dataclasses.replace(
            self, rows=self.rows[positions], ids=self.ids[positions], weights=self.weights[positions]
        )

    def example(self, position: int) -> Example:
        """One example, without the leading axis."""
        return jax.tree.map(lambda x: x[0], self.take([position]))


class _Arrays:
    """A pytree of arrays [n, ...]."""

    def __init__(self, data: Example):
        self._ids = np.asarray(data[ID]) if has_field(data, ID) else None
        data = {name: x for name, x in data.items() if name != ID} if has_field(data, ID) else data
        _check_fields(data, "the dataset")
        self.data = jax.tree.map(np.asarray, data)
        leaves = jax.tree_util.tree_leaves_with_path(self.data)
        if not leaves:
            raise ValueError("a dataset needs at least one array besides the ids")
        counts = []
        for path, leaf in leaves:
            name = jax.tree_util.keystr(path)
            if leaf.ndim == 0:
                raise ValueError(f"the field {name} has no leading axis of examples; it is {leaf!r}")
            counts.append(len(leaf))
            if counts[-1] != counts[0]:
                first = jax.tree_util.keystr(leaves[0][0])
                raise ValueError(f"the field {name} has {len(leaf)} examples, the field {first} has {counts[0]}")
        self.count = counts[0]

    def __len__(self) -> int:
        return self.count

    def ids(self) -> np.ndarray | None:
        return self._ids

    def take(self, rows: np.ndarray) -> Example:
        return jax.tree.map(lambda x: x[rows], self.data)


class _Examples:
    """Anything with a length that returns example i for [i]."""

    def __init__(self, data: Any):
        if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise ValueError(
                f"a dataset is a dictionary of arrays or has a length and integer indexing, like a Grain source; "
                f"{type(data).__name__} has not"
            )
        if len(data) > MOST:
            raise ValueError(
                f"the source says it has {len(data)} examples: it repeats without an end (as Grain's `.repeat()`), and an edit "
                f"looks at every example once; give the source without the repetition"
            )
        self.data = data
        for row in sorted({0, len(data) - 1}) if len(data) else ():
            once, again = self.data[row], self.data[row]
            _check_fields(once, f"example {row}")
            if not _alike(once, again):
                raise ValueError(
                    f"example {row} is another one at every read: what an edit is to take back must be what was trained on; "
                    f"turn augmentation off, or store its outcome in the examples"
                )

    def __len__(self) -> int:
        return len(self.data)

    def ids(self) -> list[Any] | None:
        if not len(self) or not has_field(self.data[0], ID):
            return None
        return [np.asarray(self.data[row][ID]).item() for row in range(len(self))]

    def take(self, rows: np.ndarray) -> Example:
        if not len(rows):
            return jax.tree.map(lambda x: x[:0], self.take(np.zeros(1, int)))
        examples = [self.data[int(row)] for row in rows]
        examples = [{k: v for k, v in x.items() if k != ID} if has_field(x, ID) else x for x in examples]
        leaves = [jax.tree_util.tree_leaves_with_path(x) for x in examples]
        stacked = []
        for row, example in zip(rows, leaves, strict=True):
            shape = lambda pairs: [(jax.tree_util.keystr(path), np.shape(leaf)) for path, leaf in pairs]
            if shape(example) != shape(leaves[0]):
                raise ValueError(
                    f"example {row} has the fields {shape(example)}, example {rows[0]} has {shape(leaves[0])}: pad them"
                )
        for pairs in zip(*leaves, strict=True):
            stacked.append(np.stack([np.asarray(leaf) for _, leaf in pairs]))
        return jax.tree.unflatten(jax.tree.structure(examples[0]), stacked)


def _check_fields(data: Any, where: str) -> None:
    """Checks that fields are arrays of numbers, in containers other than lists: to JAX a list is a container of its elements."""
    for name, field in data.items() if isinstance(data, Mapping) else ():
        if name == ID:
            continue
        if isinstance(field, Mapping):
            _check_fields(field, f"{name!r} of {where}")
        if isinstance(field, list):
            raise ValueError(
                f"the field {name!r} of {where} is a list: make it an array (np.asarray; with_format('numpy') of a Hugging Face "
                f"dataset), padded to one length"
            )
        text = isinstance(field, str | bytes)
        if text or (isinstance(field, np.ndarray | np.generic) and field.dtype.kind in "USO"):
            kind = type(field).__name__ if text else field.dtype
            raise ValueError(
                f"the field {name!r} of {where} holds {kind}, not numbers, which no loss can read: leave it out"
            )


def _alike(a: Example, b: Example) -> bool:
    one, two = jax.tree.leaves(a), jax.tree.leaves(b)

    def same(x, y):
        return np.array_equal(x, y) or np.array_equal(x, y, equal_nan=np.asarray(x).dtype.kind in "fc")

    return len(one) == len(two) and all(map(same, one, two))


def _is_tree_of_arrays(data: Any) -> bool:
    """Whether data is a pytree of arrays. A list is a sequence of examples, and an object that is no container is a source."""
    if isinstance(data, list) or hasattr(data, "__next__"):
        return False
    return isinstance(data, Mapping) or all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(data))
