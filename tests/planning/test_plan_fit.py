"""The sizes with which a run fits: the largest, found with few compilations, and the lines for the config."""

import dataclasses
import functools
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from pixel_jax.config import load
from pixel_jax.parallel.mesh import make_mesh
from pixel_jax.planning import fit
from pixel_jax.planning import search as search_module
from pixel_jax.planning.fit import MOST, enlarge, largest, lines, settings, shortfall
from pixel_jax.planning.machines import machine
from pixel_jax.planning.search import Compiled, Plan, candidates, plan, search
from pixel_jax.train_config import TrainConfig
from tests.planning.small_recipe import recipe

LEAST = dataclasses.replace(recipe(), together=1)
SIZES = st.lists(st.integers(1, 10_000), min_size=1, max_size=40, unique=True).map(sorted)


def found(sizes, needs, capacity, second=None):
    """The answer, and the sizes that were measured for it."""
    measured = [sizes[0]]

    def needed(size):
        measured.append(size)
        return needs(size)

    second = sizes[min(1, len(sizes) - 1)] if second is None else second
    return largest(sizes, needed, capacity, known={sizes[0]: needs(sizes[0])}, second=second), measured


@given(SIZES, st.floats(0, 1e6), st.floats(1, 1e3), st.floats(0, 1e7), st.data())
def test_of_needs_on_a_line_the_largest_is_found_with_three(sizes, base, slope, capacity, data):
    needs = lambda size: base + slope * size
    fitting = [size for size in sizes if needs(size) <= capacity]
    if any(abs(needs(size) - capacity) < 1e-6 * capacity for size in sizes):
        return  # rounding decides
    answer, measured = found(sizes, needs, capacity, data.draw(st.sampled_from(sizes[1:] or sizes)))
    assert answer == max(fitting, default=None) and len(measured) <= 3


@given(SIZES, st.lists(st.floats(0, 1e3), min_size=40, max_size=40), st.floats(0, 2e4), st.booleans())
def test_whatever_the_needs_the_answer_was_measured_and_fits(sizes, steps, capacity, unknown):
    needs = dict(zip(sizes, (sum(steps[: i + 1]) for i in range(len(sizes))), strict=True))
    needs = {size: math.inf if unknown and need > capacity else need for size, need in needs.items()}
    answer, measured = found(sizes, needs.get, capacity)
    assert len(measured) == len(set(measured)) <= MOST
    if needs[sizes[0]] > capacity:
        assert answer is None
    else:
        assert answer == max(size for size in measured if needs[size] <= capacity)


def test_the_sizes_of_a_recipe():
    small = recipe()
    assert small.sizes("update", 2) == [1, 2, 4] and small.sizes("sft", 8) == [1]
    assert small.sizes("rollout", 1) == [1, 2, 3, 4, 8]  # in eight, four, three, two rounds and one
    assert [LEAST.in_flight(shards) for shards in (1, 2, 8)] == [1, 2, 8] and small.in_flight(2) == 4
    flying = dataclasses.replace(small, together=3).flying(2)
    assert flying.config.rl.rollout.in_flight == 6 and flying.in_flight(2) == 6
    mesh = make_mesh({"data": 2}, machine("cpu:2").devices)
    assert LEAST.micro_batches("update", mesh) == 4
    assert dataclasses.replace(small, together=2).micro_batches("update", mesh) == 2
    for mesh in candidates(LEAST, "rollout", machine("cpu:8")):
        assert small.config.rl.prompts % (mesh["data"] * mesh["fsdp"]) == 0


class Compiler:
    """Instead of `plan`: of a line in what a shard takes at a time."""

    def __init__(self, monkeypatch, **lines):
        self.lines, self.tried = lines, []
        for module in (search_module, fit):
            monkeypatch.setattr(module, "plan", self)
            monkeypatch.setattr(module, "resident_bytes", lambda *_: 1000)

    def __call__(self, recipe, step, target, mesh):
        self.tried.append((step, recipe.together))
        base, slope = self.lines[step]
        need, shards = base + slope * recipe.together, mesh["data"] * mesh["fsdp"]
        size = {"in_flight": recipe.together * shards}
        if step != "rollout":
            size = {"micro_batches": recipe.rows(step) // shards // recipe.together}
        fits = need <= target.chip.memory
        return Compiled(Plan(target.name, step, mesh | size, fits, need, 1.0, 1.0, {}, 1.0, "compute"), {}, 0.0)


def of(capacity):
    target = machine("cpu:2")
    return target._replace(chip=target.chip._replace(memory=capacity))


def test_updates_and_scores_have_the_micro_batches_of_the_one_that_needs_more(monkeypatch):
    compiler = Compiler(monkeypatch, update=(1000, 500), score=(100, 800), rollout=(0, 900))
    config = dataclasses.replace(LEAST.config, mesh={"data": 2}, rollout_mesh={"data": 2})
    least = dataclasses.replace(LEAST, config=config, configured=True)
    target, steps, made = of(3000 + 1000), ["update", "score", "rollout"], []
    run = search(least, steps, target, fitting=1, most=1)
    run = enlarge(least, run, target, report=made.append)
    assert all(compiled.plan.fits for compiled in run.values())
    assert settings(run) == {
        "mesh": {"data": 2},
        "rl.forward.micro_batches": 2,
        "rollout_mesh": {"data": 2},
        "rl.rollout.in_flight": 4,
    }
    assert sorted(set(compiler.tried)) == sorted(compiler.tried)  # nothing twice
    # The memory that a run holds besides counts: without it four rows of a score would have fitted.
    assert [(c.plan.step, c.plan.bytes_per_chip) for c in made if not c.plan.fits] == [("score", 100 + 3200 + 1000)]


def test_the_lines_are_settings_of_a_config(monkeypatch):
    Compiler(monkeypatch, update=(0, 1), score=(0, 1), rollout=(0, 1), sft=(0, 1))
    values = {"model": "none", "data": "none", "out": "none", "sft": {}, "rl": {"prompts": 8, "train_batch": 8}}
    values["rl"] |= {"iterations": 1, "forward": {}, "rollout": {}}
    values["sft"] = {"steps": 1, "batch_size": 8, "forward": {}}
    for steps in (["sft"], ["update", "score", "rollout"]):
        run = search(LEAST, steps, of(1e9), fitting=1, most=1)
        config = ConfigDict(values)
        config.mesh, config.rollout_mesh = ConfigDict(), ConfigDict()
        for line in lines(run):
            exec(line, {"config": config})
        loaded = load(TrainConfig, config)
        phase = loaded.sft if steps == ["sft"] else loaded.rl
        assert loaded.mesh and phase.forward.micro_batches >= 1
        if steps != ["sft"]:
            assert loaded.rollout_mesh and loaded.rl.rollout.in_flight == run["rollout"].plan.sharding["in_flight"]


def test_what_lacks_is_said_where_nothing_fits(monkeypatch):
    Compiler(monkeypatch, update=(5 * 2**30, 0), score=(0, 1), rollout=(0, 1))
    target, made = of(2**30), []
    steps = ["update", "score", "rollout"]
    assert search(LEAST, steps, target, fitting=1, most=2, report=made.append) == {}
    said = shortfall(made, target, steps, fitted=True)
    assert re.match(
        r"Nothing fits on cpu:2, where a program may use 1.0 GiB: update needs 5.0 GiB a chip. What helps: m", said
    )
    assert "--fit" not in said and "--fit" in shortfall(made, target, steps, fitted=False)


def compiled_once(monkeypatch):
    """Lets no program be compiled twice; returns what was."""
    tried = []

    @functools.cache
    def once(step, together, target, mesh):
        tried.append((step, together))
        return plan(dataclasses.replace(LEAST, together=together), step, machine(target), dict(mesh))

    def cached(recipe, step, target, mesh):
        made = once(step, recipe.together, target.name, tuple(mesh.items()))
        return dataclasses.replace(
            made, plan=dataclasses.replace(made.plan, fits=made.plan.bytes_per_chip <= target.chip.memory)
        )

    for module in (search_module, fit):
        monkeypatch.setattr(module, "plan", cached)
    return tried


@pytest.mark.parametrize(
    "step, sizes", [("score", [1, 2, 4]), pytest.param("rollout", [1, 2, 4], marks=pytest.mark.slow)]
)
def test_real_programs_fit_as_large_as_they_can(monkeypatch, step, sizes):
    """Of a small network on two devices: with room for the second size and a bit more, the third is not tried."""
    tried = compiled_once(monkeypatch)
    run = search(LEAST, [step], machine("cpu:2"), fitting=1, most=1)
    mesh, least = run[step].plan.mesh, run[step].plan.bytes_per_chip
    shards = mesh["data"] * mesh["fsdp"]
    assert LEAST.sizes(step, shards)[:2] == sizes[:2]
    more = fit.plan(dataclasses.replace(LEAST, together=2), step, machine("cpu:2"), mesh).plan
    grown = more.bytes_per_chip + least - fit.plan(LEAST, step, machine("cpu:2"), mesh).plan.bytes_per_chip
    assert grown > least
    target = of(grown + 0.5 * (grown - least))
    run = enlarge(LEAST, run, target)
    expected = {"in_flight": 2 * shards} if step == "rollout" else {"micro_batches": 8 // shards // 2}
    assert run[step].plan.fits and run[step].plan.sharding == mesh | expected
    assert {size for _, size in tried} <= set(sizes)
