"""What the shipped configs need of a device's memory with a 7B on one device: compiled from shapes, nothing is allocated.

What decides it lies between arguments and results: in the vision tower on a chunk of what operations show, and in a chunk of
prompts that are read. (Weights, caches and records are arguments and results, which a mesh divides; `pixel-jax plan` counts
them.) All in float32: a CPU's compiler keeps a float32 copy of bfloat16 weights, 26 GiB that no accelerator needs; what lies
between is half as large in bfloat16.
"""

import dataclasses
import functools
import runpy

import jax
import jax.numpy as jnp
import pytest

from pixel_jax.config import load, shipped_configs
from pixel_jax.evaluation.config import EvalConfig
from pixel_jax.evaluation.stages import Exam
from pixel_jax.models.released import released
from pixel_jax.planning.programs import Recipe, abstract_model, array, prompt_arrays, rollout_shape
from pixel_jax.quickstart.vocabulary import build_vocabulary
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.prompts import tables
from pixel_jax.rollouts.queue import prompt_visual, read_prompt, read_together
from pixel_jax.rollouts.rollout import traced_settings
from pixel_jax.rollouts.trajectory import Views
from pixel_jax.rollouts.views import show
from pixel_jax.train_config import TrainConfig
from pixel_jax.training.rl import RLConfig

GIB = 2**30
MOST = 18  # GiB between arguments and results
LARGEST = "qwen2.5-vl-7b"
PLACES = {"model": "DIR", "data": "FILE", "out": "RUN"}


def shipped(name: str):
    return runpy.run_path(str(shipped_configs()[name]))["get_config"]()


def asking(rollout: RolloutConfig, prompts: int, shape) -> Recipe:
    """Rollouts of so many prompts of a shape (images, height, width, tokens) at the largest model."""
    *buffer, width = shape
    rollout = dataclasses.replace(rollout, temperature=1.0)  # traced: one program, and RL refuses greedy rollouts
    rl = RLConfig(iterations=1, prompts=prompts, rollout=rollout, train_batch=prompts * rollout.group_size)
    config = TrainConfig(**PLACES, rl=rl, image_buffer=tuple(buffer), prompt_width=width)
    return Recipe(config, released(LARGEST), tables(build_vocabulary()), dtype="float32")


def evaluation(benchmark: str) -> Recipe:
    """`pixel-jax eval` in the largest bucket of a benchmark."""
    values = shipped("pixel/eval")
    values.model, values.out, values.benchmarks[benchmark].data = "DIR", "RUN", "FILE"
    config = load(EvalConfig, values)
    benchmark_config = config.benchmarks[benchmark]
    return asking(Exam(benchmark_config, config.rollout).limits, config.batch, benchmark_config.buckets[-1])


def own_data() -> Recipe:
    shape = {"image_buffer": (1, 1536, 1536), "prompt_width": 2560}  # which it works out from the data
    config = load(TrainConfig, {**shipped("pixel/own_data").to_dict(), **PLACES, **shape})
    return Recipe(config, released(LARGEST), tables(build_vocabulary()), dtype="float32")


def chat() -> Recipe:
    return asking(dataclasses.replace(RolloutConfig(), group_size=1), 1, (1, 4096, 4096, 2560))


RECIPES = {
    "eval, V*": functools.partial(evaluation, "vstar"),
    "eval, InfographicsVQA": functools.partial(evaluation, "infovqa"),
    "eval, MVBench": functools.partial(evaluation, "mvbench"),
    "own_data": own_data,
    "chat": chat,
}


def fewer(prompts, count: int):
    """The arrays of `count` prompts."""
    cut = lambda x: array(x.dtype, count, *x.shape[1:])
    return jax.tree.map(cut, prompts._replace(tables=()))._replace(tables=prompts.tables)


def looking(recipe: Recipe, implementation):
    """A chunk of rows is shown what it asked for."""
    config, shape = recipe.config.rl.rollout, rollout_shape(recipe, 1)
    config = dataclasses.replace(config, implementation=implementation)
    prompts = prompt_arrays(recipe)
    rows = min(config.observe_chunk, recipe.config.rl.prompts * config.group_size)
    buffers = fewer(prompts, min(rows, recipe.config.rl.prompts)).buffers
    views = lambda *more: array(jnp.int32, rows, shape.views, *more)
    shown = functools.partial(show, drawings=None, config=config, shape=shape)
    asked = (array(jnp.int32, rows), Views(views(), views(4), views(2)))
    return jax.jit(shown), (abstract_model(recipe), buffers, *asked)


def reading(recipe: Recipe, implementation):
    """A chunk of prompts is read, pictures and text."""
    config, shape = recipe.config.rl.rollout, rollout_shape(recipe, 1)
    config = dataclasses.replace(config, implementation=implementation)
    total = recipe.config.rl.prompts
    waits = (config.in_flight or total) < total
    count = min(read_together(recipe.config.prompt_width, from_queue=waits), total)

    def read(model, prompts, assistant_prefix):
        return read_prompt(model, prompts, prompt_visual(prompts, config, shape), assistant_prefix, config)

    return jax.jit(read), (abstract_model(recipe), fewer(prompt_arrays(recipe), count), traced_settings(config, ())[0])


PARTS = {"looking": looking, "reading": reading}


def between(recipe: Recipe, part: str, implementation: str | None) -> float:
    """GiB that the compiled part needs besides its arguments and results."""
    function, arguments = PARTS[part](recipe, implementation)
    return function.lower(*arguments).compile().memory_analysis().temp_size_in_bytes / GIB


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_config_fits_a_device(name, part):
    recipe = RECIPES[name]()
    assert recipe.config.rl.rollout.implementation is None  # what is judged is the default
    needed = between(recipe, part, None)
    print(f"{name}, {part}: {needed:.2f} GiB")
    assert needed < MOST


@pytest.mark.slow
def test_dense_scores_would_not_fit():
    """What the bound above is there for: the same parts, with an array of all scores, as was once the default."""
    assert between(RECIPES["eval, V*"](), "looking", "dense") > 300
