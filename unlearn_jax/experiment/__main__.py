"""Runs the experiment: python -m unlearn_jax.experiment results.json [--seeds N]."""

import argparse
import pathlib

import jax

from unlearn_jax.experiment.results import run_experiment, table
from unlearn_jax.experiment.setup import ExperimentConfig

parser = argparse.ArgumentParser(prog="python -m unlearn_jax.experiment", description=__doc__)
parser.add_argument("results", type=pathlib.Path)
parser.add_argument("--seeds", type=int, default=ExperimentConfig.seeds)
arguments = parser.parse_args()
jax.config.update("jax_enable_x64", True)
result = run_experiment(ExperimentConfig(seeds=arguments.seeds), arguments.results)
print(table(result["runs"]))
print("\n".join(result["exceptions"]))
