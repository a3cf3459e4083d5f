"""How far a quickstart is: one bar over the phases of all seeds, read from the files that the phases write."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from pixel_jax.quickstart.config import QuickstartConfig
from pixel_jax.quickstart.lesson import Lesson
from pixel_jax.training.progress import ProgressLine
from pixel_jax.training.writers import read_metrics

# What a part takes in steps of tuning, about, with the shipped config on two cores.
ITERATION, JUDGING = 4, 60


class Part(NamedTuple):
    """A part of a seed's work."""

    name: str
    steps: int
    cost: int  # of a step, in steps of tuning
    log: pathlib.Path | None  # the metrics of its steps; None: it is shown as one step
    result: pathlib.Path  # the file that is there when the part is done

    @property
    def done(self) -> int:
        """The cost of the steps that are done."""
        if self.result.exists():
            return self.steps * self.cost
        return 0 if self.log is None else min(self.steps, len(steps_of(self.log))) * self.cost


def steps_of(log: pathlib.Path) -> list[dict[str, Any]]:
    """The metrics of the steps of training in a log, without those of held-out scenes, which are beside them."""
    return [line for line in read_metrics(log) if not any(name.startswith("eval_") for name in line)]


def parts_of(config: QuickstartConfig, lesson: Lesson, directory: pathlib.Path) -> list[Part]:
    """The parts of a seed, in their order."""
    tuned = [
        # A phase of epochs is shown as one step: how many it has is known when its data is there.
        Part(name, steps or 1, 1, directory / folder / "metrics.jsonl" if steps else None, directory / f"{folder}.json")
        for name, folder, steps in (
            ("ground and read", "ground", config.ground.steps),
            ("warm start", "warm", config.warm.steps),
        )
    ]
    judged = [Part("judging the warm start", 1, JUDGING, None, directory / "warm_evaluation.json")]
    for name, arm in lesson.arms.items():
        folder = directory / name
        log = folder / "rl" / "metrics.jsonl"
        tuned.append(Part(f"learning {arm.label}", config.rl.iterations, ITERATION, log, folder / "trained.json"))
        judged.append(Part(f"judging {arm.label}", 1, JUDGING, None, folder / "evaluation.json"))
    return [*tuned, *judged]


class Course:
    """The bar over all seeds.

    Args:
        seeds: the parts of each seed.
    """

    def __init__(self, seeds: Mapping[int, list[Part]]):
        self.seeds, self.ended = seeds, False
        self.line = ProgressLine("quickstart", sum(x.steps * x.cost for parts in seeds.values() for x in parts))

    def show(self, seed: int, doing: str, metrics: Mapping[str, float]) -> None:
        """Shows how far all seeds are, which one is at work, and what it does."""
        if self.ended:
            return
        where = f"seed {list(self.seeds).index(seed) + 1} of {len(self.seeds)}" if len(self.seeds) > 1 else ""
        done = sum(part.done for parts in self.seeds.values() for part in parts)
        self.ended = done == self.line.total
        self.line.update(done, metrics, ", ".join(filter(None, [where, doing])))
