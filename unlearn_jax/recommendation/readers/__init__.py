"""Readers of data sets, by name; each reads the files of a directory as `Ratings`."""

import pathlib
from collections.abc import Callable, Mapping

from unlearn_jax.recommendation.ratings import Ratings
from unlearn_jax.recommendation.readers.movielens import read_movielens
from unlearn_jax.recommendation.readers.recbole import read_recbole

READERS: Mapping[str, Callable[[pathlib.Path], Ratings]] = {"recbole": read_recbole, "movielens": read_movielens}
