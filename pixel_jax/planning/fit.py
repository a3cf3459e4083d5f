"""The largest sizes with which a run fits: prompts in flight and rows of a micro-batch, found with few compilations.

The memory of a program grows linearly with what a shard takes at a time, nearly. Two compiled sizes therefore predict the largest
that fits, and a third compilation confirms it or corrects the line.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pixel_jax.parallel.mesh import make_mesh
from pixel_jax.parallel.sharding import row_shards
from pixel_jax.planning.machines import GIB, Machine
from pixel_jax.planning.programs import Recipe
from pixel_jax.planning.search import Compiled, Plan, beside, plan, resident_bytes

MOST = 6  # sizes of a step that are compiled, at most
SECTIONS = {"sft": "sft", "update": "rl", "score": "rl"}  # of the config, for steps with micro-batches


def largest(
    sizes: Sequence[int], needed: Callable[[int], float], capacity: float, *, known: Mapping[int, float], second: int
) -> int | None:
    """Finds the largest size that fits, among sizes whose need grows about linearly. What it returns has been measured.

    Args:
        sizes: ascending.
        needed: measures what a size needs, which takes long; infinite if that is unknown and too much.
        capacity: the most that may be needed.
        known: size -> what it needs, of sizes measured before; at least one.
        second: the size to measure if only one is known.

    Returns:
        None if no known size fits, the least being among them.
    """
    known = dict(known)
    while (fitting := [size for size in known if known[size] <= capacity]) and len(known) < MOST:
        size = second if len(known) == 1 else _predicted(sizes, known, max(fitting), capacity)
        if size in known:
            break
        known[size] = needed(size)
    return max(fitting, default=None)


def _predicted(sizes: Sequence[int], known: Mapping[int, float], fits: int, capacity: float) -> int:
    """Returns the largest size within `capacity` on the line through what is known beside the limit; `fits` if none is larger."""
    too_large = min((size for size in known if known[size] > capacity), default=None)
    open_sizes = [size for size in sizes if size > fits and (too_large is None or size < too_large)]
    if too_large is not None and math.isinf(known[too_large]):  # no line: the middle
        return open_sizes[len(open_sizes) // 2] if open_sizes else fits
    other = too_large if too_large is not None else max((size for size in known if size < fits), default=fits)
    rise = (known[other] - known[fits]) / (other - fits) if other != fits else math.inf
    limit = math.inf if rise <= 0 else fits + (capacity - known[fits]) / rise
    return max((size for size in open_sizes if size <= limit), default=fits)


def enlarge(
    recipe: Recipe,
    run: Mapping[str, Compiled],
    machine: Machine,
    *,
    report: Callable[[Compiled], object] = lambda compiled: None,
) -> dict[str, Compiled]:
    """Chooses the prompts in flight and the micro-batches of a run: the largest that fit. The meshes stay.

    Updates and scores have the same micro-batches, as in a run.

    Args:
        recipe: of the run, with `together` as in `run`.
        run: step -> a plan that fits.
        machine: whose memory counts.
        report: called with every plan as soon as it is compiled.

    Returns:
        Step -> plan, which fits.
    """
    meshes = {step: compiled.plan.mesh for step, compiled in run.items()}
    made: dict[tuple[str, int], Compiled] = {(step, recipe.together or 1): compiled for step, compiled in run.items()}
    chosen: dict[str, int] = {}

    def needed(step: str, size: int) -> float:
        if (step, size) not in made:
            compiled = plan(dataclasses.replace(recipe, together=size), step, machine, meshes[step])
            made[step, size] = beside(compiled, resident_bytes(recipe, step, machine, meshes), machine)
            report(made[step, size])
        found = made[step, size].plan
        if found.bytes_per_chip is None or (not found.fits and found.bytes_per_chip <= machine.chip.memory):
            return math.inf  # the compiler names nothing, or a part of what it needed
        return found.bytes_per_chip

    for step in run:
        sizes = recipe.sizes(step, row_shards(make_mesh(meshes[step], machine.devices)))
        alike = [other for other in chosen if "rollout" not in (step, other)]
        if alike:  # no more rows than the steps before
            sizes = [size for size in sizes if size <= chosen[alike[-1]]]
        least = recipe.together or 1
        size = largest(
            sizes,
            lambda size, step=step: needed(step, size),
            machine.chip.memory,
            known={least: needed(step, least)},
            second=sizes[-1] if alike else _second(recipe, step, sizes),
        )
        assert size is not None  # the run fits
        chosen |= dict.fromkeys([*alike, step], size)
    for step, size in chosen.items():
        needed(step, size)
    found = {step: made[step, size] for step, size in chosen.items()}
    return found if all(compiled.plan.fits for compiled in found.values()) else dict(run)


def _second(recipe: Recipe, step: str, sizes: Sequence[int]) -> int:
    """Returns the size to compile after the least: twice that; of a rollout about as many prompts as the config has in flight."""
    larger = sizes[1:] or sizes
    if step != "rollout":
        return larger[0]
    phase = recipe.config.learning
    share = (phase.rollout.in_flight or phase.prompts) / phase.prompts
    return max((size for size in larger if size <= share * sizes[-1]), default=larger[0])


def settings(run: Mapping[str, Compiled]) -> dict[str, Any]:
    """Returns the settings of a config with which it runs as planned: dotted name -> value.

    The steps are those of one section, which share a mesh, except that rollouts may have their own.
    """
    found: dict[str, Any] = {}
    for step, compiled in run.items():
        made = compiled.plan
        if step == "rollout":
            found |= {"rollout_mesh": _axes(made), "rl.rollout.in_flight": made.sharding["in_flight"]}
        elif step in SECTIONS:
            found |= {"mesh": _axes(made), f"{SECTIONS[step]}.forward.micro_batches": made.sharding["micro_batches"]}
    return found


def _axes(made: Plan) -> dict[str, int]:
    """The axes of a plan's mesh that are longer than 1; `data` if none is."""
    return {axis: size for axis, size in made.mesh.items() if size > 1} or {"data": 1}


def lines(run: Mapping[str, Compiled]) -> list[str]:
    """Returns the lines to write into a config file, where `config` is what it returns."""
    return [f"config.{name} = {value}" for name, value in settings(run).items()]


def shortfall(plans: Sequence[Compiled], machine: Machine, steps: Sequence[str], *, fitted: bool) -> str:
    """Says by how much the steps of which no plan fits are too large, and what helps.

    Args:
        plans: all that were compiled for the machine.
        machine: that is too small.
        steps: that were planned together.
        fitted: whether the least sizes were tried.
    """
    lacking = []
    for step in steps:
        made = [compiled.plan for compiled in plans if compiled.plan.step == step]
        if made and not any(x.fits for x in made):
            sizes = [x.bytes_per_chip for x in made if x.bytes_per_chip]
            lacking.append(f"{step} needs {min(sizes) / GIB:.1f} GiB a chip" if sizes else f"{step} needs more")
    what = "; ".join(lacking) or "each step fits on a mesh, but no meshes go together"
    remedies = ["more chips, or chips with more memory", "more meshes to compile (--most)"]
    if not fitted:
        remedies.insert(0, "fewer prompts in flight, which --fit chooses")
    remedies += [
        "shorter rows (config.rl.rollout.max_response, config.prompt_width, config.trace_tokens)",
        "config.lora",
    ]
    limit = f"a program may use {machine.chip.memory / GIB:.1f} GiB"
    return f"Nothing fits on {machine.name}, where {limit}: {what}. What helps: {'; '.join(remedies)}."
