"""The cases of compilation: a cold start with programs on disk, and images of many sizes.

    python -m pixel_jax.bench.startup CACHE

reads the quickstart's config, builds its model and prompts, and samples one rollout, as a user's process does.
"""

import itertools
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile

import jax
import numpy as np

from pixel_jax.bench.network import QUESTION, images, random_model, rollout_config, vocabulary
from pixel_jax.bench.timing import Case, Workload
from pixel_jax.rollouts.prompts import Query, build_prompts, tables
from pixel_jax.rollouts.rollout import rollout
from pixel_jax.rollouts.shapes import prompt_shape

QUICKSTART = pathlib.Path(__file__).parents[2] / "configs" / "pixel" / "quickstart.py"
COLD_START_AIM = 10.0  # seconds


def build_cold_start(quick: bool) -> Workload:
    """A new process up to its first rollout."""

    def ours():
        cache = tempfile.TemporaryDirectory()  # lives as long as `run`
        environment = {**os.environ}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        command = [sys.executable, "-m", "pixel_jax.bench.startup"]

        def run():
            done = subprocess.run([*command, cache.name], env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
            return done.stdout

        return run

    return Workload(
        "a new process, from its start to the end of the quickstart's first rollout; the first call compiles",
        {"pixel_jax": ours},
        lambda outputs: None,
        memory=(),
        rounds=3,
        details={"aim": f"under {COLD_START_AIM:.0f} s"},
    )


def build_image_sizes(quick: bool) -> Workload:
    """Prompts with images of different sizes, one after the other, through one program."""
    config, model = rollout_config(True), random_model(True)
    sizes = list(itertools.product((60, 97, 112), (56, 80, 101, 112)))
    token_tables, shape = tables(vocabulary()), prompt_shape(1, 128, 128, 288, config, video=False)

    def ours():
        cycle = itertools.cycle(sizes)

        def run():
            query = Query(QUESTION, list(images(1, *next(cycle))))
            prompts = build_prompts([query], vocabulary(), token_tables, config, shape=shape)
            return rollout(model, prompts, jax.random.key(0), config).tokens

        return run

    return Workload(
        f"a rollout of 2 rows for images of {len(sizes)} sizes in turn: compilations after the first call are the point",
        {"pixel_jax": ours},
        lambda outputs: None,
        rounds=len(sizes),
    )


def main(cache: str) -> None:
    """Samples one rollout, with compiled programs in the directory `cache`."""
    from pixel_jax.config import load
    from pixel_jax.quickstart.config import QuickstartConfig
    from pixel_jax.quickstart.network import model_config, new_model
    from pixel_jax.quickstart.task import Task, TrainingScenes
    from pixel_jax.training.progress import use_compilation_cache

    use_compilation_cache(cache)
    config = load(QuickstartConfig, runpy.run_path(str(QUICKSTART))["get_config"]())
    task = Task(config)
    model = new_model(model_config(config.network, task.vocabulary), jax.random.key(0))
    prompts, _ = next(TrainingScenes(task))
    print(int(np.sum(rollout(model, prompts, jax.random.key(0), config.rl.rollout).loss_mask)))


CASES = (Case("cold-start", build_cold_start), Case("image-sizes", build_image_sizes))


if __name__ == "__main__":
    main(sys.argv[1])
