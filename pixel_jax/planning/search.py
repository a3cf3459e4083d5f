"""Search for a step's sharding: candidates, ordered by an estimate, are compiled until enough of them fit; the fastest wins."""

import contextlib
import dataclasses
import itertools
import math
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from pixel_jax.models.config import TextConfig
from pixel_jax.parallel.mesh import AXES, make_mesh
from pixel_jax.parallel.sharding import row_shards, undivided
from pixel_jax.planning.hlo import WorkCounter
from pixel_jax.planning.machines import Machine
from pixel_jax.planning.programs import RUN, Program, Recipe, abstract_model, bytes_per_device, resident
from pixel_jax.rollouts.layers import row_cache_bytes
from pixel_jax.terminal import Waiting

TENSOR = (1, 2, 4, 8)
HOST = "pinned_host"  # the kind of memory of the host that a device reads


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step on one machine with one sharding. Numbers are per chip and call; None where the step does not fit."""

    topology: str
    step: str
    sharding: dict[str, int]  # sizes of the mesh's axes, and micro_batches, or of a rollout in_flight
    fits: bool
    bytes_per_chip: float | None  # peak of its memory
    flops_per_chip: float | None
    bytes_moved: float | None  # to and from its memory
    collectives: dict[str, dict[str, float]] | None  # kind -> count, and bytes that it sends
    seconds: float | None
    bound: str | None  # the resource that takes these seconds: "compute", "memory", "links" or "network"
    between_nodes: float = 0.0  # of the bytes that it sends, those that go to other nodes, over the network

    @property
    def mesh(self) -> dict[str, int]:
        """The sizes of the mesh's axes."""
        return {axis: size for axis, size in self.sharding.items() if axis in AXES}

    @property
    def counted(self) -> tuple[float, float, float]:
        """FLOPs, bytes moved and bytes sent, of a plan that fits."""
        assert self.flops_per_chip is not None and self.bytes_moved is not None and self.collectives is not None
        return self.flops_per_chip, self.bytes_moved, sum(x["bytes"] for x in self.collectives.values())

    @property
    def predicted_seconds(self) -> float:
        """`seconds`, of a plan that fits."""
        assert self.seconds is not None
        return self.seconds


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A plan, with the assumptions behind it and the time of its compilation."""

    plan: Plan
    assumed: dict[str, float]  # turns of loops that the data decides
    seconds: float  # to compile


class Times(NamedTuple):
    """The seconds that each resource would need at its published peak rate."""

    compute: float
    memory: float
    links: float
    network: float = 0.0  # between nodes


def times(plan: Plan, machine: Machine) -> Times:
    """The seconds of a plan that fits, by resource."""
    flops, moved, sent = plan.counted
    chip, between = machine.chip, plan.between_nodes
    network = between / chip.network if chip.network else 0.0
    return Times(flops / machine.flops, moved / chip.bandwidth, (sent - between) / chip.links, network)


def candidates(recipe: Recipe, step: str, machine: Machine) -> list[dict[str, int]]:
    """Meshes over all devices that divide rows, positions, heads and weights, the most promising first; or the config's."""
    if recipe.configured:
        config = recipe.config
        shape = (config.rollout_mesh if step == "rollout" else None) or config.mesh
        return [dict(make_mesh(shape or None, machine.devices).shape)]
    model = abstract_model(recipe)
    text, devices = recipe.network.text, len(machine.devices)
    meshes = []
    for tensor in TENSOR:
        if text.num_key_value_heads % tensor or text.num_attention_heads % tensor or devices % tensor:
            continue
        rest = devices // tensor
        for sequence in recipe.sequences(step):
            if rest % sequence or recipe.length(step) % sequence:
                continue
            shards = rest // sequence
            if any(rows % shards for rows in divided(recipe, step, shards)):
                continue
            for fsdp in (f for f in range(1, shards + 1) if shards % f == 0):
                mesh = {"data": shards // fsdp, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
                if not undivided(model, mesh):
                    meshes.append(mesh)
    meshes.sort(key=lambda mesh: expected_seconds(recipe, step, machine, mesh))
    return meshes


def divided(recipe: Recipe, step: str, shards: int) -> tuple[int, ...]:
    """The numbers that `shards` must divide: rows, or of a rollout prompts, whose rows stay together."""
    if step != "rollout":
        return (recipe.rows(step),)
    return recipe.config.learning.prompts, recipe.in_flight(shards)


def slots(recipe: Recipe, shards: int = 1) -> int:
    """The number of rows of a rollout that are decoded together, on so many shards."""
    return recipe.config.learning.rollout.group_size * recipe.in_flight(shards)


def expected_seconds(recipe: Recipe, step: str, machine: Machine, mesh: Mapping[str, int]) -> float:
    """An estimate that orders the candidates: time on the links, and for a rollout the time to read the weights per token.

    It is infinite where the state alone exceeds the memory.
    """
    text, chip = recipe.network.text, machine.chip
    weights = 2.0 * _parameters(text)
    sequence = mesh.get("sequence", 1)
    split = mesh["fsdp"] * sequence
    stored = weights / (split * mesh["tensor"])
    gathered = weights / mesh["tensor"] * (split - 1) / split  # to read every weight once
    shards = mesh["data"] * mesh["fsdp"]
    if step == "rollout":
        config = recipe.config.learning.rollout
        cached = row_cache_bytes(text, config, 2) * slots(recipe, shards) / shards / mesh["tensor"]
        if stored + cached > chip.memory:
            return math.inf
        return config.max_response * (weights / mesh["tensor"] / chip.bandwidth + gathered / chip.links)
    full = not recipe.config.adapts
    # In units of bfloat16 weights: float32 weights and two moments, and to train gradients.
    state = 1 if not full else 6 if step == "score" else 8
    if state * stored > chip.memory:
        return math.inf
    full &= step != "score"
    tokens = recipe.rows(step) / shards * recipe.length(step) / sequence
    turns = recipe.rows(step) / shards
    passes = 1 if step == "score" else 3 + full  # forward, forward again, backward, and gradients the other way
    megatron = 4 * (passes / 2) * 2 * tokens * text.hidden_size * (mesh["tensor"] - 1) / mesh["tensor"]
    keys = 4 * passes * tokens * (sequence - 1) * text.num_key_value_heads * text.head_dim / mesh["tensor"]
    replicas = 2 * 4 * stored * (mesh["data"] > 1) * full
    sent = passes * turns * gathered + text.num_hidden_layers * (megatron + keys) + replicas
    return sent / chip.links


def _parameters(text: TextConfig) -> int:
    return text.layer_weights + 2 * text.vocab_size * text.hidden_size


def search(
    recipe: Recipe,
    steps: Sequence[str],
    machine: Machine,
    *,
    fitting: int,
    most: int,
    report: Callable[[Compiled], object] = lambda compiled: None,
) -> dict[str, Compiled]:
    """Finds the plans of a run's steps: the fastest of the first `fitting` layouts that fit.

    A layout is one mesh for updates and scores and one for rollouts. The memory that the run holds besides a step's program
    counts, too: once a rollout is compiled, meshes whose training state does not fit beside it are ruled out.

    Args:
        recipe: of the run.
        steps: that are planned together.
        machine: whose memory and peak rates count.
        fitting: the number of layouts that fit after which the search ends.
        most: meshes to compile for each step. Meshes that cannot fit, because a mesh that needs no more did not, are left out.
        report: called with every plan as soon as it is compiled.

    Returns:
        Step -> plan; empty where no layout fits.
    """
    alone: dict[str, list[tuple[dict[str, int], Compiled]]] = {step: [] for step in steps}  # (mesh, its program alone)
    reported: list[Compiled] = []
    runs: list[dict[str, Compiled]] = []

    def report_once(compiled: Compiled) -> None:
        if compiled not in reported:
            reported.append(compiled)
            report(compiled)

    for meshes in layouts(recipe, steps, machine):
        ready = {step: compiled for step in steps for mesh, compiled in alone[step] if mesh == meshes[step]}
        run = {}
        for step in sorted(steps, key=lambda step: step not in ready):
            if fresh := step not in ready:
                tight = [mesh for mesh, compiled in alone[step] if not compiled.plan.fits]
                if len(alone[step]) == most or any(needs_no_less(meshes[step], other) for other in tight):
                    break
                ready[step] = plan(recipe, step, machine, meshes[step])
                alone[step].append((meshes[step], ready[step]))
            run[step] = beside(ready[step], resident_bytes(recipe, step, machine, meshes), machine)
            if fresh:
                report_once(run[step])
            if not run[step].plan.fits:
                break
        else:
            for compiled in run.values():  # a rollout may be beside another state now than when it was compiled
                report_once(compiled)
            runs.append(run)
            if len(runs) == fitting:
                break

    def iteration_seconds(run: dict[str, Compiled]) -> float:
        calls = {step: recipe.config.learning.updates if step in ("update", "score") else 1 for step in run}
        return sum(calls[step] * compiled.plan.predicted_seconds for step, compiled in run.items())

    return min(runs, key=iteration_seconds, default={})


def layouts(recipe: Recipe, steps: Sequence[str], machine: Machine) -> Iterator[dict[str, dict[str, int]]]:
    """Layouts, as step -> mesh: every mesh for rollouts with every mesh for the other steps, the most promising first.

    Raises:
        ValueError: no mesh divides the rows and the weights.
    """
    kinds = [[step for step in steps if (step == "rollout") == rollout] for rollout in (True, False)]
    kinds = [kind for kind in kinds if kind]
    choices = [candidates(recipe, kind[0], machine) for kind in kinds]
    for (step, *_), meshes in zip(kinds, choices, strict=True):
        if not meshes:
            raise ValueError(f"{step}: {recipe.rows(step)} rows and the weights cannot be split over {machine.name}")
    for meshes in itertools.product(*choices):
        yield {step: mesh for kind, mesh in zip(kinds, meshes, strict=True) for step in kind}


def resident_bytes(recipe: Recipe, step: str, machine: Machine, meshes: Mapping[str, Mapping[str, int]]) -> int:
    """The `resident` bytes beside a step of a layout. A mesh that the layout lacks is the config's."""
    if step not in RUN:
        return 0
    config = recipe.config
    trained = make_mesh(meshes.get("update") or meshes.get("score") or config.mesh or None, machine.devices)
    rolled = meshes.get("rollout") or config.rollout_mesh
    return resident(recipe, step, trained, make_mesh(rolled, machine.devices) if rolled else trained)


def beside(compiled: Compiled, size: int, machine: Machine) -> Compiled:
    """The plan when `size` bytes of every device are already in use."""
    plan = compiled.plan
    if plan.bytes_per_chip is None:
        return compiled
    peak = plan.bytes_per_chip + machine.per_chip * size
    fits = plan.fits and peak <= machine.chip.memory
    return dataclasses.replace(compiled, plan=dataclasses.replace(plan, bytes_per_chip=peak, fits=fits))


def needs_no_less(mesh: Mapping[str, int], other: Mapping[str, int]) -> bool:
    """Whether a device holds at least as large a shard of every array as on the mesh `other`."""

    def shards(mesh: Mapping[str, int], axes: Sequence[str]) -> int:
        return math.prod(mesh.get(axis, 1) for axis in axes)

    row, weights = ("sequence", "tensor"), ("fsdp", "sequence", "tensor")
    return all(shards(mesh, axes) <= shards(other, axes) for axes in (row, weights))


def plan(recipe: Recipe, step: str, machine: Machine, mesh_shape: Mapping[str, int]) -> Compiled:
    """Compiles a step for a mesh on a machine, and counts its work. The memory is the program's alone."""
    mesh = make_mesh(mesh_shape, machine.devices)
    sharding = dict(mesh_shape)
    if step == "rollout":
        sharding["in_flight"] = recipe.in_flight(row_shards(mesh))
    else:
        sharding["micro_batches"] = recipe.micro_batches(step, mesh)
    program = recipe.build(step, mesh)
    began = time.monotonic()
    known = {"topology": machine.name, "step": step, "sharding": sharding}
    shares = " x ".join(f"{axis} {size}" for axis, size in mesh_shape.items() if size > 1)
    try:
        with Waiting(f"compiling {step} for {machine.name}" + f", {shares}" * bool(shares)):
            memory, text = compile_to_text(program)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(Plan(**known, fits=False, **_needed(str(error), machine)), {}, time.monotonic() - began)
    seconds = time.monotonic() - began
    counter = WorkCounter(text, program.turns, machine.nodes(list(mesh.devices.flat)))
    count, per_chip = counter.total(), machine.per_chip
    peak = per_chip * memory
    compiled = Plan(
        **known,
        fits=peak <= machine.chip.memory,
        bytes_per_chip=peak,
        flops_per_chip=per_chip * count.flops,
        bytes_moved=per_chip * count.bytes,
        collectives={
            kind: {"count": count.calls[kind], "bytes": per_chip * sent} for kind, sent in sorted(count.sent.items())
        },
        seconds=None,
        bound=None,
        between_nodes=per_chip * count.between_nodes,
    )
    each = times(compiled, machine)._asdict()
    bound = max(each, key=lambda resource: each[resource])
    compiled = dataclasses.replace(compiled, seconds=each[bound], bound=bound)
    return Compiled(compiled, {scope: program.turns[scope] for scope in sorted(counter.assumed)}, seconds)


def compile_to_text(program: Program) -> tuple[float, str]:
    """Bytes of a device's memory at the program's peak, and the optimised program as text.

    The compiler writes the text to a folder: asking the executable for it fails for v5p.
    """
    with tempfile.TemporaryDirectory() as folder:
        lowered = program.lower()
        with _no_cache():
            compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        texts = sorted(pathlib.Path(folder).glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size)
        if not texts:
            raise RuntimeError(f"the compiler wrote no program to {folder}")
        arguments = [
            x for x in jax.tree.leaves(program.arguments) if isinstance(x, jax.ShapeDtypeStruct) and x.sharding
        ]
        on_host = [x for x in arguments if x.sharding.memory_kind == HOST]
        return peak_bytes(compiled, bytes_per_device(on_host)), texts[-1].read_text()


def peak_bytes(compiled: jax.stages.Compiled, on_host: int = 0) -> int:
    """Bytes of a device's memory, as the compiler planned it: arguments, results, temporaries and the program.

    Args:
        compiled: the program.
        on_host: bytes of its arguments that are in the memory of the host, for each device.
    """
    memory = compiled.memory_analysis()
    assert memory is not None  # TPUs, GPUs and CPUs have one
    # A compiler that does not know the two memories apart counts all arguments as the device's.
    counted = 0 if memory.host_argument_size_in_bytes else on_host
    arrays = memory.argument_size_in_bytes - counted + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return arrays + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes


@contextlib.contextmanager
def _no_cache():
    """Turns the compilation cache off: a program from the cache is not written out as text."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def _needed(message: str, machine: Machine) -> dict[str, Any]:
    """Returns the numbers of a plan that does not fit: the memory that the compiler needed, if its message has it."""
    match = re.search(r"temporaries \(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT]) of", message)
    size = None
    if match:
        number, unit = (match[1], match[2]) if match[1] else (match[3], match[4])
        size = machine.per_chip * float(number) * 1024 ** ("KMGT".index(unit) + 1)
    empty = dict.fromkeys(("flops_per_chip", "bytes_moved", "collectives", "seconds", "bound"))
    return {"bytes_per_chip": size, **empty}
