"""The cells of a study: lists them, reads the finished ones, and computes the others."""

import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from pixel_jax.config import ConfigError
from pixel_jax.files import read_json
from pixel_jax.identity import changes, flatten
from pixel_jax.state_files import write_json
from pixel_jax.terminal import Waiting, say
from pixel_jax.training.progress import ProgressLine
from unlearn_jax.config import SHORT
from unlearn_jax.studies.config import StudyConfig
from unlearn_jax.studies.methods import METHODS, Allowance
from unlearn_jax.studies.study import Case, Study


class Cell(NamedTuple):
    """One number of the table: an edit, its share, a seed, a method."""

    edit: str
    share: float
    seed: int
    method: str
    rate: float | None = None  # the learning rate of a trial on the tuning seed; None: not a trial

    @property
    def file(self) -> str:
        """The name of the cell's file."""
        method = re.sub(r"[^a-z0-9]+", "_", self.method.lower())
        rate = "" if self.rate is None else f"-{self.rate:g}"
        return f"{self.edit}-{self.share:g}-{self.seed}-{method}{rate}.json"


def cells_of(config: StudyConfig) -> list[Cell]:
    """All cells, in the order in which they are computed: those of a seed together, the tuning seed first.

    Raises:
        ConfigError: a method is unknown.
    """
    wanted = config.methods or tuple(METHODS)
    if unknown := [name for name in wanted if name not in METHODS]:
        raise ConfigError(f"config.methods must be of {', '.join(METHODS)}, not {unknown[0]!r}")
    tuned = [name for name in wanted if METHODS[name].tuned]
    cells = []
    for edit in config.edits:
        tuning = (edit, config.tuning_share, config.tuning_seed)
        if tuned:
            cells.append(Cell(*tuning, "erase"))
        cells += [Cell(*tuning, name, rate) for name in tuned for rate in config.learning_rates]
        cells += [Cell(edit, share, seed, name) for seed in config.seeds for share in config.shares for name in wanted]
    return cells


def read_cell(config: StudyConfig, cell: Cell) -> dict[str, Any] | None:
    """Reads a finished cell; None if it is not finished.

    Raises:
        ConfigError: the cell was computed with other settings.
    """
    path = pathlib.Path(config.cells) / cell.file
    if not path.exists():
        return None
    finished = read_json(path)
    for name, (old, new) in changes(flatten(finished["setting"]), flatten(config.identity())).items():
        raise ConfigError(
            f"config.{name} is {new!r}, the cell {path} has {old!r}: give another --config.cells, or --config.{name} as it was"
        )
    return finished


def run_cells(study: Study, wanted: Sequence[Cell]) -> None:
    """Computes the cells that are not finished, and shows the progress and the time that is left."""
    config = study.config
    missing = [cell for cell in wanted if read_cell(config, cell) is None]
    say(f"{len(wanted) - len(missing)} of {len(wanted)} cells are done")
    pathlib.Path(config.cells).mkdir(parents=True, exist_ok=True)
    costs = [_estimate(study, cell) for cell in missing]
    progress, done = ProgressLine("cells", max(1, int(sum(costs)))), 0.0
    case: Case | None = None
    for number, (cell, cost) in enumerate(zip(missing, costs, strict=True)):
        if case is None or (case.edit, case.share, case.seed) != cell[:3]:
            with Waiting("training the case of the next cells"):
                case = study.case(*cell[:3])
        with Waiting(f"cell {number + 1} of {len(missing)}: {cell.file.removesuffix('.json')}"):
            row = _compute(study, case, cell)
        values = {**cell._asdict(), "row": row, "setting": config.identity()}
        write_json(pathlib.Path(config.cells) / cell.file, values)
        done += cost
        shown = {name: row[name] for name in (study.metrics[0], "kl_forget", "kl_kept") if name in row}
        progress.update(int(done), shown, f"{number + 1} of {len(missing)}: {cell.file.removesuffix('.json')}")


def _estimate(study: Study, cell: Cell) -> float:
    """Estimates the example-gradients of a cell; an example that is scored counts a third."""
    config, count = study.config, study.examples
    spent = {"nothing": 0, "training": config.training.epochs, "edit": min(config.erasure.budget, SHORT)}
    tested = 0 if cell.rate is not None else study.tests
    twice = 2 if cell.method == "SISA" else 1
    return twice * spent[METHODS[cell.method].cost] * count + (tested + 2 * config.rows) / 3


def _compute(study: Study, case: Case, cell: Cell) -> dict[str, Any]:
    method = METHODS[cell.method]
    allowance = Allowance(0.0, 0.0)
    rate = cell.rate
    if method.tuned and rate is None:
        rate = best_rate(study.config, cell.edit, cell.method)
    if method.cost == "edit" and cell.method != "erase":
        edited = read_cell(study.config, cell._replace(method="erase", rate=None))
        if edited is None:
            raise ConfigError(
                f"{cell.file} may cost what the edit has cost, which is not known: run `unlearn-jax erase`"
            )
        allowance = Allowance(edited["row"]["gradients"], rate or 0.0)
    row: dict[str, Any] = {} if rate is None else {"rate": rate}
    try:
        attempt = method(case, allowance)
    except FloatingPointError:
        return {**row, "diverged": True}
    row |= {"gradients": attempt.gradients, "epochs": attempt.gradients / len(case.rows), "seconds": attempt.seconds}
    row |= {**attempt.remarks, **case.forgetting(attempt.adapters)}
    return row if cell.rate is not None else {**row, **study.scores(attempt.adapters)}


def best_rate(config: StudyConfig, edit: str, method: str) -> float:
    """The learning rate with which a method comes nearest to the retrain on the tuning seed (least sum of both divergences).

    Raises:
        ConfigError: a learning rate has not been tried, or the method diverges with all.
    """
    tried = {}
    for rate in config.learning_rates:
        trial = read_cell(config, Cell(edit, config.tuning_share, config.tuning_seed, method, rate))
        if trial is None:
            raise ConfigError(f"{method} has not been tried with the learning rate {rate}: run `unlearn-jax eval`")
        if not trial["row"].get("diverged"):
            tried[rate] = trial["row"]["kl_forget"] + trial["row"]["kl_kept"]
    if not tried:
        raise ConfigError(f"{method} diverges with all of config.learning_rates {config.learning_rates}")
    return min(tried, key=lambda rate: tried[rate])
