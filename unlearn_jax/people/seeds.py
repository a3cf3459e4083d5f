"""Evaluations of several seeds and shares as one record, from which the tables of the documentation are made."""

import pathlib
from collections.abc import Sequence
from typing import Any

from pixel_jax.cli import UserError
from pixel_jax.files import read_json
from pixel_jax.provenance import commit
from pixel_jax.state_files import write_json
from unlearn_jax.people.evaluate import EVALUATION
from unlearn_jax.requests.log import LOG, read_log
from unlearn_jax.requests.task import SETTINGS


def collect(directories: Sequence[pathlib.Path], path: pathlib.Path) -> dict[str, Any]:
    """Writes the evaluations of runs to a file.

    Args:
        directories: of finished runs, all of one configuration but for the seeds and what was forgotten.
        path: of the record.

    Returns:
        The record: {"setting": what all runs share, "runs": [{"seed", "forgotten", "outcomes", "rows"}], "commit"}; `forgotten`
        is a number of rows, `rows` what `evaluate` returns.

    Raises:
        UserError: a run has not been evaluated, or has another configuration than the first.
    """
    runs, setting = [], None
    for directory in directories:
        if not (directory / EVALUATION).exists():
            raise UserError(f"{directory} holds no {EVALUATION}: run `unlearn-jax eval --config.out={directory}` first")
        trained = read_json(directory / SETTINGS)
        seed = trained.pop("seed")
        trained["training"].pop("seed")
        setting = setting or trained
        if trained != setting:
            raise UserError(f"{directory} has another configuration than {directories[0]}")
        entries = read_log(directory / LOG)
        runs.append(
            {
                "seed": seed,
                "forgotten": sum(len(entry.ids) for entry in entries),
                "outcomes": [entry.outcome for entry in entries],
                "rows": read_json(directory / EVALUATION),
            }
        )
    record = {"setting": setting, "runs": runs, "commit": commit()}
    write_json(path, record)
    return record
