"""The page of one or several studies: their tables, the missing cells, the paper's numbers, and a picture.

It is written from the finished cells; none is computed.
"""

import argparse
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pixel_jax.files import write_file
from pixel_jax.state_files import write_json
from unlearn_jax.studies.cells import cells_of, read_cell
from unlearn_jax.studies.config import StudyConfig
from unlearn_jax.studies.methods import METHODS
from unlearn_jax.studies.table import Columns, Reported, TableRow, rows_of, text

METHODS_EXPLAINED = """\
- *retrain, cold*: the same recipe, start and order of batches on what should have been trained on; all divergences (KL, in nats,
  means over tokens) are from it. *Other order*: the same in another order, which is the noise of training. *Warm*: from the
  trained adapter.
- *corrupted*: the trained adapter, before any edit. *erase* is the default edit within its budget of epochs; all methods below it
  may cost as much, those with a learning rate with the one that comes nearest to the retrain on another seed.
"""
INTERVALS_EXPLAINED = """\
- An interval (±) is Student's 95 % over seeds. A number of one seed has none; standard errors over test
  rows are below the tables.
"""


class StudyReport(NamedTuple):
    """What the page of a kind of studies says."""

    introduction: str  # up to the first study
    columns: Columns  # of the tables
    pictured: Columns  # scores, of which a study's first one is drawn
    paper: str  # above the paper's numbers
    reported: tuple[Reported, ...]  # by the paper
    arrangement: Callable[[Any], str]  # the data, the training and the adapter of a configuration, in a sentence


def write_page(studies: Mapping[str, StudyConfig], stem: pathlib.Path, report: StudyReport) -> None:
    """Writes the page, its numbers and its picture to `stem`.md, .json and .png, whatever the ending of `stem`."""
    parts, numbers, pictures = [report.introduction], {}, []
    for name, config in studies.items():
        wanted = [cell for cell in cells_of(config) if cell.seed != config.tuning_seed]
        finished = [cell for cell in map(lambda cell: read_cell(config, cell), wanted) if cell is not None]
        rows = rows_of(finished, report.columns)
        parts.append(_study(name, config, rows, len(finished), len(wanted), report))
        numbers[name] = {"setting": config.identity(), "rows": [row._asdict() for row in rows]}
        if rows:
            pictures.append((name, config, rows))
    lines = ["| task | metric | method | value | standard error |", "|---|---|---|---|---|"]
    for x in report.reported:
        error = "unknown" if x.error is None else f"{x.error:.3f} ({x.right} of {x.valid})"
        lines.append(f"| {x.task} | {x.metric} | {x.method} | {x.value:.4f} | {error} |")
    if pictures:
        draw(pictures, stem.with_suffix(".png"), report.pictured)
        parts.append(f"## Forgetting, utility and cost\n\n![forgetting against utility, and cost]({stem.stem}.png)\n")
    parts.append(report.paper + "\n" + "\n".join(lines) + "\n")
    write_file(stem.with_suffix(".md"), "\n".join(parts))
    reported = [{**x._asdict(), "error": x.error} for x in report.reported]
    write_json(stem.with_suffix(".json"), {"studies": numbers, "paper": reported})


def _study(
    name: str, config: StudyConfig, rows: Sequence[TableRow], done: int, all_of_them: int, report: StudyReport
) -> str:
    lines = [
        f"## {name}",
        "",
        f"{report.arrangement(config)} {done} of {all_of_them} cells are done.",
        "",
        text(rows, report.columns),
        "",
    ]
    for row in rows:
        if row.method == "corrupted" and row.errors:
            errors = ", ".join(f"{report.columns[column]} {error:.3f}" for column, error in row.errors.items())
            lines += [f"Standard errors over test rows ({row.edit.replace('_', ' ')}, {row.share:.0%}): {errors}.", ""]
    if missing := list(_missing(config, rows)):
        lines += ["Missing:", "", *(f"- {line}" for line in missing), ""]
    return "\n".join(lines)


def _missing(config: StudyConfig, rows: Sequence[TableRow]) -> Iterator[str]:
    """Yields a line for each part of the table in which cells are missing."""
    done = {(row.edit, row.share, row.method): row.seeds for row in rows}
    for edit in config.edits:
        for share in config.shares:
            lacking: dict[tuple[int, ...], list[str]] = {}
            for method in config.methods or METHODS:
                seeds = tuple(seed for seed in config.seeds if seed not in done.get((edit, share, method), []))
                lacking.setdefault(seeds, []).append(method)
            lacking.pop((), None)
            for seeds, names in lacking.items():
                where = f"{edit.replace('_', ' ')}, {share:.0%}, seeds {', '.join(map(str, seeds))}"
                yield f"{where}: {'; '.join(names)}"


def draw(studies: Sequence[tuple[str, StudyConfig, Sequence[TableRow]]], path: pathlib.Path, pictured: Columns) -> None:
    """Draws two plots for each study and edit: the test score and the cost, against the divergence on forgotten rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = [
        (name, config, edit, share, [row for row in rows if (row.edit, row.share) == (edit, share)])
        for name, config, rows in studies
        for edit, share in dict.fromkeys((row.edit, row.share) for row in rows)
    ]
    figure, axes = pyplot.subplots(len(parts), 2, figsize=(11, 3.6 * len(parts)), squeeze=False, layout="constrained")
    marks = dict(zip(METHODS, "osDPv^<>hXd*", strict=True))
    for (left, right), (name, config, edit, share, rows) in zip(axes, parts, strict=True):
        score = next(column for column in pictured if any(column in row.values for row in rows))
        for row in rows:
            for axis, column in ((left, score), (right, "epochs")):
                if column in row.values and "kl_forget" in row.values:
                    x, y = (row.values[key]["mean"] for key in ("kl_forget", column))
                    y = y / config.training.epochs if column == "epochs" else y
                    axis.plot(max(x, 1e-7), y, marks[row.method], label=row.method, markersize=7)
        for axis in (left, right):
            axis.set_xscale("log")
            axis.set_xlabel("KL from the cold retrain on forgotten rows (nats)")
            axis.grid(alpha=0.3)
        left.set_ylabel(f"{pictured[score]} on test rows")
        right.set_ylabel("cost / that of the training")
        left.set_title(f"{name.rpartition('/')[2]}: {edit.replace('_', ' ')}, {share:.0%}", fontsize=10)
        right.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def shipped(kind: type[StudyConfig], names: Sequence[str]) -> dict[str, Any]:
    """Loads the studies of config files, or of names of shipped ones."""
    from pixel_jax.config import ConfigFileParser, load

    parser: Any = ConfigFileParser("config", lock_config=False)
    return {name: load(kind, parser.parse(name)) for name in names}


def main(package: str, kind: type[StudyConfig], report: StudyReport) -> None:
    """`python -m PACKAGE PAGE CONFIG [CONFIG ...]`, which writes the page of studies."""
    parser = argparse.ArgumentParser(prog=f"python -m {package}", description="Writes the page of studies.")
    parser.add_argument("page", type=pathlib.Path, help="the page, such as docs/unlearn-movielens.md")
    parser.add_argument("configs", nargs="+", help="config files or the names of shipped ones")
    arguments = parser.parse_args()
    write_page(shipped(kind, arguments.configs), arguments.page, report)
