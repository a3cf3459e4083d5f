"""The training examples after some requests, and the edits that lead to them."""

import dataclasses
import difflib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from unlearn_jax.arrays import Example
from unlearn_jax.dataset import ID, Dataset
from unlearn_jax.edits import CorrectResponse, Edit, MaskTokens, ModifyQuery, Remove
from unlearn_jax.loss import MASK
from unlearn_jax.requests.request import EditRequestError, Request

Item = TypeVar("Item")
Items = Mapping[str, Item]  # by id, in the order of training


def apply_request(
    items: Items[Item], request: Request, first: Items[Item], change: Callable[[Item, Request], Item]
) -> dict[str, Item]:
    """The examples after a request.

    Args:
        items: the examples before it.
        request: the request.
        first: the examples that the adapter was trained on, before any request.
        change: (example, request) -> the changed example, for requests that remove nothing.

    Returns:
        The remaining examples, in their order; equal to `items` where earlier requests had the same effect.

    Raises:
        EditRequestError: an unknown id, a change of an example that an earlier request removed, or a change that does not fit
            the example.
    """
    for name in request.ids:
        if name not in first:
            near = difflib.get_close_matches(name, first, n=1)
            known = f"did you mean {near[0]!r}" if near else f"ids are like {next(iter(first))!r}"
            raise EditRequestError(f"no training example has the id {name!r}: {known}? There are {len(first)}")
        if name not in items and request.kind != "remove":
            raise EditRequestError(
                f"{name!r} was removed by an earlier request, which this one contradicts: it has no {request.kind} to change"
            )
    if request.kind == "remove":
        return {name: item for name, item in items.items() if name not in request.ids}
    return {name: change(item, request) if name in request.ids else item for name, item in items.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Change:
    """The examples before and after requests, as arrays. The old and the new form of an example have the same shape."""

    dataset: Dataset  # before the requests, n examples
    edits: list[Edit]
    examples: Example  # the n examples in their old forms, then k new forms: fields [n + k, ...], without ids
    removed: np.ndarray  # int [m], positions in `examples` of the removed examples
    old: np.ndarray  # int [k], positions of the old forms of changed examples
    new: np.ndarray  # int [k], positions of their new forms
    kept: np.ndarray  # int [n - m - k], positions of unchanged examples

    @property
    def forgotten(self) -> np.ndarray:
        """Positions of the removed examples and of the old forms, which are to be forgotten, int [m + k]."""
        return np.concatenate([self.removed, self.old])

    def groups(self, neighbours: Sequence[bool] | np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Positions by group (forgotten, neighbours, kept, ...); empty groups are left out.

        Args:
            neighbours: bool [n], the examples that resemble the forgotten ones most; they are a separate group.
        """
        near = np.zeros(len(self.dataset), bool) if neighbours is None else np.asarray(neighbours)
        groups = {
            "removed": self.removed,
            "old form": self.old,
            "new form": self.new,
            "neighbours": self.kept[near[self.kept]],
            "kept": self.kept[~near[self.kept]],
        }
        return {name: index for name, index in groups.items() if len(index)}

    @classmethod
    def of(
        cls, before: Items[Item], after: Items[Item], encode: Callable[[Items[Item]], dict[str, Any]], kind: str
    ) -> "Change":
        """Finds the edits that lead from `before` to `after`.

        Args:
            before: the examples, by id.
            after: the remaining ones, unchanged or in a new form.
            encode: converts examples to arrays with a leading axis and the field `id`.
            kind: of the request, which says what a new form may change.
        """
        names = list(before)
        removed = [name for name in names if name not in after]
        changed = [name for name in names if name in after and not same_item(before[name], after[name])]
        new = {f"{name} as it should have been": after[name] for name in changed}
        both = {field: x for field, x in encode({**before, **new}).items() if field != ID}
        pick = lambda index: jax.tree.map(lambda x: x[index], both)
        position = {name: i for i, name in enumerate(names)}
        positions_of = lambda chosen: np.array([position[name] for name in chosen], int)
        count = len(names)
        forms = np.arange(count, count + len(changed))
        edits: list[Edit] = [Remove(removed)] if removed else []
        if changed:
            edits.append(_replacement(kind, changed, pick(positions_of(changed)), pick(forms)))
        kept = np.setdiff1d(np.arange(count), positions_of([*removed, *changed]))
        dataset = Dataset.of({**pick(slice(count)), ID: np.array(names)})
        return cls(dataset, edits, both, positions_of(removed), positions_of(changed), forms, kept)


def _replacement(kind: str, names: list[str], old: Example, new: Example) -> Edit:
    if kind == "mask":
        return MaskTokens(names, (np.asarray(old[MASK]) != 0) & (np.asarray(new[MASK]) == 0))
    return (ModifyQuery if kind in ("question", "image") else CorrectResponse)(names, new)


def same_item(one: Any, two: Any) -> bool:
    """Whether two examples have the same content."""
    return one is two or content_hash(one) == content_hash(two)


def content_hash(value: Any) -> str:
    """SHA-256 of texts, numbers and arrays in tuples, lists, mappings and dataclasses: what an example is, hexadecimal.

    Raises:
        TypeError: a value of another type.
    """
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    """Adds a value to a digest, preceded by its type and length, so that different values add different bytes."""
    if isinstance(value, np.ndarray | jax.Array):
        value = np.asarray(value)
        digest.update(f"array {value.dtype.str} {value.shape} ".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, str | bytes):
        data = value.encode() if isinstance(value, str) else value
        digest.update(f"{type(value).__name__} {len(data)} ".encode() + data)
    elif value is None or isinstance(value, bool | int | float):
        digest.update(f"{type(value).__name__} {value!r} ".encode())
    elif isinstance(value, Mapping):
        digest.update(f"mapping {len(value)} ".encode())
        for key, x in value.items():
            _feed(digest, key)
            _feed(digest, x)
    elif isinstance(value, tuple | list):
        digest.update(f"sequence {len(value)} ".encode())
        for x in value:
            _feed(digest, x)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _feed(digest, {field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    else:
        raise TypeError(f"an example holds {type(value).__name__}, which has no hash")
