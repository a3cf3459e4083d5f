"""The real steps, from shapes alone: their arguments are those of a run, their work that of the formula, their memory counted."""

import dataclasses
import functools
import json
import math
import pathlib
import runpy

import jax
import numpy as np
import pytest

from pixel_jax.config import load
from pixel_jax.models import LanguageModel
from pixel_jax.models.attention import CACHE_TILE
from pixel_jax.models.flops import Work, forward_flops, padded_work, training_flops
from pixel_jax.models.lora import add_lora
from pixel_jax.models.peft import save_adapter
from pixel_jax.models.released import released
from pixel_jax.parallel import make_mesh, shard_batch
from pixel_jax.planning import report
from pixel_jax.planning import search as search_module
from pixel_jax.planning.hlo import WorkCounter
from pixel_jax.planning.machines import CHIPS, machine, slices
from pixel_jax.planning.programs import (
    abstract_state,
    build,
    bytes_per_device,
    prompt_arrays,
    resident,
    rollout_shape,
    sft_batch,
)
from pixel_jax.planning.search import (
    Compiled,
    Plan,
    candidates,
    compile_to_text,
    plan,
    resident_bytes,
    search,
    times,
)
from pixel_jax.planning.weak_scaling import Point, with_rows
from pixel_jax.rollouts.decode_loop import READ_CHUNK, observation_width
from pixel_jax.rollouts.images import ragged
from pixel_jax.rollouts.materialize import materialize
from pixel_jax.rollouts.rollout import rollout
from pixel_jax.rollouts.shapes import budgets
from pixel_jax.rollouts.trajectory import HostPrompts, take_rows, to_host
from pixel_jax.train_config import LoRAConfig, TrainConfig
from pixel_jax.training.batch import from_trajectories, pack
from pixel_jax.training.optimizer import make_optimizer
from pixel_jax.training.state import init_state
from tests.planning.small_recipe import recipe

CONFIGS = pathlib.Path(__file__).parents[2] / "configs" / "pixel"
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
FIELDS = ("topology", "step", "sharding", "fits", "bytes_per_chip", "flops_per_chip", "bytes_moved", "collectives")
FIELDS += ("seconds", "bound", "between_nodes")


@functools.cache
def compiled(step, **mesh):
    return plan(recipe(), step, machine("cpu:8"), mesh or MESH)


def add(a: Work, b: Work) -> Work:
    return Work(*map(sum, zip(a, b, strict=True)))


def rolled_out(small):
    """The rows of one rollout, of questions about nothing."""
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), prompt_arrays(small)._replace(tables=(), buffers=()))
    count, shape = len(zeros.length), rollout_shape(small, 1)
    alike = zeros._asdict() | {"tables": small.tables, "length": np.full(count, 8, np.int32)}
    alike |= {"image_sizes": np.full_like(zeros.image_sizes, 56), "image_counts": np.ones(count, np.int32)}
    alike.pop("buffers")
    images = ragged([[np.zeros((56, 56, 3), np.uint8)]] * count)
    prompts, limits = HostPrompts(images=images, shape=shape.prompts, **alike), small.config.rl.rollout
    model = LanguageModel(small.network, jax.random.key(0))
    found = take_rows(rollout(model, prompts, jax.random.key(0), limits), slice(small.config.rl.train_batch))
    found = to_host(found)
    return found._replace(visual=materialize(found.visual, images[found.prompt], shape, limits))


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
    model = LanguageModel(small.network, jax.random.key(0))
    steps = phase.steps if step == "sft" else phase.iterations * phase.updates
    state = init_state(model, make_optimizer(phase.optimizer, steps), trainable=phase.trainable, mesh=mesh)
    batch = packed_rows(small) if step == "sft" else from_trajectories(rolled_out(small), np.ones(8, np.float32))
    batch = shard_batch(batch, mesh)
    expected = build(small, step, mesh).arguments
    assert jax.tree.structure(expected) == jax.tree.structure((state, batch))
    for imagined, real in zip(jax.tree.leaves(expected), jax.tree.leaves((state, batch)), strict=True):
        assert (imagined.shape, imagined.dtype) == (real.shape, real.dtype)
        assert real.sharding.is_equivalent_to(imagined.sharding, real.ndim)


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
        once, twice = (WorkCounter(text, {**program.turns, scope: n}).total().flops for n in (1, 2))
        return 8 * (twice - once)

    def by_hand(tokens, predictions=0, slices=0, patches=0):
        work = Work(tokens, tokens * keys, predictions, 0, 0, 0)
        return sum(forward_flops(small.network, add(work, padded_work(slices, 0, 1, patches, small.network))))

    assert program.turns["tokens"] == config.max_new_tokens  # there is room for every turn
    assert more("tokens") == pytest.approx(turns * by_hand(rows, predictions=rows), rel=0.1)
    assert more("pieces") == pytest.approx(calls * by_hand(rows * READ_CHUNK), rel=0.1)
    shape = program.options["shape"]
    assert more("readers") > calls * by_hand(0, slices=shape.shards, patches=budgets(config, shape)[1].patches)
    assert memory > bytes_per_device(program.arguments[:2])
    assert small.rows("rollout") == waves * rows and program.arguments[1].tokens.shape[0] == waves * config.in_flight


@pytest.mark.slow
def test_what_is_shown_is_embedded_for_few_rows_at_a_time():
    """Embedded observations of all 8 rows in flight would need as much memory as a seventh of a 7B's caches."""
    small, mesh = recipe(), make_mesh({"data": 1}, jax.devices()[:1])
    limits = dataclasses.replace(small.config.rl.rollout, observe_chunk=3)
    config = dataclasses.replace(small.config, rl=dataclasses.replace(small.config.rl, rollout=limits))
    small = dataclasses.replace(small, config=config)
    text = build(small, "rollout", mesh).lower().as_text()
    width = observation_width(small.tables.observations, limits, rollout_shape(small, 1))
    embedded = f"x{width}x{small.network.text.hidden_size}xf32>"
    assert f"tensor<3{embedded}" in text and f"tensor<8{embedded}" not in text
    assert limits.in_flight * limits.group_size == 8


def test_a_rollout_reads_weights_of_the_type_that_training_computes_in():
    small = recipe()
    forward = dataclasses.replace(small.config.rl.forward, compute_dtype="bfloat16")
    changed = dataclasses.replace(small.config, rl=dataclasses.replace(small.config.rl, forward=forward))
    model = build(dataclasses.replace(small, config=changed), "rollout", make_mesh(MESH)).arguments[0]
    assert {x.dtype.name for x in jax.tree.leaves(model)} == {"bfloat16"}


def adapters_alone():
    rl = dataclasses.replace(recipe().config.rl, trainable=".*lora_")
    lora = LoRAConfig(rank=4, alpha=8.0, targets=r"model\.layers\..*")
    return dataclasses.replace(recipe(), config=dataclasses.replace(recipe().config, rl=rl, lora=lora))


def test_memory_is_the_programs_and_what_stays_beside_it():
    small, mesh = recipe(), make_mesh(MESH)
    state = abstract_state(small, small.config.rl, 1, mesh)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert whole / 8 < bytes_per_device(state) < whole / 3  # some weights are too small to be split by all axes
    assert compiled("update").plan.bytes_per_chip > bytes_per_device(state)
    spread, rows = make_mesh({"fsdp": 8}), make_mesh({"data": 8})
    assert resident(small, "update", mesh, rows) == 0
    assert resident(small, "score", mesh, rows) == bytes_per_device(state.opt_state)
    # In a rollout all of the state stays where it is trained, and what is read where it lies is not there twice.
    assert resident(small, "rollout", mesh, rows) == resident(small, "rollout", mesh, spread) == bytes_per_device(state)
    assert resident(small, "rollout", mesh, mesh) == bytes_per_device((state.opt_state, state.step))
    assert resident(small, "rollout", rows, mesh) > 7 * resident(small, "rollout", spread, mesh)
    # Adapters alone are trained, and rollouts have a mesh of their own: the frozen weights are there twice.
    lora = adapters_alone()
    frozen = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract_state(lora, lora.config.rl, 1, mesh).rest))
    moments = bytes_per_device(abstract_state(lora, lora.config.rl, 1, mesh).opt_state)
    assert resident(lora, "update", mesh, rows) == frozen
    assert resident(lora, "score", mesh, rows) == frozen + moments
    assert resident(lora, "update", mesh, mesh) == 0


def test_an_adapter_that_is_gone_on_with_is_planned_by_its_own_ranks(tmp_path):
    fresh, mesh = adapters_alone(), make_mesh(MESH)
    lora = fresh.config.lora
    model = LanguageModel(recipe().network, jax.random.key(0))
    save_adapter(add_lora(model, jax.random.key(1), **dataclasses.asdict(lora)), tmp_path)
    config = dataclasses.replace(fresh.config, lora=None, adapter=str(tmp_path))
    found = dataclasses.replace(fresh, config=config)
    known, planned = (jax.tree.leaves(abstract_state(x, x.config.rl, 1, mesh)) for x in (fresh, found))
    assert [(x.shape, x.dtype, x.sharding) for x in planned] == [(x.shape, x.dtype, x.sharding) for x in known]
    nowhere = dataclasses.replace(found, config=dataclasses.replace(config, adapter="nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere is no adapter of PEFT"):
        abstract_state(nowhere, config.rl, 1, mesh)


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
        search(with_rows(tuning, 3), ["sft"], target, fitting=1, most=1)


def test_the_search_stops_when_enough_fit_and_reports_what_does_not():
    target, made = machine("cpu:8"), []
    best = search(recipe(), ["score"], target, fitting=1, most=3, report=made.append)
    assert [c.plan.fits for c in made] == [True] and best == {"score": made[0]}
    small, made = target._replace(chip=target.chip._replace(memory=1000)), []
    assert search(recipe(), ["score"], small, fitting=1, most=2, report=made.append) == {}
    assert [c.plan.fits for c in made] == [False, False]


class Compiler:
    """Instead of `plan`: programs of a given size, that take the longer the less data they split."""

    def __init__(self, monkeypatch, size):
        self.size, self.tried = size, []
        monkeypatch.setattr(search_module, "plan", self)

    def __call__(self, recipe, step, machine, mesh):
        self.tried.append((step, dict(mesh)))
        size = self.size(step)
        fits = size <= machine.chip.memory
        return Compiled(
            Plan(machine.name, step, dict(mesh), fits, size, 1.0, 1.0, {}, 1 / mesh["data"], "compute"), {}, 0.0
        )


def test_what_is_sure_not_to_fit_is_not_compiled(monkeypatch):
    """After a mesh that does not fit, those on which a device holds no less."""
    target, compiler = machine("cpu:8"), Compiler(monkeypatch, lambda step: 1e15)
    search(recipe(), ["update"], target, fitting=1, most=100)
    tried = [mesh for _, mesh in compiler.tried]
    assert 0 < len(tried) < len(candidates(recipe(), "update", target))
    part = lambda mesh: (mesh["sequence"] * mesh["tensor"], mesh["fsdp"] * mesh["sequence"] * mesh["tensor"])
    for i, mesh in enumerate(tried):
        assert not any(part(mesh)[0] <= part(x)[0] and part(mesh)[1] <= part(x)[1] for x in tried[:i])


LEARNING = ["update", "score", "rollout"]


def test_a_run_has_one_mesh_for_updates_and_scores(monkeypatch):
    compiler = Compiler(monkeypatch, lambda step: 0.0)
    best = search(recipe(), LEARNING, machine("cpu:8"), fitting=3, most=3)
    assert best["update"].plan.sharding == best["score"].plan.sharding
    updates = [mesh for step, mesh in compiler.tried if step == "update"]
    assert len(updates) == 3 and updates == [mesh for step, mesh in compiler.tried if step == "score"]
    assert best["update"].plan.sharding["data"] == max(mesh["data"] for mesh in updates)  # the fastest
    assert [step for step, _ in compiler.tried].count("rollout") == 1


def test_a_rollout_must_fit_beside_the_state_that_is_trained(monkeypatch):
    """It is compiled once; then meshes are passed over whose state leaves it no room, before they are compiled."""
    target, small, made = machine("cpu:8"), recipe(), []
    of = lambda **sizes: {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1, **sizes}
    rolled, meshes = of(data=4, tensor=2), [of(data=8), of(data=4, fsdp=2), of(fsdp=8)]
    monkeypatch.setattr(search_module, "candidates", lambda recipe, step, _: [rolled] if step == "rollout" else meshes)
    state = lambda mesh: resident_bytes(small, "rollout", target, {"update": mesh, "rollout": rolled})
    assert state(meshes[0]) > state(meshes[1]) > (least := state(meshes[2]))
    smaller = target._replace(chip=target.chip._replace(memory=1e9 + least))
    compiler = Compiler(monkeypatch, lambda step: 1e9 if step == "rollout" else 0.0)
    best = search(small, LEARNING, smaller, fitting=1, most=2, report=made.append)
    found = best["update"].plan.sharding
    assert found == meshes[2] and best["rollout"].plan.bytes_per_chip == 1e9 + least
    assert compiler.tried == [
        *(("update", meshes[0]), ("score", meshes[0]), ("rollout", rolled)),
        *(("update", found), ("score", found)),
    ]
    assert [(c.plan.step, c.plan.fits) for c in made if c.plan.step == "rollout"] == [
        ("rollout", False),
        ("rollout", True),
    ]
    document = json.loads(json.dumps(report.document(made, {"cpu:8": best})))
    assert document["plans"][document["best"]["cpu:8"]["update"]["plan"]]["sharding"] == found
    # Without a plan of the update, the config says where the state is.
    config = dataclasses.replace(small.config, mesh={"fsdp": 8})
    alone = search(dataclasses.replace(small, config=config), ["rollout"], target, fitting=1, most=1)["rollout"].plan
    assert alone.bytes_per_chip == 1e9 + least


def test_frozen_weights_that_are_there_twice_count_in_a_plan(monkeypatch):
    Compiler(monkeypatch, lambda step: 0.0)
    lora, target = adapters_alone(), machine("cpu:8")
    meshes = {step: found.plan.sharding for step, found in search(lora, LEARNING, target, fitting=1, most=1).items()}
    assert meshes["update"] != meshes["rollout"] and resident_bytes(lora, "update", target, meshes) > 0
    odd = dataclasses.replace(lora, config=dataclasses.replace(lora.config, mesh={"fsdp": 3}))
    assert resident_bytes(odd, "sft", target, {"sft": meshes["update"]}) == 0  # nothing of the config's own mesh
    # Without a plan of the rollout, the config says where it is: on the same mesh, if it says nothing.
    del meshes["rollout"]
    assert resident_bytes(lora, "update", target, meshes) == 0
    config = dataclasses.replace(lora.config, rollout_mesh={"data": 8})
    moved = {"update": {"fsdp": 8}}
    assert resident_bytes(dataclasses.replace(lora, config=config), "update", target, moved) > resident_bytes(
        lora, "update", target, moved
    )


def test_the_document_has_the_promised_fields():
    made = [compiled("update"), compiled("update", data=1, fsdp=8, tensor=1), compiled("score")]
    best = {"cpu:8": {"update": made[1], "score": made[2]}}
    found = json.loads(json.dumps(report.document(made, best)))
    assert [tuple(x) for x in found["plans"]] == [FIELDS] * 3
    assert {step: x["plan"] for step, x in found["best"]["cpu:8"].items()} == {"update": 1, "score": 2}
    for x in found["plans"]:
        assert x["fits"] is True and x["bound"] in ("compute", "memory", "links") and x["seconds"] > 0
    for c in made:
        each = times(c.plan, machine("cpu:8"))
        assert c.plan.seconds == max(each) == getattr(each, c.plan.bound)
    assert report.table(made, best).row_count == 2


PUBLISHED = sorted((pathlib.Path(__file__).parents[2] / "docs").glob("plan-*.json"))


def by_hand(step, config, network, turns):
    """Products of one call of a step, of all chips. Adapters, an edit's, are left out: one per cent."""
    if step in ("sft", "unlearn"):
        work = padded_work(
            config.sft.batch_size, config.trace_tokens, config.trace_frames, config.trace_patches, network
        )
        forward = forward_flops(network, work)
        if step == "sft":
            return sum(training_flops(network, work, vision=False, remat=True)) + kernel(forward)
        # Layers forward, with a tangent, forward again up to the last product, and backward to their inputs; attention in
        # tiles, its two products with four of the tangent, again, and five backward; the tower once, few logits.
        down = training_flops(network, work, remat=True).layers / forward.layers - 3
        tower = forward.patch_embed + forward.vision_layers + forward.vision_attention + forward.merger
        return tower + (3 + down) * forward.layers + (3 + 1 + 2.5) * forward.attention
    rollout = config.rl.rollout
    shown, seen = 4 * rollout.max_pixels // 28**2, 4 * rollout.crop_max_pixels // 28**2
    if step != "rollout":
        length = config.prompt_width + rollout.max_response
        work = padded_work(config.rl.train_batch, length, 1 + rollout.max_calls, shown, network)
        forward = forward_flops(network, work)
        return sum(forward) if step == "score" else sum(training_flops(network, work, remat=True)) + kernel(forward)
    # Every slot of the queue writes and is shown as much as the config allows; it looks at two prompts and its own cache.
    slots = rollout.in_flight * rollout.group_size
    keys = 2 * config.prompt_width + CACHE_TILE * turns["cache"]
    wrote = slots * turns["turns"] * turns["tokens"]
    shows = slots * turns["turns"] * turns["observe"]
    read = shows * turns["pieces"] * READ_CHUNK
    prompts = padded_work(config.rl.prompts, config.prompt_width, 1, shown, network)._replace(predictions=0)
    told = Work(wrote + read, (wrote + read) * keys, wrote, 0, 0, 0)
    return sum(forward_flops(network, add(add(prompts, told), padded_work(shows, 0, 1, seen, network))))


def kernel(forward):
    """Three products more for each pair of positions than the formula has: both kernels of splash attention's backward pass
    compute the scores again, and both the products of values and their cotangents."""
    return 1.5 * forward.attention


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_flops_of_published_plans_are_those_of_hand_arithmetic(path):
    found = json.loads(path.read_text())
    made = [x for x in found["plans"] + found.get("scaling", []) if x["fits"]]
    turns = [steps["rollout"]["assumed_turns"] for steps in found["best"].values() if "rollout" in steps]
    for counted in made:
        size, step = path.stem.split("-")[1], counted["step"]
        phase = "sft" if step in ("sft", "unlearn") else "rl"
        config = load(TrainConfig, runpy.run_path(CONFIGS / f"qwen2_5_vl_{size}_{phase}.py")["get_config"]())
        chips = math.prod(map(int, counted["topology"].split(":")[1].split("x")))
        if "in_flight" in counted["sharding"]:
            rollout = dataclasses.replace(config.rl.rollout, in_flight=counted["sharding"]["in_flight"])
            config = dataclasses.replace(config, rl=dataclasses.replace(config.rl, rollout=rollout))
        if "scaling" in found:  # a row a chip
            config = dataclasses.replace(config, sft=dataclasses.replace(config.sft, batch_size=chips))
        expected = by_hand(step, config, released(config.architecture), *turns or [None])
        assert counted["flops_per_chip"] * chips == pytest.approx(expected, rel=0.1), step


def test_weak_scaling_is_in_the_document_and_in_a_table():
    made, target = compiled("update"), machine("cpu:8")
    none = Compiled(Plan("cpu:8", "update", made.plan.sharding, False, *[None] * 6), {}, 0.0)
    points = [Point(made, times(made.plan, target), 96), Point(none, None, 96)]
    fits, not_fits = json.loads(json.dumps(report.document([], {}, points)))["scaling"]
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
