"""The protocol by which requests use a model: its examples, their arrays, its loss, and how it was trained."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from jax.sharding import Mesh

from pixel_jax.config import ConfigError
from pixel_jax.files import write_file
from pixel_jax.identity import changes, flatten
from pixel_jax.parallel.processes import is_main_process
from pixel_jax.state_files import read_note, to_json
from unlearn_jax.arrays import Params
from unlearn_jax.config import ErasureConfig
from unlearn_jax.limits import LimitKind
from unlearn_jax.loss import Loss
from unlearn_jax.requests.log import ADAPTER, LOG, sha256
from unlearn_jax.requests.request import EditRequestError, Request
from unlearn_jax.requests.state import Items, content_hash

Item = TypeVar("Item")
RECORD, SETTINGS = "trained.json", "config.json"


@dataclasses.dataclass(frozen=True)
class RequestsConfig:
    """Which edits are accepted. An edit that meets another limit is not applied; the training is repeated instead."""

    # Limits (`unlearn_jax.limits.LimitKind`) that an edit may meet.
    allow: tuple[LimitKind, ...] = ("unconverged", "solver", "shortened", "negative_curvature", "finish", "budget")


class Retrained(NamedTuple):
    """The result of the exact replay of a training."""

    adapter: Params
    gradients: float  # example-gradients spent
    since: str  # the point of the training at which the replay began, in words


class Description(NamedTuple):
    """An example as a page shows it."""

    texts: dict[str, str]  # heading: text
    pictures: Sequence[np.ndarray]  # uint8 [h, w, 3]


class RequestTask(Protocol[Item]):
    """A base model with an adapter, in the directory of a run."""

    @property
    def directory(self) -> pathlib.Path:
        """The directory of the run's files; `adapter.safetensors` is the trained adapter, before any request."""
        ...

    @property
    def loss(self) -> Loss:
        """The loss of an example as a function of the adapter."""
        ...

    @property
    def erasure(self) -> ErasureConfig:
        """How an edit is computed; reduction and weight decay are those of the training."""
        ...

    @property
    def requests(self) -> RequestsConfig:
        """Which edits are accepted."""
        ...

    @property
    def mesh(self) -> Mesh | None:
        """The devices that examples are spread over."""
        ...

    def settings(self) -> dict[str, Any]:
        """All settings, as JSON."""
        ...

    def items(self) -> dict[str, Item]:
        """The examples that the adapter was trained on, by id, in the order of training."""
        ...

    def change(self, item: Item, request: Request) -> Item:
        """Applies a request to an example and returns the new example.

        Raises:
            EditRequestError: the request does not fit the example.
        """
        ...

    def encode(self, items: Items[Item]) -> dict[str, Any]:
        """Converts examples to arrays with a leading axis, padded to one shape, and the field `id`."""
        ...

    def neighbours(self, names: Sequence[str], forgotten: Sequence[str]) -> list[bool]:
        """Says of each example whether it resembles the forgotten ones, so that an edit may disturb it most."""
        ...

    def describe(self, item: Item) -> Description:
        """The example as a page shows it."""
        ...

    def load(self, path: pathlib.Path) -> Params:
        """Reads an adapter of this model."""
        ...

    def save(self, path: pathlib.Path, adapter: Params) -> None:
        """Writes an adapter atomically."""
        ...

    def retrain(self, items: Items[Item], weights: np.ndarray) -> Retrained:
        """Repeats the training with the same start, order and keys.

        Args:
            items: in the order of training; of changed examples the new forms, of removed ones any form.
            weights: [n], zero for removed examples, otherwise one.
        """
        ...


def record_training(task: RequestTask, gradient: float) -> None:
    """Writes the training record, against which requests are checked.

    Args:
        task: the task, whose adapter has been saved.
        gradient: norm of the gradient of the training's objective at the adapter.
    """
    if is_main_process():
        data = content_hash(task.items())
        values = {"data": data, "adapter": sha256((task.directory / ADAPTER).read_bytes()), "gradient_norm": gradient}
        write_file(task.directory / RECORD, to_json(values, indent=1) + "\n")


def check_trained(directory: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Raises ConfigError unless the adapter in a directory was trained with these settings."""
    trained = read_note(directory / SETTINGS)
    if trained is None:
        raise ConfigError(f"{directory} holds no adapter: run `unlearn-jax train` with the same --config.out first")
    for name, (old, new) in changes(flatten(trained), flatten(settings)).items():
        raise ConfigError(
            f"config.{name} is {new!r}, the adapter in {directory} was trained with {old!r}: "
            f"give --config.{name} as it was, or train in another --config.out"
        )


def refuse_another_training(directory: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Checks that a training would overwrite nothing but an adapter with the same settings.

    Raises:
        ConfigError: there is an adapter that was trained with other settings.
        EditRequestError: requests have been carried out, which another training would undo.
    """
    if read_note(directory / SETTINGS) is not None:
        check_trained(directory, settings)
    if (directory / LOG).exists():
        raise EditRequestError(f"{directory} has a log of requests: train in another --config.out")


class TrainingRecord(NamedTuple):
    """Hashes of the training examples and the adapter, and the gradient that training left."""

    data: str  # hash of the examples
    adapter: str  # hash of its file
    gradient_norm: float  # of the training's objective where training ended

    @classmethod
    def read(cls, directory: pathlib.Path) -> "TrainingRecord | None":
        """The record of a run; None if there is none."""
        value = read_note(directory / RECORD, _is_record)
        return None if value is None else cls(**value)


def _is_record(value: Any) -> bool:
    kinds = {"data": str, "adapter": str, "gradient_norm": float}
    return isinstance(value, dict) and {name: type(x) for name, x in value.items()} == kinds
