"""The real steps, from shapes alone: their arguments are those of a run, their work that of the formula, their memory counted."""

import dataclasses
import functools
import importlib.util
import json
import math
import pathlib

import jax
import numpy as np
import pytest

from pixel_jax.config import load
from pixel_jax.models import Qwen2_5_VL
from pixel_jax.models.flops import Work, forward_flops, padded_work, training_flops
from pixel_jax.models.released import released
from pixel_jax.parallel import make_mesh, shard_batch
from pixel_jax.parallel.sharding import shardings
from pixel_jax.planning import report
from pixel_jax.planning import search as search_module
from pixel_jax.planning.hlo import Counter
from pixel_jax.planning.machines import CHIPS, machine, slices
from pixel_jax.planning.programs import (
    abstract_model,
    abstract_state,
    build,
    bytes_per_device,
    prompt_arrays,
    sft_batch,
)
from pixel_jax.planning.search import Compiled, Plan, candidates, compile_to_text, plan, search, times
from pixel_jax.planning.weak_scaling import Point, with_rows
from pixel_jax.rollout.machine import READ_CHUNK, budgets
from pixel_jax.rollout.rollout import rollout
from pixel_jax.rollout.trajectory import to_host
from pixel_jax.train import LoRAConfig, TrainConfig
from pixel_jax.training.batch import from_trajectories
from pixel_jax.training.optimizer import make_optimizer
from pixel_jax.training.packing import pack
from pixel_jax.training.state import init_state
from tests.planning.small_recipe import recipe
from unlearn_jax.objective import Objective
from unlearn_jax.vision_language import adapter_loss, examples

CONFIGS = pathlib.Path(__file__).parents[2] / "configs" / "pixel"
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
FIELDS = ("topology", "step", "sharding", "fits", "bytes_per_chip", "flops_per_chip", "bytes_moved", "collectives")
FIELDS += ("seconds", "bound")


@functools.cache
def compiled(step, **mesh):
    return plan(recipe(), step, machine("cpu:8"), mesh or MESH)


def add(a: Work, b: Work) -> Work:
    return Work(*map(sum, zip(a, b, strict=True)))


def rolled_out(small):
    """The rows of one rollout, of questions about nothing."""
    prompts = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), prompt_arrays(small)._replace(tables=()))
    prompts = prompts._replace(
        tables=small.tables,
        length=np.full_like(prompts.length, 8),
        canvas_size=np.full_like(prompts.canvas_size, 56),
        num_canvases=np.ones_like(prompts.num_canvases),
    )
    model = Qwen2_5_VL(small.network, jax.random.key(0))
    found = to_host(rollout(model, prompts, jax.random.key(0), small.config.rl.rollout))
    return jax.tree.map(lambda x: x[: small.config.rl.train_batch], found)


def packed_rows(small):
    """A batch that the packing of `pixel-jax sft` has made."""
    config = small.config
    zeros = lambda x: np.zeros(
        (x.shape[0], 8, *x.shape[2:]) if x.shape[1:2] == (config.trace_tokens,) else x.shape, x.dtype
    )
    rows = jax.tree.map(zeros, sft_batch(small, packed=False))
    rows.valid[:], rows.weight[:] = True, 1
    rows.visual.slices[:, 0], rows.visual.slices[:, 1:], rows.visual.grids[:, 0] = 0, -1, 1
    batch = pack(rows, length=config.trace_tokens, slices=config.trace_frames, frames=config.trace_frames)
    return jax.tree.map(lambda x: np.repeat(x, config.sft.batch_size, axis=0)[: config.sft.batch_size], batch)


@pytest.mark.parametrize("step", ["sft", "update"])
def test_abstract_arguments_are_those_of_a_run(step):
    mesh, small = make_mesh(MESH), recipe()
    phase = small.config.sft if step == "sft" else small.config.rl
    model = Qwen2_5_VL(small.network, jax.random.key(0))
    steps = phase.steps if step == "sft" else phase.iterations * phase.updates
    state = init_state(model, make_optimizer(phase.optimizer, steps), trainable=phase.trainable, mesh=mesh)
    batch = packed_rows(small) if step == "sft" else from_trajectories(rolled_out(small), np.ones(8, np.float32))
    batch = shard_batch(batch, mesh)
    expected = build(small, step, mesh).arguments
    assert jax.tree.structure(expected) == jax.tree.structure((state, batch))
    for imagined, real in zip(jax.tree.leaves(expected), jax.tree.leaves((state, batch)), strict=True):
        assert (imagined.shape, imagined.dtype) == (real.shape, real.dtype)
        assert real.sharding.is_equivalent_to(imagined.sharding, real.ndim)


@functools.cache
def adapted():
    lora = LoRAConfig(rank=4, alpha=8.0, targets=r"model\.layers\..*")
    return dataclasses.replace(recipe(), config=dataclasses.replace(recipe().config, lora=lora))


def test_an_unlearning_step_is_that_of_an_edit():
    mesh, small = make_mesh(MESH), adapted()
    assert small.steps == ("sft", "unlearn", "update", "score", "rollout")
    zeros = lambda x: np.zeros(x.shape, x.dtype)
    batch = jax.tree.map(zeros, sft_batch(small, packed=False))
    batch.tokens[:, :] = batch.valid[:, :] = batch.chosen[:, 1:] = True
    batch.visual.slices[:] = np.arange(2)[None, :, None]
    batch.visual.grids[:] = (1, 4, 8)
    model = abstract_model(small)
    model = jax.tree.map(lambda x, place: jax.device_put(zeros(x), place), model, shardings(model, mesh))
    loss, adapter = adapter_loss(model)
    rows = examples(batch)
    rows.pop("id")
    real = (Objective.of(loss, rows, np.ones(8, np.float32), micro_batch=4, mesh=mesh), adapter, adapter)
    expected = build(small, "unlearn", mesh).arguments
    assert jax.tree.structure(expected) == jax.tree.structure(real)
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for (path, imagined), found in zip(paths, jax.tree.leaves(real), strict=True):
        name = jax.tree_util.keystr(path)
        if "places" not in name and "labels" not in name and "loss_mask" not in name:  # as wide as the rows need
            assert (imagined.shape, imagined.dtype) == (found.shape, found.dtype), name


def test_flops_of_an_unlearning_step():
    """Rows forward with a tangent, backward once; with blocks computed again on the way back."""
    small = adapted()
    found = plan(small, "unlearn", machine("cpu:8"), MESH).plan
    forward = sum(forward_flops(small.network, padded_work(8, small.length("sft"), 2, 32, small.network)))
    assert 4 * forward < 8 * found.flops_per_chip < 7 * forward


@pytest.mark.parametrize("step", ["sft", "update", "score"])
def test_flops_are_those_of_the_formula(step):
    small, found = recipe(), compiled(step).plan
    work = padded_work(8, small.length(step), 2, 32, small.network)
    forward = forward_flops(small.network, work)
    if step == "score":
        by_hand = sum(forward)
    else:
        by_hand = sum(training_flops(small.network, work, vision=step == "update", remat=True))
        by_hand += forward.attention / 2  # the memory-linear backward pass computes the scores once more
    assert found.flops_per_chip * 8 == pytest.approx(by_hand, rel=0.1)


@pytest.mark.slow
def test_a_rollout_counts_its_turns():
    """Work grows with each loop's turns as the formula says. (That of the crops themselves, a CPU's, is left out.)"""
    small, mesh = recipe(), make_mesh(MESH)
    # A row of each shard at a time: where all fit into one turn, the compiler takes their work out of the loop.
    config = dataclasses.replace(small.config.rl.rollout, observe_chunk=1)
    rl = dataclasses.replace(small.config.rl, rollout=config)
    small = dataclasses.replace(small, config=dataclasses.replace(small.config, rl=rl))
    program = build(small, "rollout", mesh)
    memory, text = compile_to_text(program)
    # A group of slots keeps the prompts of two questions where others wait, and its rows look at both.
    rows, keys = 4 * config.group_size, 2 * small.config.prompt_width + config.max_response
    waves = small.config.rl.prompts // config.in_flight
    turns, calls = waves * (config.max_calls + 1), waves * config.max_calls

    def more(scope):
        """Work of one turn more of a loop, on all devices."""
        once, twice = (Counter(text, {**program.turns, scope: n}).total().flops for n in (1, 2))
        return 8 * (twice - once)

    def by_hand(tokens, predictions=0, slices=0, patches=0):
        work = Work(tokens, tokens * keys, predictions, 0, 0, 0)
        return sum(forward_flops(small.network, add(work, padded_work(slices, 0, 1, patches, small.network))))

    assert program.turns["tokens"] == config.max_new_tokens  # there is room for every turn
    assert more("tokens") == pytest.approx(turns * by_hand(rows, predictions=rows), rel=0.1)
    assert more("pieces") == pytest.approx(calls * by_hand(rows * READ_CHUNK), rel=0.1)
    shape = program.options["shape"]
    assert more("views") > calls * by_hand(0, slices=shape.shards, patches=budgets(config, shape)[2].patches)
    # The state of training stays where it is, whatever the rollout's mesh: split over all devices, or as the update has it.
    other = make_mesh({"data": 4, "tensor": 2})
    assert program.resident == build(small, "rollout", other).resident
    assert program.resident < build(small, "rollout", other, {"data": 8}).resident
    assert memory > bytes_per_device(program.arguments[:2])
    assert small.rows("rollout") == waves * rows and program.arguments[1].tokens.shape[0] == waves * config.in_flight


def test_a_rollout_reads_weights_of_the_type_that_training_computes_in():
    small = recipe()
    forward = dataclasses.replace(small.config.rl.forward, compute_dtype="bfloat16")
    changed = dataclasses.replace(small.config, rl=dataclasses.replace(small.config.rl, forward=forward))
    model = build(dataclasses.replace(small, config=changed), "rollout", make_mesh(MESH)).arguments[0]
    assert {x.dtype.name for x in jax.tree.leaves(model)} == {"bfloat16"}


def test_memory_is_the_programs_and_what_stays_beside_it():
    small, mesh = recipe(), make_mesh(MESH)
    state = abstract_state(small, small.config.rl, 1, mesh)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert whole / 8 < bytes_per_device(state) < whole / 3  # some weights are too small to be split by all axes
    assert compiled("update").plan.bytes_per_chip > bytes_per_device(state)
    score = build(small, "score", mesh)
    assert score.resident == bytes_per_device(state.opt_state)
    assert compiled("score").plan.bytes_per_chip > score.resident + bytes_per_device(score.arguments)
    # Adapters alone are trained, and rollouts have a mesh of their own: the frozen weights are there twice.
    rl = dataclasses.replace(small.config.rl, trainable=".*lora_")
    lora = dataclasses.replace(adapted().config, rl=rl, rollout_mesh={"data": 8})
    lora = dataclasses.replace(small, config=lora)
    frozen = abstract_state(lora, rl, 1, mesh).rest
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(frozen))
    assert build(lora, "update", mesh).resident == whole


def test_candidates_divide_everything():
    small, target = recipe(), machine("cpu:8")
    found = candidates(small, "update", target)
    assert {tuple(sorted(mesh.items())) for mesh in found} == {tuple(sorted(mesh.items())) for mesh in map(dict, found)}
    assert len(found) == len({tuple(mesh.items()) for mesh in found}) > 4
    for mesh in found:
        assert np.prod(list(mesh.values())) == 8
        assert mesh["tensor"] <= small.network.text.num_key_value_heads
    assert candidates(small, "rollout", target)[0]["fsdp"] == 1  # decoding does not gather weights at every token
    odd = dataclasses.replace(small.network.vision, hidden_size=36, num_heads=3)  # eight do not divide it
    odd = dataclasses.replace(small, network=dataclasses.replace(small.network, vision=odd))
    split = [mesh["fsdp"] * mesh["sequence"] for mesh in candidates(odd, "update", target)]
    assert max(split) == 4 < max(mesh["fsdp"] * mesh["sequence"] for mesh in found)
    tuning = dataclasses.replace(small, config=dataclasses.replace(small.config, rl=None, trace_tokens=510))
    with pytest.raises(ValueError, match="sft: 3 rows and the weights cannot be split over cpu:8"):
        next(search(with_rows(tuning, 3), "sft", target, fitting=1, most=1))


def test_the_search_stops_when_enough_fit_and_reports_what_does_not(monkeypatch):
    target = machine("cpu:8")
    assert [c.plan.fits for c in search(recipe(), "score", target, fitting=1, most=3)] == [True]
    small = target._replace(chip=target.chip._replace(memory=1000))
    assert [c.plan.fits for c in search(recipe(), "score", small, fitting=1, most=2)] == [False, False]


def test_what_is_sure_not_to_fit_is_not_compiled(monkeypatch):
    """After a mesh that does not fit, those on which a device holds no less."""
    target, tried = machine("cpu:8"), []

    def full(recipe, step, machine, mesh, trained):
        tried.append(dict(mesh))
        return Compiled(Plan("", step, mesh, False, *[None] * 6), {}, 0.0)

    monkeypatch.setattr(search_module, "plan", full)
    made = list(search(recipe(), "update", target, fitting=1, most=100))
    assert len(made) == len(tried) < len(candidates(recipe(), "update", target))
    part = lambda mesh: (mesh["sequence"] * mesh["tensor"], mesh["fsdp"] * mesh["sequence"] * mesh["tensor"])
    for i, mesh in enumerate(tried):
        assert not any(part(mesh)[0] <= part(x)[0] and part(mesh)[1] <= part(x)[1] for x in tried[:i])


def test_the_document_has_the_promised_fields():
    made = [compiled("update"), compiled("update", data=1, fsdp=8, tensor=1), compiled("score")]
    found = json.loads(json.dumps(report.document(made)))
    assert [tuple(x) for x in found["plans"]] == [FIELDS] * 3
    fastest = min((0, 1), key=lambda i: found["plans"][i]["seconds"])
    assert found["best"]["cpu:8"]["update"]["plan"] == fastest
    for x in found["plans"]:
        assert x["fits"] is True and x["bound"] in ("compute", "memory", "links") and x["seconds"] > 0
    for c in made:
        each = times(c.plan, machine("cpu:8"))
        assert c.plan.seconds == max(each) == getattr(each, c.plan.bound)
    assert report.table(made).row_count == 2


def test_scoring_is_planned_where_the_update_was():
    target, trained = machine("cpu:8"), {"data": 1, "fsdp": 8, "sequence": 1, "tensor": 1}
    (found,) = search(recipe(), "score", target, fitting=1, most=3, trained=trained)
    assert {axis: found.plan.sharding[axis] for axis in trained} == trained


PUBLISHED = pathlib.Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    "name", ["plan-7b-sft", "plan-7b-rl-v5p", "plan-7b-rl-v5e", "plan-7b-rl-v6e", "plan-72b-rl-v5p"]
)
def test_flops_of_published_plans_are_those_of_hand_arithmetic(name):
    """The formula, and three products more for each pair of positions: splash attention's backward pass computes scores, and
    the products with values and their cotangents, a second time."""
    phase, size = ("sft" if "sft" in name else "rl"), name.split("-")[1]
    spec = importlib.util.spec_from_file_location("config", CONFIGS / f"qwen2_5_vl_{size}_{phase}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = load(TrainConfig, module.get_config())
    network = released(config.architecture)
    for found in json.loads((PUBLISHED / f"{name}.json").read_text())["plans"]:
        if not found["fits"] or found["step"] == "rollout":
            continue
        if phase == "sft":
            rows, length = config.sft.batch_size, config.trace_tokens
            work = padded_work(rows, length, config.trace_frames, config.trace_patches, network)
        else:
            rows, length = config.rl.train_batch, config.prompt_width + config.rl.rollout.max_response
            shown = 4 * config.rl.rollout.max_pixels // 28**2
            work = padded_work(rows, length, 1 + config.rl.rollout.max_calls, shown, network)
        forward = forward_flops(network, work)
        by_hand = sum(forward)
        if found["step"] != "score":
            by_hand = sum(training_flops(network, work, vision=phase == "rl", remat=True)) + 1.5 * forward.attention
        chips = math.prod(map(int, found["topology"].split(":")[1].split("x")))
        assert found["flops_per_chip"] * chips == pytest.approx(by_hand, rel=0.1), found["step"]


def test_weak_scaling_is_in_the_document_and_in_a_table():
    made, target = compiled("update"), machine("cpu:8")
    none = Compiled(Plan("cpu:8", "update", made.plan.sharding, False, *[None] * 6), {}, 0.0)
    points = [Point(made, times(made.plan, target), 96), Point(none, None, 96)]
    fits, not_fits = json.loads(json.dumps(report.document([], points)))["scaling"]
    assert fits["rate"] == 96 / made.plan.seconds and fits["times"][made.plan.bound] == made.plan.seconds
    assert not_fits["rate"] is None and not_fits["fits"] is False
    assert report.scaling_table(points, "update").row_count == 2


def test_names_of_machines():
    for name in ("v5p", "v9:2x2", "v5e:2x2x2", "cpu:64"):
        with pytest.raises(ValueError, match=name):
            machine(name)
    for kind in set(CHIPS) - {"cpu"}:
        for chips, name in slices(kind).items():
            assert np.prod([int(x) for x in name.split(":")[1].split("x")]) == chips


def test_weak_scaling_keeps_a_row_a_chip():
    for rows in (8, 1024):
        scaled = with_rows(recipe(), rows).config
        assert scaled.sft.batch_size == scaled.rl.train_batch == rows
        assert scaled.rl.updates == recipe().config.rl.updates
        assert dataclasses.replace(scaled, sft=None, rl=None) == dataclasses.replace(recipe().config, sft=None, rl=None)
