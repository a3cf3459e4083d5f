"""Writes the page of studies: python -m unlearn_jax.recommendation PAGE CONFIG [CONFIG ...]."""

import argparse
import pathlib

from unlearn_jax.recommendation.page import shipped, write_page

parser = argparse.ArgumentParser(prog="python -m unlearn_jax.recommendation", description=__doc__)
parser.add_argument("page", type=pathlib.Path, help="the page without its ending, such as docs/unlearn-movielens")
parser.add_argument("configs", nargs="+", help="config files or the names of shipped ones")
arguments = parser.parse_args()
write_page(shipped(arguments.configs), arguments.page)
