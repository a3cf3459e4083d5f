"""`unlearn-jax train`, `erase` and `eval` of a study: its cells, and its table."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic

from jax.sharding import Mesh

from pixel_jax.cli import UserError
from pixel_jax.terminal import say
from unlearn_jax.requests.request import Request
from unlearn_jax.studies.cells import Cell, cells_of, read_cell, run_cells
from unlearn_jax.studies.methods import REFERENCES
from unlearn_jax.studies.study import C, Study
from unlearn_jax.studies.table import Columns, rows_of, text


@dataclasses.dataclass(frozen=True)
class StudyCommands(Generic[C]):
    """The commands of a kind of studies. None of them computes a finished cell again, so that an interrupted one continues."""

    make: Callable[[C], Study[C]]  # the study of a configuration
    columns: Columns  # of the table

    def train(self, config: C, mesh: Mesh | None = None) -> list[Cell]:
        """Computes the cells of the trained adapters and of retraining, and returns them."""
        return self._compute(config, REFERENCES, mesh)

    def edit(
        self,
        config: C,
        requests: Sequence[Request] | None = None,
        mesh: Mesh | None = None,
        *,
        show_content: bool = False,
    ) -> list[Cell]:
        """Computes the cells of `erase`, trains the adapters that they need, and returns the cells.

        Raises:
            UserError: requests are given, which a study does not carry out.
        """
        if requests is not None or show_content:
            raise UserError(
                f"config.task={config.task} carries out no requests: its edits are config.edits and config.shares"
            )
        return self._compute(config, ("erase",), mesh)

    def evaluate(self, config: C, mesh: Mesh | None = None) -> list[dict[str, Any]]:
        """Computes all cells, shows the table, and returns the finished cells of all seeds but the tuning seed."""
        cells = [read_cell(config, cell) for cell in self._compute(config, None, mesh)]
        finished = [cell for cell in cells if cell is not None and cell["seed"] != config.tuning_seed]
        say("\n" + text(rows_of(finished, self.columns), self.columns) + "\n")
        return finished

    def _compute(self, config: C, methods: Sequence[str] | None, mesh: Mesh | None) -> list[Cell]:
        """Computes the cells of some methods, or with None of all; raises UserError if a mesh is given."""
        if mesh is not None:
            raise UserError(f"config.task={config.task} runs on one device: leave --devices out")
        wanted = [cell for cell in cells_of(config) if methods is None or cell.method in methods]
        run_cells(self.make(config), wanted)
        return wanted
