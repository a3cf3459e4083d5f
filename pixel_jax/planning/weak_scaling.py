"""Weak scaling: a step with one row per chip on increasing numbers of chips, and the predicted loss to communication."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from pixel_jax.planning.machines import machine, slices
from pixel_jax.planning.programs import Recipe
from pixel_jax.planning.search import Compiled, Times, search, times


class Point(NamedTuple):
    """A point of the curve: the first plan that fits a slice (or the last, if none fits), its times and tokens."""

    compiled: Compiled
    times: Times | None
    tokens: int  # of a chip, in one call

    @property
    def rate(self) -> float | None:
        """Tokens per second and chip; None if no plan fits."""
        return self.tokens / self.compiled.plan.predicted_seconds if self.times else None


def with_rows(recipe: Recipe, rows: int) -> Recipe:
    """Returns the recipe with `rows` rows for each SFT step or update."""
    config, changes = recipe.config, {}
    if config.sft is not None:
        changes["sft"] = dataclasses.replace(config.sft, batch_size=rows)
    if config.rl is not None:  # as many updates an iteration
        prompts = config.rl.prompts * rows // config.rl.train_batch
        changes["rl"] = dataclasses.replace(config.rl, train_batch=rows, prompts=prompts)
    return dataclasses.replace(recipe, config=dataclasses.replace(config, **changes))


def weak_scaling(recipe: Recipe, step: str, kind: str, *, most: int) -> Iterator[Point]:
    """Yields the plan of every slice of a kind, each compiled on its own."""
    for chips, name in slices(kind).items():
        target = machine(name)
        scaled = with_rows(recipe, chips)
        plans: list[Compiled] = []
        search(scaled, (step,), target, fitting=1, most=most, report=plans.append)
        each = times(plans[-1].plan, target) if plans[-1].plan.fits else None
        yield Point(plans[-1], each, scaled.length(step))
