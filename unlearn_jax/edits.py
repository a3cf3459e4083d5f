"""Edits: changes of the training data, as it should have been. They name examples by id; `apply` returns the edited dataset.

    Remove([3, 7])                                      without these examples
    ModifyQuery([4], {"tokens": new})                   another question, the same answer
    CorrectResponse([5], {"tokens": new, "labels": y})  another answer
    MaskTokens([6], [[False, True, True]])              without loss on these elements

New examples are a batch with a leading axis (or a list of examples) in the order of the ids; fields left out stay as they
were. A replacement equal to what it replaces changes nothing, and neither does an edit without ids.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from unlearn_jax.arrays import Example
from unlearn_jax.dataset import ID, Dataset
from unlearn_jax.loss import MASK, Loss, has_field


@dataclasses.dataclass(frozen=True, eq=False)
class Edit(abc.ABC):
    """An edit of the examples with certain ids."""

    ids: Sequence[Any] | np.ndarray

    def __post_init__(self):
        if isinstance(self.ids, str | bytes) or np.ndim(self.ids) != 1:
            raise ValueError(f"{type(self).__name__} takes a sequence of ids, not {self.ids!r}")
        if len(self.ids) and all(isinstance(x, bool | np.bool_) for x in self.ids):
            raise ValueError(
                f"{type(self).__name__} takes ids, not a mask of {len(self.ids)} true and false: np.flatnonzero(mask) are the "
                f"ids of examples that are named by their row, ids[mask] those of others"
            )

    @abc.abstractmethod
    def replacements(self, dataset: Dataset, positions: np.ndarray, loss: Any) -> list[Example] | None:
        """The new examples, in the order of the ids; None: the old ones are removed."""


@dataclasses.dataclass(frozen=True, eq=False)
class Remove(Edit):
    """Removes examples, as if they had never been trained on."""

    def replacements(self, dataset: Dataset, positions: np.ndarray, loss: Any) -> None:
        """None: the examples are removed."""
        return None


@dataclasses.dataclass(frozen=True, eq=False)
class CorrectResponse(Edit):
    """Replaces answers: the targets, and with them the inputs of later elements (teacher forcing)."""

    examples: Example | list[Example]

    def replacements(self, dataset: Dataset, positions: np.ndarray, loss: Any) -> list[Example]:
        """See `Edit.replacements`."""
        name = type(self).__name__
        if not len(positions):
            return []
        new = Dataset.of(self.examples)
        if len(new) != len(positions):
            raise ValueError(f"{name} has {len(positions)} ids and {len(new)} examples")
        named = has_field(self.examples, ID) or (
            isinstance(self.examples, list) and any(has_field(example, ID) for example in self.examples)
        )
        if named and new.ids.tolist() != dataset.ids[positions].tolist():
            raise ValueError(f"{name} is about {dataset.ids[positions].tolist()}; its examples are {new.ids.tolist()}")
        merged = []
        for index, position in enumerate(positions):
            where = f"{name} of example {dataset.ids[position].item()!r}"
            merged.append(_merge(dataset.example(position), new.example(index), where))
        return merged


@dataclasses.dataclass(frozen=True, eq=False)
class ModifyQuery(CorrectResponse):
    """Replaces questions. The labels that carry loss must be the same and in the same order, at any positions."""

    def replacements(self, dataset: Dataset, positions: np.ndarray, loss: Any) -> list[Example]:
        """See `Edit.replacements`."""
        merged = super().replacements(dataset, positions, loss)
        field = getattr(loss.criterion, "labels", None) if isinstance(loss, Loss) else None
        for position, example in zip(positions, merged, strict=True):
            if field is None or not has_field(example, field):
                continue
            before, after = (_counted_labels(loss, field, x) for x in (dataset.example(position), example))
            if not np.array_equal(before, after):
                raise ValueError(
                    f"ModifyQuery of example {dataset.ids[position].item()!r} changes the labels that carry loss from "
                    f"{before} to {after}; CorrectResponse does that"
                )
        return merged


@dataclasses.dataclass(frozen=True, eq=False)
class MaskTokens(Edit):
    """Takes the loss off single elements, which stay in the context of the others. The loss must be a `Loss` with a mask."""

    masks: Any  # bool [k, elements], true where an element should not have counted
    renormalize: bool = True  # divide the rest by the number of remaining elements; otherwise by the number before

    def replacements(self, dataset: Dataset, positions: np.ndarray, loss: Any) -> list[Example]:
        """See `Edit.replacements`."""
        masks = [np.asarray(mask) for mask in self.masks]
        if len(masks) != len(positions):
            raise ValueError(f"MaskTokens has {len(positions)} ids and {len(masks)} masks")
        field = mask_field(loss)
        new = []
        for position, mask in zip(positions, masks, strict=True):
            example, where = dataset.example(position), f"MaskTokens of example {dataset.ids[position].item()!r}"
            if not has_field(example, field):
                raise ValueError(f"{where}: the example has no field {field!r} to be masked in")
            if mask.shape != example[field].shape or not np.isin(mask, (0, 1)).all():
                raise ValueError(
                    f"{where}: a mask is true or false, {example[field].shape} like {field!r}; it is {mask.dtype} "
                    f"{mask.shape}, {mask.min():g} to {mask.max():g}"
                )
            mask = mask.astype(bool)
            if not (mask & (example[field] != 0)).any():
                raise ValueError(f"{where} marks no element that carries loss")
            remaining = np.where(mask, np.zeros_like(example[field]), example[field])
            if self.renormalize and not remaining.any():
                raise ValueError(f"{where} leaves no element that carries loss; Remove takes the whole example out")
            new.append({**example, field: remaining})
        return new


def apply(dataset: Any, edits: Sequence[Edit], loss: Any = None) -> Dataset:
    """The dataset as it should have been.

    Args:
        dataset: a `Dataset`, or what `Dataset.of` takes, such as a dictionary of arrays.
        edits: a list, each example in at most one of them.
        loss: says which elements carry loss; needed where an edit depends on them, and must be a `Loss` then.

    Returns:
        A dataset of the same source; `dataset` is not changed.

    Raises:
        ValueError: an unknown id, an example that is edited twice, a replacement that does not fit, nothing left.
        TypeError: an element of `edits` is not an edit.
    """
    dataset = Dataset.of(dataset)
    for edit in [edits] if isinstance(edits, Edit) else edits:
        if not isinstance(edit, Edit):
            raise TypeError(f"an edit is Remove, ModifyQuery, CorrectResponse or MaskTokens, not {edit!r}")
    if isinstance(edits, Edit):
        raise TypeError(f"edits are a list: [{type(edits).__name__}(...)]")
    seen: dict[Any, str] = {}
    removed: list[int] = []
    replaced, normalizers = dict(dataset.replaced), dict(dataset.normalizers)
    for edit in edits:
        kind = type(edit).__name__
        positions = dataset.positions(edit.ids)
        for name in dataset.ids[positions].tolist():
            if name in seen:
                raise ValueError(f"example {name!r} is edited twice, by {seen[name]} and by {kind}: make it one edit")
            seen[name] = kind
        replacements = edit.replacements(dataset, positions, loss)
        if replacements is None:
            removed.extend(positions.tolist())
            continue
        for position, example in zip(positions, replacements, strict=True):
            row, old = int(dataset.rows[position]), dataset.example(position)
            if isinstance(edit, MaskTokens) and not edit.renormalize:
                normalizers.setdefault(row, float(np.sum(old[mask_field(loss)])))
            elif not _same(old, example):
                normalizers.pop(row, None)
            if not _same(old, example):
                replaced[row] = example
    keep = np.setdiff1d(np.arange(len(dataset)), removed)
    if not len(keep):
        raise ValueError(f"the edits remove all {len(dataset)} examples")
    return dataclasses.replace(dataset.select(keep), replaced=replaced, normalizers=normalizers)


def affected(before: Dataset, after: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions (in `before`, in `after`) of the examples that differ, and positions in `before` of those that are equal."""
    if before.source is not after.source:
        raise ValueError("the two datasets do not come from the same source")

    def alike(row):
        same_example = before.replaced.get(row) is after.replaced.get(row)
        return same_example and before.normalizers.get(row) == after.normalizers.get(row)

    shared = np.intersect1d(before.rows, after.rows)
    touched = before.replaced.keys() | after.replaced.keys() | before.normalizers.keys() | after.normalizers.keys()
    kept = np.setdiff1d(shared, [row for row in shared.tolist() if row in touched and not alike(row)])
    alike_before, alike_after = np.isin(before.rows, kept), np.isin(after.rows, kept)
    return np.flatnonzero(~alike_before), np.flatnonzero(~alike_after), np.flatnonzero(alike_before)


def mask_field(loss: Any) -> str:
    """The field that weights the elements of `loss`."""
    if not isinstance(loss, Loss) or loss.mask is None:
        raise ValueError(
            f"MaskTokens needs to know which field weights the elements: unlearn_jax.Loss(outputs, criterion, "
            f"mask={MASK!r}), not {loss!r}"
        )
    return loss.mask


def _counted_labels(loss: Loss, field: str, example: Example) -> np.ndarray:
    labels, mask = np.asarray(example[field]), loss.element_mask(example)
    return labels.reshape(-1) if mask is None else labels[np.asarray(mask) != 0]


def _merge(old: Example, new: Example, where: str) -> Example:
    """`old` with the fields that `new` has."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        unknown = sorted(new.keys() - old.keys())
        if unknown:
            raise ValueError(f"{where}: there is no field {unknown[0]!r}; the fields are {', '.join(sorted(old))}")
        new = {**old, **new}
    if jax.tree.structure(old) != jax.tree.structure(new):
        raise ValueError(f"{where} has the structure {jax.tree.structure(new)}, not {jax.tree.structure(old)}")

    def fit(path, a, b):
        if np.shape(a) != np.shape(b) or not np.can_cast(b.dtype, a.dtype, "same_kind"):
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"{where}: the field {name} is {a.dtype} {np.shape(a)}, its replacement {b.dtype} {np.shape(b)}"
            )
        return np.asarray(b, a.dtype)

    return jax.tree_util.tree_map_with_path(fit, old, new)


def _same(a: Example, b: Example) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
