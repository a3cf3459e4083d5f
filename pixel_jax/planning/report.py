"""Plans as JSON and as tables."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from pixel_jax import terminal
from pixel_jax.parallel.mesh import AXES
from pixel_jax.planning.machines import GIB
from pixel_jax.planning.search import Compiled
from pixel_jax.planning.weak_scaling import Point

LOWER_BOUND = (
    "Seconds are counted work over published peak rates, the largest of them: a prediction, not a measurement."
)


Best = Mapping[str, Mapping[str, Compiled]]  # topology -> step -> its plan


def document(plans: Sequence[Compiled], best: Best, points: Sequence[Point] = ()) -> dict[str, Any]:
    """Returns the content of the JSON file.

    `plans` is a list of all plans; `best` is {topology: {step: index of its plan, and the assumed numbers of loop iterations}};
    `scaling` has the plans of weak scaling with the seconds of each resource and the tokens per second and chip.
    """
    scaling = [
        {**dataclasses.asdict(p.compiled.plan), "times": p.times and p.times._asdict(), "rate": p.rate} for p in points
    ]
    return {
        "plans": [dataclasses.asdict(compiled.plan) for compiled in plans],
        "best": {
            topology: {
                step: {"plan": plans.index(compiled), "assumed_turns": compiled.assumed}
                for step, compiled in steps.items()
            }
            for topology, steps in best.items()
        },
        **({"scaling": scaling} if scaling else {}),
    }


def mesh(sharding: Mapping[str, int]) -> str:
    """Describes the sharding of a plan, as in `fsdp 64 x tensor 4, 4 micro-batches`."""
    axes = {axis: size for axis, size in sharding.items() if axis in AXES and size > 1}
    words = [" x ".join(f"{axis} {size}" for axis, size in axes.items()) or "one device"]
    if (parts := sharding.get("micro_batches", 1)) > 1:
        words.append(f"{parts} micro-batches")
    if (prompts := sharding.get("in_flight")) is not None:
        words.append(f"{prompts} prompts in flight")
    return ", ".join(words)


def gib(size: float | None) -> str:
    """Formats a number of bytes in GiB, or "?" if it is not known."""
    return "?" if size is None else f"{size / GIB:.2f} GiB"


def line(compiled: Compiled) -> str:
    """Returns a line of progress about one compilation."""
    plan = compiled.plan
    fits = f"fits in {gib(plan.bytes_per_chip)}" if plan.fits else f"does not fit ({gib(plan.bytes_per_chip)})"
    return f"{plan.topology} {plan.step}: {mesh(plan.sharding)}: {fits}; compiled in {compiled.seconds:.0f} s"


def table(plans: Sequence[Compiled], best: Best) -> Table:
    """Makes the table of the best plan of each step on each machine."""
    head = (
        "topology",
        "step",
        "sharding",
        "memory",
        "TFLOP",
        "GB moved",
        "GB sent",
        "to other nodes",
        "seconds",
        "bound",
    )
    rows, caption = [], [LOWER_BOUND]
    for topology, steps in best.items():
        for step in dict.fromkeys(c.plan.step for c in plans if c.plan.topology == topology):
            if step not in steps:
                rows.append((topology, step, "none of those compiled fits, with the run's other steps"))
                continue
            compiled, plan = steps[step], steps[step].plan
            flops, moved, sent = plan.counted
            counted = flops / 1e12, moved / 1e9, sent / 1e9, plan.between_nodes / 1e9, plan.predicted_seconds
            numbers = (f"{x:.4g}" for x in counted)
            rows.append((topology, step, mesh(plan.sharding), gib(plan.bytes_per_chip), *numbers, str(plan.bound)))
            if compiled.assumed:
                turns = ", ".join(f"{scope} {times:.4g}" for scope, times in compiled.assumed.items())
                caption.append(f"{topology} {step} assumes of what the data decides: {turns}.")
    return terminal.table(head, rows, words=3, title="Plans, of one chip and one call", caption="\n".join(caption))


def scaling_table(points: Iterable[Point], step: str) -> Table:
    """Makes the table of weak scaling; the efficiency is relative to the rate of the first slice that fits."""
    head = (
        "topology",
        "sharding",
        "memory",
        "compute s",
        "memory s",
        "links s",
        "network s",
        "tokens / s / chip",
        "efficiency",
    )
    rows, first = [], None
    for point in points:
        plan, times, rate = point.compiled.plan, point.times, point.rate
        if times is None or rate is None:
            rows.append((plan.topology, mesh(plan.sharding), f"does not fit ({gib(plan.bytes_per_chip)})"))
            continue
        first = first or rate
        numbers = (f"{x:.3g}" for x in (*times, rate))
        rows.append((plan.topology, mesh(plan.sharding), gib(plan.bytes_per_chip), *numbers, f"{rate / first:.1%}"))
    title = f"Predicted weak scaling of {step}, one row a chip"
    return terminal.table(head, rows, words=2, title=title, caption=LOWER_BOUND)
