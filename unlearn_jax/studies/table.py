"""The table of a study: means over seeds with their intervals, and the paper's numbers with their standard errors."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pixel_jax.evaluation.stats import over_seeds

# Of all studies; each has scores of its own before them.
FORGETTING = {
    "kl_forget": "KL forgotten",
    "kl_kept": "KL kept",
    "kl_right": "KL corrected",
    "loss_forget": "loss forgotten",
    "loss_kept": "loss kept",
    "auc_member": "membership AUC",
    "epochs": "epochs of gradients",
}
Columns = Mapping[str, str]  # name of a number in a cell -> heading


class TableRow(NamedTuple):
    """A row of the table: a method on an edit and a share."""

    edit: str
    share: float
    method: str
    seeds: list[int]
    diverged: int  # number of seeds on which the method diverged
    values: dict[str, dict[str, float]]  # by column: mean, low, high, n
    errors: dict[str, float]  # by column: the mean standard error over test rows


class Reported(NamedTuple):
    """A number of arXiv:2412.00383, on other data and another model."""

    task: str
    metric: str
    method: str
    value: float
    right: int | None  # right answers of `valid` ones whose ratio is `value`; None: the value is not a ratio
    valid: int | None

    @property
    def error(self) -> float | None:
        """Binomial standard error; None where the test set is not known."""
        return None if self.valid is None else math.sqrt(self.value * (1 - self.value) / self.valid)


def rows_of(cells: Iterable[dict[str, Any]], columns: Columns) -> list[TableRow]:
    """Summarises finished cells as rows of the table, in the order of the cells; `columns` are the numbers to summarise."""
    grouped: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for cell in cells:
        if cell["rate"] is None:
            grouped.setdefault((cell["edit"], cell["share"], cell["method"]), []).append(cell)
    table_rows = []
    for (edit, share, method), cells_of_row in grouped.items():
        rows = [cell["row"] for cell in cells_of_row if not cell["row"].get("diverged")]
        column = lambda name, rows=rows: [row[name] for row in rows if row.get(name) is not None]
        values = {name: over_seeds(column(name)) for name in columns if column(name)}
        mean = lambda x: sum(x) / len(x)
        errors = {name: mean(column(f"{name}_error")) for name in columns if column(f"{name}_error")}
        seeds = sorted(cell["seed"] for cell in cells_of_row)
        table_rows.append(TableRow(edit, share, method, seeds, len(cells_of_row) - len(rows), values, errors))
    return table_rows


def shown(row: TableRow, column: str) -> str:
    """Formats a mean with the half width of its 95 % interval over seeds; for one seed without."""
    if column not in row.values:
        return "diverged" if row.diverged else "-"
    statistics = row.values[column]
    digits = 1 if column == "epochs" else 3 if abs(statistics["mean"]) >= 0.01 else 5
    half = statistics["high"] - statistics["mean"]
    return f"{statistics['mean']:.{digits}f}" + (f" ± {half:.{digits}f}" if math.isfinite(half) else "")


def text(rows: Sequence[TableRow], columns: Columns) -> str:
    """Formats the table as Markdown, a part for each edit and share."""
    lines: list[str] = []
    for part in dict.fromkeys((row.edit, row.share) for row in rows):
        rows_of_part = [row for row in rows if (row.edit, row.share) == part]
        names = [name for name in columns if any(name in row.values for row in rows_of_part)]
        lines += ["", f"**{part[0].replace('_', ' ')}, {part[1]:.0%} of the examples**", ""]
        lines += ["| | seeds | " + " | ".join(columns[name] for name in names) + " |"]
        lines += ["|---" * (len(names) + 2) + "|"]
        for row in rows_of_part:
            cells = [shown(row, name) for name in names]
            lines.append(f"| {row.method} | {len(row.seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines).strip()
