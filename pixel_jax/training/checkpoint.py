"""Checkpoints of everything a run needs to go on as if it had never stopped: Orbax arrays and one JSON document.

A checkpoint appears under its name only when it is complete (Orbax writes elsewhere and renames), so a process may be
killed at any moment. Arrays are stored under the paths of their weights and restored onto whatever mesh is asked for.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, SingleDeviceSharding

from pixel_jax.parallel.sharding import is_variable, shardings, value_of

T = TypeVar("T")
ARRAY = "__array__"  # in the JSON document: stands for the array of this name
EMPTY = "__empty__"  # an array without elements (which Orbax does not store): [dtype, shape]


class CheckpointError(ValueError):
    """A checkpoint that does not fit what it is restored into; the message names the arrays."""


def named_arrays(tree: Any) -> dict[str, Any]:
    """path -> array (or abstract array) of every leaf of `tree`; a weight goes by the path of its variable."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_variable)[0]
    named = ((jax.tree_util.keystr(path, simple=True, separator="."), value_of(leaf)) for path, leaf in leaves)
    return {name: value for name, value in named if value is not None}


def separate(value: Any, arrays: dict[str, np.ndarray], path: str) -> Any:
    """`value` (nested dicts and lists of JSON values and NumPy arrays) with its arrays moved to `arrays`."""
    if isinstance(value, np.ndarray):
        if value.size == 0:
            return {EMPTY: [value.dtype.str, list(value.shape)]}
        arrays[path] = value
        return {ARRAY: path}
    if isinstance(value, Mapping):
        return {key: separate(x, arrays, f"{path}.{key}") for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [separate(x, arrays, f"{path}.{i}") for i, x in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path} holds {value!r}: only JSON values and NumPy arrays can be kept in a checkpoint")


def rejoin(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """The inverse of `separate` (tuples come back as lists)."""
    if isinstance(value, dict):
        if ARRAY in value:
            return np.asarray(arrays[value[ARRAY]])
        if EMPTY in value:
            return np.zeros(value[EMPTY][1], np.dtype(value[EMPTY][0]))
        return {key: rejoin(x, arrays) for key, x in value.items()}
    if isinstance(value, list):
        return [rejoin(x, arrays) for x in value]
    return value


class Checkpoints:
    """The checkpoints of one run, in `directory`; the last `keep` of them stay."""

    def __init__(self, directory: str | os.PathLike, *, keep: int = 2):
        self.directory = pathlib.Path(directory).absolute()
        # Synchronous: on a CPU a snapshot may share memory with the arrays, and the next step is about to donate them.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(self.directory, options=options)

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self.manager.latest_step()

    def save(self, step: int, state: Any, host: Mapping[str, Any] | None = None) -> None:
        """`state`: any pytree of arrays; `host`: nested dicts of JSON values and NumPy arrays (iterators, buffers, seeds)."""
        arrays: dict[str, np.ndarray] = {}
        document = separate(host or {}, arrays, "host")
        named = named_arrays(state)
        leaves = {name: [str(x.dtype), list(x.shape)] for name, x in named.items()}
        items = {
            "state": ocp.args.StandardSave(named),
            "document": ocp.args.JsonSave({"leaves": leaves, "host": document, "arrays": sorted(arrays)}),
        }
        if arrays:
            items["arrays"] = ocp.args.StandardSave(arrays)
        self.manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, like: T, *, mesh: Mesh | None = None, step: int | None = None) -> tuple[T, dict[str, Any]]:
        """(state, host) of the newest checkpoint, or of `step`.

        `like` has the structure, shapes and types (abstract will do); weights are placed on `mesh` by their logical axes.
        """
        step = self.latest if step is None else step
        if step is None:
            raise FileNotFoundError(f"there is no checkpoint in {self.directory}")
        document = self.manager.restore(step, args=ocp.args.Composite(document=ocp.args.JsonRestore())).document
        wanted = {name: [str(x.dtype), list(x.shape)] for name, x in named_arrays(like).items()}
        self._compare(wanted, document["leaves"])
        if mesh is None:
            placed = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), like)
        else:
            placed = shardings(like, mesh)
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, placed)
        items = {"state": ocp.args.StandardRestore(named_arrays(abstract))}
        if document["arrays"]:
            items["arrays"] = ocp.args.StandardRestore()
        found = self.manager.restore(step, args=ocp.args.Composite(**items))
        # Named and flattened in the same order: a weight is one name and one leaf.
        state = jax.tree.unflatten(jax.tree.structure(like), [found.state[name] for name in wanted])
        return state, rejoin(document["host"], found.arrays if document["arrays"] else {})

    def _compare(self, wanted: Mapping[str, Any], have: Mapping[str, Any]) -> None:
        missing, unused = sorted(wanted.keys() - have.keys()), sorted(have.keys() - wanted.keys())
        if missing or unused:
            raise CheckpointError(
                f"{self.directory}: missing from the checkpoint {missing[:4] or 'nothing'} ({len(missing)}), "
                f"in it without a use {unused[:4] or 'nothing'} ({len(unused)})"
            )
        for name, expected in wanted.items():
            if have[name] != expected:
                raise CheckpointError(f"{self.directory}: {name} is {have[name]} in the checkpoint, not {expected}")

    def close(self) -> None:
        self.manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()
