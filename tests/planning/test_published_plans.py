"""The tables of docs/planning.md about GPUs are those of the plans in docs/."""

import json
import pathlib

import pytest

from pixel_jax.planning.gpus import GPUS
from pixel_jax.planning.machines import GIB
from pixel_jax.planning.report import mesh
from pixel_jax.planning.search import Plan

DOCS = pathlib.Path(__file__).parents[2] / "docs"
STEPS = {"sft": "warm start", "update": "RL update", "score": "scoring", "rollout": "rollout"}
PLANS = sorted(path for path in DOCS.glob("plan-*.json") if path.stem.split("-")[-1] in GPUS)


def rows(path: pathlib.Path) -> list[str]:
    """The rows of the table: a plan of each step that fits."""
    found, written = json.loads(path.read_text()), []
    for steps in found["best"].values():
        for step in sorted(steps, key=list(STEPS).index):
            plan = Plan(**found["plans"][steps[step]["plan"]])
            flops, moved, sent = plan.counted
            numbers = (
                f"{plan.bytes_per_chip / GIB:.1f}",
                *(f"{x:.3g}" for x in (moved / 1e12, sent / 1e9, plan.between_nodes / 1e9, plan.predicted_seconds)),
            )
            memory, *others = numbers
            cells = [
                f"{path.stem.split('-')[1].upper()} {STEPS[step]}, {plan.topology}",
                mesh(plan),
                memory,
                f"{flops / 1e12:.0f}",
                *others,
                plan.bound,
            ]
            written.append(f"| {' | '.join(cells)} |")
    return written


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_plan_is_in_the_table(path):
    text = (DOCS / "planning.md").read_text().splitlines()
    for row in rows(path):
        assert row in text


def test_gpus_have_a_plan():
    assert PLANS and all(rows(path) for path in PLANS)


if __name__ == "__main__":  # writes the rows, for the page
    print("\n".join(row for path in PLANS for row in rows(path)))
