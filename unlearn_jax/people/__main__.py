"""Collects the evaluations of finished runs: python -m unlearn_jax.people docs/unlearn-people.json RUN [RUN ...]."""

import argparse
import pathlib

from pixel_jax.cli import UserError
from unlearn_jax.people.seeds import collect

parser = argparse.ArgumentParser(prog="python -m unlearn_jax.people", description=__doc__)
parser.add_argument("record", type=pathlib.Path, help="the file that is written; launch.tables makes tables of it")
parser.add_argument(
    "runs", type=pathlib.Path, nargs="+", help="directories of runs that `unlearn-jax eval` has evaluated"
)
arguments = parser.parse_args()
try:
    collect(arguments.runs, arguments.record)
except UserError as error:
    parser.exit(1, f"{error}\n")
