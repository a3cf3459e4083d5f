"""The record of what an adapter was trained on, from which the adapter can be edited later.

`pixel-jax sft` and `pixel-jax rl` write it to the directory of the phase when they end, if an adapter is all that they train. It
holds no text and no picture: ids, digests, the order in which examples were seen, and the settings of the run.
"""

import dataclasses
import os
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pixel_jax.data.digests import Digests, digest_adapter, digest_example, digest_sources
from pixel_jax.data.example import Example
from pixel_jax.data.packed import PackedRow
from pixel_jax.files import read_json
from pixel_jax.rollouts.shapes import BatchShape
from pixel_jax.state_files import write_json

FILE = "trained_on.json"
LARGEST = 2**31  # bytes


class RecordError(ValueError):
    """A run without a record, or with one that is damaged. The message names the file and the remedy."""


class TrainedExample(NamedTuple):
    """An example of a run: its name, the digest of its texts, and those of its pictures."""

    name: str
    said: str
    pictures: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The settings, examples and order with which an adapter was trained."""

    command: Literal["sft", "rl"]
    settings: Mapping[str, Any]  # by dotted names, as `run.json` has them, with digests of model and data
    examples: tuple[TrainedExample, ...]
    shapes: tuple[BatchShape, ...]  # of rows
    order: tuple[tuple[PackedRow, ...], ...]  # the rows of each step; a row of `rl` holds one question
    epoch: float  # steps of a pass over the data
    gradient_norm: float  # the largest of a batch's gradient in the last epoch
    adapter: str  # digest of the adapter's files

    def write(self, phase: str | os.PathLike) -> None:
        """Writes the record to the directory of its phase, whole or not at all."""
        values = {
            "command": self.command,
            "settings": dict(self.settings),
            "examples": [list(x) for x in self.examples],
            "shapes": [list(x) for x in self.shapes],
            "order": [[rows[0].bucket, [row.traces for row in rows]] for rows in self.order],
            "epoch": self.epoch,
            "gradient_norm": self.gradient_norm,
            "adapter": self.adapter,
        }
        write_json(pathlib.Path(phase) / FILE, values)

    @classmethod
    def read(cls, phase: str | os.PathLike) -> "RunRecord":
        """Reads the record of a phase.

        Raises:
            RecordError: the phase has no record, or a damaged one.
        """
        path = pathlib.Path(phase) / FILE
        value = read_json(path, limit=LARGEST, error=RecordError)
        try:
            match value:
                case {
                    "command": "sft" | "rl" as command,
                    "settings": dict(settings),
                    "examples": list(examples),
                    "shapes": list(shapes),
                    "order": list(order),
                    "epoch": int() | float() as epoch,
                    "gradient_norm": int() | float() as gradient_norm,
                    "adapter": str(adapter),
                }:
                    record = cls(
                        command,
                        settings,
                        tuple(_example(x) for x in examples),
                        tuple(BatchShape(*x) for x in shapes),
                        tuple(tuple(PackedRow(int(b), tuple(map(int, row))) for row in rows) for b, rows in order),
                        float(epoch),
                        float(gradient_norm),
                        adapter,
                    )
                case _:
                    raise TypeError("a field is missing or of another type")
            record._check()
        except (TypeError, ValueError) as error:
            raise RecordError(f"{path} is not a record of a run ({error}): start the run's command again") from None
        return record

    def _check(self) -> None:
        numbers = {i for rows in self.order for row in rows for i in row.traces}
        if not numbers or not 0 <= min(numbers) <= max(numbers) < len(self.examples):
            raise ValueError(f"the order is of examples that are not among the {len(self.examples)}")
        if not all(0 <= row.bucket < len(self.shapes) for rows in self.order for row in rows):
            raise ValueError(f"the order is of rows in other shapes than the {len(self.shapes)}")

    @property
    def seen(self) -> list[int]:
        """The numbers of the examples that a step has used, in the order of the data."""
        return sorted({i for rows in self.order for row in rows for i in row.traces})

    def first_step(self, wanted: set[int]) -> int:
        """The first step that uses one of these examples; the number of steps if none does."""
        uses = (any(i in wanted for row in rows for i in row.traces) for rows in self.order)
        return next((step for step, used in enumerate(uses) if used), len(self.order))


def _example(value: Any) -> TrainedExample:
    match value:
        case [str(name), str(said), list(pictures)] if all(isinstance(x, str) for x in pictures):
            return TrainedExample(name, said, tuple(pictures))
    raise ValueError("an example is its name, a digest, and those of its pictures")


def record_run(
    phase: pathlib.Path,
    command: Literal["sft", "rl"],
    settings: Mapping[str, Any],
    examples: Sequence[Example],
    shapes: Sequence[BatchShape],
    order: Sequence[Sequence[PackedRow]],
    *,
    epoch: float,
    metrics: Sequence[Mapping[str, Any]],
    adapter: pathlib.Path,
    digests: Digests,
) -> RunRecord:
    """Writes the record of a run that has ended.

    Args:
        phase: the directory of the phase.
        command: the command of the run.
        settings: the settings of the run, by dotted names (`pixel_jax.identity.read_settings`).
        examples: the examples of training, in the order that numbers them.
        shapes: the shapes of rows.
        order: the rows of each step.
        epoch: steps of a pass over the data.
        metrics: the metrics of all steps.
        adapter: the directory of the trained adapter.
        digests: the cache of digests of files.

    Returns:
        The record.
    """
    last = [x["grad_norm"] for x in metrics[-max(1, round(epoch)) :] if isinstance(x.get("grad_norm"), float)]
    pictures = digest_sources([x.images for x in examples], digests)
    text_digests = [digest_example(x) for x in examples]
    record = RunRecord(
        command=command,
        settings=settings,
        examples=tuple(map(TrainedExample, distinct([x.id for x in examples]), text_digests, map(tuple, pictures))),
        shapes=tuple(shapes),
        order=tuple(map(tuple, order)),
        epoch=epoch,
        gradient_norm=max(last, default=0.0),
        adapter=digest_adapter(adapter, digests)["adapter_weights"],
    )
    record.write(phase)
    return record


def distinct(ids: Sequence[str]) -> list[str]:
    """Makes ids distinct: the second of equal ones gets "#2" at its end, and so on."""
    taken, counts, names = set(ids), Counter[str](), []
    for name in ids:
        counts[name] += 1
        new = name
        while counts[name] > 1 and (new := f"{name}#{counts[name]}") in taken:
            counts[name] += 1
        taken.add(new)
        names.append(new)
    return names
