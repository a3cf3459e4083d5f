"""The baselines of the visual search set's miniature tier: python -m pixel_jax.search_set.baseline OUT.

Writes the tier, trains the quickstart's recipe on its training split (`configs/pixel/search_quickstart.py`), and asks the warm
start and both arms about its test split in every mode (`configs/pixel/search_eval.py`): without looking, with the overview, with
the evidence cut out, with operations, with operations that show grey. `OUT/baselines.json` has the numbers. Started again, it
goes on where it ended.
"""

import argparse
import dataclasses
import pathlib
import runpy
import time
from typing import Any

from pixel_jax.config import find_config, load
from pixel_jax.evaluation.config import EvalConfig
from pixel_jax.evaluation.main import answer
from pixel_jax.evaluation.modes import MODES
from pixel_jax.evaluation.results import read_records
from pixel_jax.evaluation.summary import percent, summarise
from pixel_jax.files import read_json
from pixel_jax.quickstart.config import QuickstartConfig
from pixel_jax.quickstart.pipeline import run_seeds
from pixel_jax.quickstart.task import lesson_of
from pixel_jax.run_lock import hold
from pixel_jax.search_set.writing import SetConfig, write_set
from pixel_jax.state_files import read_note, write_json
from pixel_jax.terminal import print_table, say, table

TIER = "miniature"
HEAD = ("model", "mode", "category", "items", "right %", "used a tool %", "evidence held %", "could not be asked")


def run(out: pathlib.Path, training: QuickstartConfig, asking: Any, made_of: SetConfig) -> dict[str, Any]:
    """Carries out all parts that are not done yet.

    Args:
        out: the directory of the set, of the training and of the evaluations.
        training: the quickstart's settings with the lesson "search".
        asking: the config of the evaluations, a `ConfigDict`, in which model, data and directory are set here.
        made_of: the settings of the set.

    Returns:
        The content of `baselines.json`.
    """
    began, folder = time.monotonic(), out / "set"
    wanted = dataclasses.asdict(made_of) | {"tiers": list(made_of.tiers)}
    note = read_note(folder / "set.json", lambda note: isinstance(note, dict) and note.get("settings") == wanted)
    note = note or write_set(folder, made_of)
    seed = out / f"seed-{training.seed}"
    ((_, result),) = run_seeds(training, out, 1)
    rows: dict[str, dict[str, Any]] = {}
    for name in ("warm", *lesson_of(training).arms):
        place = out / "eval" / name
        asking.model, asking.out = str(seed / name / "model"), str(place)
        asking.benchmarks.search.data = str(folder / TIER / "test")
        with hold(place):
            answer(load(EvalConfig, asking))
        rows[name] = {mode: summarise(read_records(place / "search" / mode)) for mode in asking.modes}
        rows[name]["exchange"] = read_json(place / "metrics.json")["benchmarks"]["search"]["exchange"]
    found = {
        "set": note,
        "models": rows,
        "seconds": {**result["seconds"], "this_start": time.monotonic() - began},
    }
    write_json(out / "baselines.json", found)
    print_table(table(HEAD, table_rows(found), words=3))
    return found


def table_rows(found: dict[str, Any]) -> list[list[str]]:
    """The rows below `HEAD`."""
    return [
        [
            name,
            mode,
            category,
            str(row["questions"]),
            *(percent(row[x]) for x in ("score", "rapr", "evidence")),
            str(row["unanswered"]),
        ]
        for name, modes in found["models"].items()
        for mode in MODES
        if mode in modes
        for category, row in modes[mode].items()
    ]


def main() -> None:
    """Runs the baselines that the command line describes."""
    parser = argparse.ArgumentParser(prog="python -m pixel_jax.search_set.baseline", description=__doc__)
    parser.add_argument("out", type=pathlib.Path, help="the folder of the set, of the models and of the results")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    flags = parser.parse_args()
    training, asking = (
        runpy.run_path(str(find_config(name)))["get_config"]()
        for name in ("pixel/search_quickstart", "pixel/search_eval")
    )
    training.seed = flags.seed
    run(flags.out, load(QuickstartConfig, training), asking, SetConfig(tiers=(TIER,)))
    say(f"Numbers are in {flags.out / 'baselines.json'}, answers and pages in {flags.out / 'eval'}.")


if __name__ == "__main__":
    main()
