"""`unlearn-jax train`, `erase` and `eval` of a study: its cells, and its table."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jax.sharding import Mesh

from pixel_jax.cli import UserError
from pixel_jax.terminal import say
from unlearn_jax.requests.request import Request
from unlearn_jax.studies.cells import Cell, cells_of, read_cell, run_cells
from unlearn_jax.studies.config import StudyConfig
from unlearn_jax.studies.study import Study
from unlearn_jax.studies.table import Columns, rows_of, text

C = TypeVar("C", bound=StudyConfig)


def refuse_requests(task: str, requests: Sequence[Request] | None, show_content: bool) -> None:
    """Raises UserError if requests are given to a study, which carries out none."""
    if requests is not None or show_content:
        raise UserError(f"config.task={task} carries out no requests: its edits are config.edits and config.shares")


def compute(
    make: Callable[[C], Study], task: str, config: C, methods: Sequence[str] | None, mesh: Mesh | None
) -> list[Cell]:
    """Computes the cells of some methods; None: of all methods.

    Args:
        make: makes the study of a configuration.
        task: its name, for messages.
        config: of the study.
        methods: names of `methods.METHODS`.
        mesh: None.

    Returns:
        The cells.

    Raises:
        UserError: a mesh is given.
    """
    if mesh is not None:
        raise UserError(f"config.task={task} runs on one device: leave --devices out")
    wanted = [cell for cell in cells_of(config) if methods is None or cell.method in methods]
    run_cells(make(config), wanted)
    return wanted


def show(config: StudyConfig, cells: Sequence[Cell], columns: Columns) -> list[dict[str, Any]]:
    """Shows the table of finished cells; returns those of all seeds but the tuning seed."""
    found = [read_cell(config, cell) for cell in cells]
    finished = [cell for cell in found if cell is not None and cell["seed"] != config.tuning_seed]
    say("\n" + text(rows_of(finished, columns), columns) + "\n")
    return finished
