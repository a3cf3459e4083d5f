"""Losses of adapters on the examples of a change: forgotten ones, their neighbours, the others; and tables of measures."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from pixel_jax import terminal
from unlearn_jax.arrays import Params
from unlearn_jax.dataset import Dataset
from unlearn_jax.objective import Objective, element_counts, on_device
from unlearn_jax.requests.state import Change


class Losses:
    """Computes the mean loss per learned token of the examples of a change, by one compiled program for all adapters."""

    def __init__(
        self,
        loss: Callable,
        adapter: Params,
        change: Change,
        *,
        micro_batch: int | None = None,
        mesh: Mesh | None = None,
    ):
        """Takes the arguments of `Objective.of`; of `adapter` only the shapes are used."""
        self.tokens = element_counts(loss, adapter, Dataset.of(change.examples))
        options = {"micro_batch": micro_batch, "mesh": mesh}
        self.objective = on_device(Objective.of(loss, change.examples, np.ones(len(self.tokens)), **options))

    def __call__(self, adapter: Params) -> np.ndarray:
        """The loss of each example, float [n + k], in the order of `Change.examples`."""
        return np.asarray(self.objective.per_example(adapter), float) / self.tokens


def table(rows: Mapping[str, Mapping[str, Any]], corner: str = "") -> str:
    """Formats {row: {column: value}} as text; columns are in the order in which they first appear."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    cells = [(name, *(_cell(row.get(column)) for column in columns)) for name, row in rows.items()]
    return terminal.table_text(terminal.table((corner, *columns), cells))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
