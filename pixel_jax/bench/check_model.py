"""`pixel-jax check DIR`: checks whether a model, the data and this machine go together, before hours are spent on them.

It checks devices and versions; the model directory; the memory that answering, tuning and learning take; the rows of the data;
whether the model sees; one rollout and one update at small shapes. Every line says what was found and, where something is wrong,
what to do about it.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pixel_jax.bench.sight import TOKENS, measure_sight
from pixel_jax.cli import UserError, out_of_memory
from pixel_jax.data.example import Example, ReadReport
from pixel_jax.data.limits import use_limits
from pixel_jax.data.packed import Packing
from pixel_jax.data.prompt_shapes import resized
from pixel_jax.data.questions import assign_shapes
from pixel_jax.data.read import read_rows, readable
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.files import write_file
from pixel_jax.models.checkpoint import named_weights
from pixel_jax.models.io import ModelFiles, open_model
from pixel_jax.models.layers import LoRAWeight
from pixel_jax.models.model import Model
from pixel_jax.models.processor import Processor
from pixel_jax.models.tensors import FLOATS
from pixel_jax.parallel import make_mesh
from pixel_jax.parallel.memory import device_memory
from pixel_jax.parallel.sharding import row_shards, sequence_shards, shard_batch, shardings
from pixel_jax.phases import limits_of, question_shapes, read_model, tuning_shapes
from pixel_jax.planning.programs import (
    Recipe,
    abstract_model,
    abstract_state,
    bytes_per_device,
    policy,
    resident,
    sharded,
)
from pixel_jax.provenance import versions
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.limits import read_limits
from pixel_jax.rollouts.materialize import materialize
from pixel_jax.rollouts.prompts import Query, build_prompts, tables
from pixel_jax.rollouts.rollout import rollout, static_shape
from pixel_jax.rollouts.shapes import BatchShape
from pixel_jax.rollouts.trajectory import STOP_REASONS, Tables, to_host
from pixel_jax.terminal import brief, say
from pixel_jax.tools.named import find_format, find_tools
from pixel_jax.train_config import TrainConfig
from pixel_jax.training.batch import Batch, from_trajectories
from pixel_jax.training.cost import fixed_bytes, row_bytes
from pixel_jax.training.optimizer import make_optimizer
from pixel_jax.training.progress import announce_compiles, use_compilation_cache
from pixel_jax.training.state import TrainState, init_state
from pixel_jax.training.steps import ForwardConfig, check_report, make_rl_step, make_sft_step

SHOWN = 5  # faults of the data that are printed; all are in the record
SIDE = 448  # pixels, the longest side of a picture in the trial rollout
TRIED = 3  # pictures of the data with which sight is measured, at most
Kind = Literal["sft", "rl"]
# Errors of a user's files and settings, and of a full device.
MISTAKES = (UserError, ValueError, OSError, RuntimeError, FloatingPointError)


class Line(NamedTuple):
    """The result of one check."""

    name: str
    status: Literal["ok", "note", "wrong"]
    found: str
    remedy: str = ""


class Checklist:
    """The lines of a check, printed as they are added and kept in a file."""

    def __init__(self, path: pathlib.Path):
        self.path, self.lines = path, list[Line]()
        self.details: dict[str, Any] = {}

    def add(
        self, name: str, found: str, remedy: str = "", *, status: Literal["ok", "note", "wrong"] | None = None
    ) -> None:
        """Adds a line; one with a remedy is wrong, unless `status` says otherwise."""
        line = Line(name, status or ("wrong" if remedy else "ok"), found, remedy)
        self.lines.append(line)
        say(f"{line.status:>5}  {name:<9} {found}" + (f"\n{'':17}-> {remedy}" if remedy else ""))
        record = {"lines": [x._asdict() for x in self.lines], **self.details}
        write_file(self.path, json.dumps(record, indent=1) + "\n")

    @contextlib.contextmanager
    def item(self, name: str, remedy: str = "mend this and check again") -> Iterator[None]:
        """Adds an error of the block as a line of this name."""
        try:
            yield
        except MISTAKES as error:
            full = out_of_memory("pixel-jax rl", error)
            self.add(name, full or " ".join(str(error).split()), remedy, status="wrong")

    @property
    def wrong(self) -> list[str]:
        """The names of what is wrong, each once."""
        return list(dict.fromkeys(line.name for line in self.lines if line.status == "wrong"))


class Rows(NamedTuple):
    """The examples of a data file that can be used."""

    kind: Kind
    examples: Sequence[Example]
    shapes: Sequence[BatchShape]  # of their batches


def check_model(config: TrainConfig, *, data: bool, out: pathlib.Path) -> list[str]:
    """Checks a model and, with `data`, what it is to be trained on.

    Args:
        config: the config of the training; its model, adapter, mesh, tools and limits are checked.
        data: whether `config.data` is checked.
        out: the file of the record.

    Returns:
        The names of what is wrong.

    Raises:
        UserError: the config has no phase.
    """
    if not phases_of(config):
        raise UserError("the config has neither a section 'sft' nor a section 'rl' to check a model for")
    checks = Checklist(out)
    machine_lines(checks, config)
    files = tools = calls = mesh = None
    with checks.item("mesh", "set config.mesh to sizes whose product is the number of devices, or to {}"):
        mesh = make_mesh(config.mesh) if config.mesh else make_mesh({}, jax.local_devices()[:1])
    with checks.item("tools", "config.tools and config.rollout.call_format name what the model may call, and how"):
        tools, calls = find_tools(config.tools), find_format(limits_of("sft", config).call_format)
    with checks.item("model", "give a Hugging Face directory (config.json, safetensors files) or a GGUF file"):
        files = open_model(config.model)
        config = config.for_model(files.config)
    if files is None or mesh is None or tools is None or calls is None:
        return checks.wrong
    recipe = model_lines(checks, config, files)
    vocabulary = tokenizer_lines(checks, config, files)
    if recipe is None or files.processor is None:
        return checks.wrong
    rows = known = None
    if vocabulary is not None:
        known = tables(vocabulary, tools, calls)
        recipe = dataclasses.replace(recipe, tables=known)
        if data:
            with checks.item("data", "docs/your-own-data.md describes the formats"):
                rows = data_lines(checks, config, vocabulary, known, files, mesh if config.mesh else None)
    fits = memory_lines(checks, recipe, mesh, rows)
    if fits is not None and not (data and rows is None):
        trial_lines(checks, config, vocabulary, known, rows, fits)
    return checks.wrong


def phases_of(config: TrainConfig) -> list[Kind]:
    """The phases that a config has settings for."""
    phases: tuple[Kind, ...] = ("sft", "rl")
    return [kind for kind in phases if getattr(config, kind) is not None]


def machine_lines(checks: Checklist, config: TrainConfig) -> None:
    """Adds lines about devices, versions, attention kernels, and the mesh."""
    devices = jax.devices()
    kinds = ", ".join(f"{n} x {kind}" for kind, n in collections.Counter(x.device_kind for x in devices).items())
    summary = f"{kinds}, {_size(device_memory())} each for programs"
    on_cpu = jax.default_backend() == "cpu"
    hint = "where there is an accelerator: pip install 'pixel_jax[tpu]', 'pixel_jax[cuda13]' or 'pixel_jax[cuda12]'"
    checks.add("devices", summary, hint * on_cpu, status="note" if on_cpu else "ok")
    checks.details["versions"] = found_versions = versions()
    main = ("pixel_jax", "python", "jax", "jaxlib", "libtpu", "flax", "transformers", "pillow")
    checks.add("versions", ", ".join(f"{x} {found_versions[x]}" for x in main if x in found_versions))
    if on_cpu:
        checks.add("kernels", "none on a CPU: attention is dense or chunked", status="note")
    else:
        from pixel_jax.bench.check_parts import attention_kernels

        figures, wrong = attention_kernels(quick=True)
        remedy = (
            "set config.sft.forward.implementation and config.rl.rollout.implementation to chunked, and report this"
        )
        checks.add(
            "kernels", "; ".join(wrong) or f"{len(figures)} cases agree with dense attention", remedy * bool(wrong)
        )
    if config.mesh:
        with checks.item("mesh", "set config.mesh to sizes whose product is the number of devices, or to {}"):
            shape = dict(make_mesh(config.mesh).shape)
            checks.add("mesh", ", ".join(f"{axis} {size}" for axis, size in shape.items()))
    else:
        checks.add(
            "mesh",
            f"none: 1 of {_plural(len(devices), 'device')} is used",
            status="ok" if len(devices) == 1 else "note",
        )


def model_lines(checks: Checklist, config: TrainConfig, files: ModelFiles) -> Recipe | None:
    """Adds lines about family, sizes, type and adapter; returns the recipe without tables, or None if something is wrong."""
    network, stored = files.config, {FLOATS[x.dtype].name for x in files.tensors.values() if x.dtype in FLOATS}
    dtype = stored.pop() if len(stored) == 1 else files.config_dtype or "float32"
    recipe = Recipe(config, network, (), dtype)  # pyright: ignore[reportArgumentType]: no tables are known yet
    with checks.item("model", "give a directory whose files are whole: download or save it again"):
        sizes = collections.Counter[str]()
        for _, path, weight in named_weights(abstract_model(recipe)):
            part = "vision" if path.startswith("visual.") else "text"
            sizes["adapter" if isinstance(weight, LoRAWeight) else part] += math.prod(weight.shape)
        total = sizes["text"] + sizes["vision"]
        parts = ", ".join(f"{_count(n)} {part}" for part, n in sorted(sizes.items(), reverse=True))
        sees = "images" if network.vision is not None else "text only"
        checks.add(
            "model",
            f"{network.model_type}, {_count(total)} weights ({parts}), {dtype}, "
            f"{_size(total * jnp.dtype(dtype).itemsize)}; {network.text.num_hidden_layers} layers, {sees}",
        )
        checks.details["model"] = {"family": network.model_type, "dtype": dtype, "weights": dict(sizes)}
        if config.adapter is not None:
            checks.add("adapter", f"{config.adapter}: {_count(sizes['adapter'])} weights fit the model")
        return recipe
    return None


def tokenizer_lines(checks: Checklist, config: TrainConfig, files: ModelFiles) -> Vocabulary | None:
    """Adds a line about the tokenizer and the limits beside the model; returns its vocabulary, None if it has none."""
    if files.processor is None:
        checks.add(
            "tokenizer", "none", "put the tokenizer's files (tokenizer.json, tokenizer_config.json) into the directory"
        )
        return None
    with checks.item("tokenizer", "pixel_jax.forward works with this model; chat, serve, sft, rl and eval do not"):
        vocabulary = Vocabulary.of(files.processor.tokenizer)
        limits = read_limits(config.model)
        where = (
            "the limits are those of rollout.json" if limits else "no rollout.json beside it: the recipe's limits hold"
        )
        checks.add("tokenizer", f"{len(vocabulary.table.length)} tokens; {where}")
        return vocabulary
    return None


def data_lines(
    checks: Checklist, config: TrainConfig, vocabulary: Vocabulary, known: Tables, files: ModelFiles, mesh: Mesh | None
) -> Rows | None:
    """Adds lines about the rows of the data, their faults and how many fit; returns those that do, None if none does."""
    use_limits(config.limits)
    options: dict[str, Any] = {
        "image_folders": config.image_folders,
        "columns": config.columns,
        "language": known.parser.language,
        "pictures": files.config.vision is not None,
    }
    found: dict[Kind, tuple[list[Example], ReadReport]] = {}
    unreadable: ValueError | None = None
    for kind in phases_of(config):
        report = ReadReport(config.data, drop=True)
        try:
            found[kind] = read_rows(config.data, report, turns=kind == "sft", **options), report
        except ValueError as error:  # the file as a whole cannot be read: the released questions have no turns
            unreadable = error
    if not found:
        assert unreadable is not None
        raise unreadable
    kind = max(found, key=lambda kind: len(found[kind][0]))
    examples, report = found[kind]
    total = len(examples) + len(report.dropped)
    examples = readable(examples, report)
    shapes: Sequence[BatchShape] = ()
    fitting: Sequence[Example] = ()
    with contextlib.suppress(ValueError):  # none is left: the report says why
        fitting, shapes = with_room(config, kind, examples, report, vocabulary, known, files, mesh)
    counts = collections.Counter(
        "about a video"
        if x.video
        else f"about {len(x.images)} images"
        if len(x.images) > 1
        else "about an image"
        if x.images
        else "of text"
        for x in examples
    )
    other: Kind = "rl" if kind == "sft" else "sft"
    use = {"sft": "have turns to tune on (sft)", "rl": "have an answer to learn by (rl)"}
    summary = f"{_plural(total, 'row')}: {len(examples)} {use[kind]}"
    summary += f", {len(found[other][0])} {use[other]}" if other in found and found[other][0] else ""
    summary += "".join(f"; {n} {name}" for name, n in counts.items())
    left_out = len(report.dropped)
    remedy = "mend these rows, or leave them out with config.bad_rows='drop'" * (
        left_out > 0 and config.bad_rows == "error"
    )
    checks.details["data"] = {"kind": kind, "rows": total, "usable": len(fitting), "faults": report.dropped}
    if not fitting:
        remedy = "no row can be used: docs/your-own-data.md describes the format, config.columns renames fields"
    room = "the config's shapes" if config.trace_shapes or config.image_buffer else "shapes worked out from them"
    checks.add("data", f"{summary}; {len(fitting)} fit {room}", remedy)
    for fault in report.dropped[:SHOWN]:
        checks.add("fault", fault, status="note")
    if left_out > SHOWN:
        checks.add("fault", f"and {left_out - SHOWN} more, in {checks.path}", status="note")
    for what, n in report.mended.items():
        checks.add("changed", f"{n} times {what}", status="note")
    return Rows(kind, fitting, shapes) if fitting else None


def with_room(
    config: TrainConfig,
    kind: Kind,
    examples: Sequence[Example],
    report: ReadReport,
    vocabulary: Vocabulary,
    known: Tables,
    files: ModelFiles,
    mesh: Mesh | None,
) -> tuple[Sequence[Example], Sequence[BatchShape]]:
    """Returns the examples that fit the config's shapes, or those that are worked out; and these shapes.

    Raises:
        ValueError: no example fits.
    """
    limits = limits_of(kind, config)
    if kind == "sft":
        row_shapes = config.trace_shapes or tuning_shapes(config.tuning, files.config, mesh)
        order_options = {"size": config.tuning.batch_size, "seed": config.seed, "report": report}
        packing = Packing(examples, vocabulary, known, limits, row_shapes, **order_options)
        return packing.examples, packing.buckets
    row_shapes = config.prompt_shapes or question_shapes(files.config, mesh, config.learning.prompts)
    assigned = assign_shapes(examples, row_shapes, vocabulary, limits, report, known.tools)
    return [x.example for x in assigned], list(dict.fromkeys(x.shape for x in assigned))


def memory_lines(checks: Checklist, recipe: Recipe, mesh: Mesh, rows: Rows | None) -> dict[Kind, bool] | None:
    """Adds lines about the memory of answering and of each phase, by formula; returns which fit, None if no weights do."""
    room, config, network = device_memory(), recipe.config, recipe.network
    model = abstract_model(recipe)
    weights = bytes_per_device(sharded(model, shardings(model, mesh)))
    limits = read_limits(config.model) or RolloutConfig()
    cache = network.text.cache_bytes(limits.max_tokens, jnp.dtype(recipe.dtype).itemsize)
    text = f"to answer: weights {_size(weights)}, a row of {limits.max_tokens} tokens {_size(cache)}, of {_size(room)}"
    remedy = "split the weights over more devices (config.mesh), or take a smaller model, or one in bfloat16"
    shorter = "lower max_tokens in the model's rollout.json, or split the weights over more devices (config.mesh)"
    checks.add("memory", text, remedy if weights > room else shorter * (weights + cache > room))
    checks.details["memory"] = needs = dict[str, Any](device=room, weights=weights, row=cache, phases={})
    if weights > room:
        return None
    fits: dict[Kind, bool] = {}
    kinds: list[Kind] = phases_of(config) if rows is None else [rows.kind]
    for kind in kinds:
        with checks.item("memory"):
            parts = tuning_bytes(recipe, mesh, rows) if kind == "sft" else learning_bytes(recipe, mesh, rows)
            needs["phases"][kind] = parts
            fits[kind] = sum(parts.values()) <= room
            text = f"{kind}: " + ", ".join(f"{name} {_size(n)}" for name, n in parts.items())
            text += f": {_size(sum(parts.values()))} of {_size(room)}"
            less = "" if config.adapts else "train adapters (config.lora; --config=pixel/own_data:lora), or "
            remedy = (
                f"{less}split the weights over more devices (config.mesh), or take smaller pictures and shorter rows"
            )
            status = "ok" if fits[kind] else "note" if rows is None else "wrong"
            checks.add("memory", text, "" if fits[kind] else remedy, status=status)
    return fits


def tuning_bytes(recipe: Recipe, mesh: Mesh, rows: Rows | None) -> dict[str, int]:
    """Computes the bytes of a device that an update of tuning takes, with one row at a time on each shard."""
    phase = recipe.config.tuning
    state = abstract_state(recipe, phase, phase.steps or 1, mesh)
    parts = _of_update(recipe, state, phase.forward)
    if rows is not None:
        parts["the longest row"] = max(
            _row(recipe, mesh, x.tokens, (x.slices, x.patches), phase.forward) for x in rows.shapes
        )
    return parts


def learning_bytes(recipe: Recipe, mesh: Mesh, rows: Rows | None) -> dict[str, int]:
    """Computes the bytes that a rollout or an update takes, whichever is more, with one prompt or row on each shard."""
    phase, text = recipe.config.learning, recipe.network.text
    limits = phase.rollout
    rolled = make_mesh(recipe.config.rollout_mesh) if recipe.config.rollout_mesh else mesh
    state = abstract_state(recipe, phase, phase.iterations * phase.updates, mesh)
    width = jnp.dtype(phase.forward.compute_dtype or recipe.dtype).itemsize
    prompt = max((x.tokens for x in rows.shapes), default=0) if rows is not None else 0
    fixed = resident(recipe, "rollout", mesh, rolled) + bytes_per_device(policy(recipe, rolled))
    cached = limits.group_size * text.cache_bytes(limits.max_response, width) + text.cache_bytes(prompt, width)
    rollout_parts = {
        "state and weights of a rollout": fixed,
        f"caches of a prompt's {limits.group_size} rows": cached,
    }
    update_parts = _of_update(recipe, state, phase.forward)
    if rows is not None:
        patches = max(limits.max_pixels, limits.crop_max_pixels) // limits.patch_size**2
        update_parts["the longest row"] = max(
            _row(recipe, mesh, x.tokens + limits.max_response, (x.slices + limits.max_calls, patches), phase.forward)
            for x in rows.shapes
        )
    return max(rollout_parts, update_parts, key=lambda parts: sum(parts.values()))


def _of_update(recipe: Recipe, state: TrainState, forward: ForwardConfig) -> dict[str, int]:
    """Computes what an update takes besides its rows, as `pixel_jax.training.steps.make_step` counts it."""
    trained = bytes_per_device(state.trainable)
    return {
        "weights and optimizer": bytes_per_device(state),
        "gradients": 3 * trained,
        "logits": fixed_bytes(recipe.network, forward.logit_chunk),
    }


def _row(recipe: Recipe, mesh: Mesh, tokens: int, shown: tuple[int, int], forward: ForwardConfig) -> int:
    width = 2 if forward.compute_dtype == "bfloat16" else 4
    own = tokens // sequence_shards(mesh)
    return row_bytes(recipe.network, own, shown, width=width, remat=bool(forward.remat))


def trial_lines(
    checks: Checklist,
    config: TrainConfig,
    vocabulary: Vocabulary | None,
    known: Tables | None,
    rows: Rows | None,
    fits: dict[Kind, bool],
) -> None:
    """Reads the weights, checks that the model sees, and tries one rollout and one update."""
    announce_compiles()
    use_compilation_cache(pathlib.Path.home() / ".cache" / "pixel_jax")
    model: Any = None
    with checks.item("weights", "download or save the model again"):
        began = time.monotonic()
        model, processor, mesh = read_model(config)
        checks.add("weights", f"all there, all finite; read in {time.monotonic() - began:.0f} s")
    if model is None or not look(checks, model, processor, rows) or vocabulary is None or known is None:
        return
    kind = rows.kind if rows is not None else phases_of(config)[-1]
    batch = None
    with checks.item("rollout", "chat, serve, rl and eval need rollouts: see docs/families.md for what a family can"):
        batch = write(checks, model, config, kind, vocabulary, known, rows, mesh)
    if batch is None:
        return
    if not fits.get(kind):
        checks.add("update", f"not tried: {kind} does not fit the memory", status="note")
        return
    with checks.item("update", "lower the learning rate, or look for damaged weights or data"):
        change(checks, model, config, kind, batch, mesh)


def look(checks: Checklist, model: Model, processor: Processor, rows: Rows | None) -> bool:
    """Checks whether the model sees; a model without a vision tower passes."""
    if model.config.vision is None:
        checks.add("sees", "text only: nothing to see")
        return True
    sight = None
    for image, question, answer in [*pictures(rows), PICTURE]:
        with contextlib.suppress(ValueError):  # the picture has one colour, or the question a placeholder: try the next
            sight = measure_sight(model, processor, image, question, answer)
            if sight.sees:
                break
    if sight is None:
        checks.add(
            "sees", "it cannot be asked about a picture", "see that the tokenizer has the family's tokens of pictures"
        )
        return False
    checks.details["sight"] = sight._asdict()
    moves = f"{sight.moved:.2g} nats, rounding alone {sight.rounding:.1g}"
    if sight.sees:
        checks.add("sees", f"yes: without the picture, log-probabilities of an answer move by up to {moves}")
        return True
    checks.add("sees", f"no: without the picture, log-probabilities of an answer move by {moves}", sight.cause)
    return False


def pictures(rows: Rows | None) -> Iterator[tuple[np.ndarray, str, str]]:
    """Iterates over a few pictures of the data, each with its question and a right answer."""
    shown = [x for x in (rows.examples if rows is not None else ()) if x.images and not x.video]
    for example in shown[:TRIED]:
        answer = example.answer[0] if example.answer else "".join(text for text, _ in example.turns[-1].parts)
        if answer:
            yield example.query().images[0], example.question, answer[:200]


def squares() -> np.ndarray:
    """Draws a picture of coloured squares."""
    colours = np.array([[220, 30, 30], [30, 180, 60], [40, 60, 220], [240, 220, 40]], np.uint8)
    rows, columns = np.indices((224, 224)) // 56
    return colours[(rows + columns) % 4]


PICTURE = (squares(), "What does the picture show?", "Red, green, blue and yellow squares.")


def write(
    checks: Checklist,
    model: Model,
    config: TrainConfig,
    kind: Kind,
    vocabulary: Vocabulary,
    known: Tables,
    rows: Rows | None,
    mesh: Mesh | None,
) -> Batch:
    """Tries one rollout at small shapes, and returns its rows as a batch."""
    limits, prompts = small(limits_of(kind, config)), 1 if mesh is None else row_shards(mesh)
    query = question(rows, sees=model.config.vision is not None)
    small_prompts = build_prompts([query] * prompts, vocabulary, known, limits)
    began = time.monotonic()
    t = to_host(rollout(model, small_prompts, jax.random.key(0), limits))
    seconds = time.monotonic() - began
    count = len(t.stop)
    images = np.repeat(small_prompts.images, count // len(small_prompts.length))
    t = t._replace(visual=materialize(t.visual, images, static_shape(small_prompts, limits, mesh), limits, mesh))
    ends = collections.Counter(STOP_REASONS[int(x)] for x in t.stop)
    ended = ", ".join(f"{n} {name}" for name, n in ends.items())
    text = vocabulary.to_bytes(np.asarray(t.tokens[0])[np.asarray(t.loss_mask[0])].tolist()).decode("utf-8", "replace")
    checks.add(
        "rollout",
        f"{_plural(count, 'row')} wrote {int(np.sum(t.loss_mask))} tokens in {seconds:.0f} s with compiling "
        f"(ended by: {ended}); the first: {brief(text, 60)}",
    )
    return from_trajectories(t, advantage=np.ones(count, np.float32))


def small(limits: RolloutConfig) -> RolloutConfig:
    """Lowers the limits to few tokens and small pictures."""
    most = TOKENS * limits.factor**2
    pixels = {}
    for name in ("", "crop_", "select_", "video_"):
        high = min(most, getattr(limits, f"{name}max_pixels"))
        pixels |= {f"{name}max_pixels": high, f"{name}min_pixels": min(high, getattr(limits, f"{name}min_pixels"))}
    sampling = {"group_size": 2, "temperature": 1.0, "later_temperature": None, "in_flight": None}
    written = {"max_new_tokens": min(16, limits.max_new_tokens), "max_response": min(512, limits.max_response)}
    return dataclasses.replace(limits, max_calls=min(1, limits.max_calls), **sampling, **written, **pixels)


def question(rows: Rows | None, sees: bool) -> Query:
    """Returns the first question of the data about pictures, made smaller, or one of our own."""
    if not sees:
        return Query(rows.examples[0].question if rows is not None else "What is one and one?", [])
    shown = next((x for x in (rows.examples if rows is not None else ()) if x.images and not x.video), None)
    if shown is None:
        return Query(PICTURE[1], [PICTURE[0]])
    query = shown.query()
    scale = min(1.0, *(SIDE / max(x.shape[:2]) for x in query.images))
    side = lambda length: max(1, int(scale * length))
    return query._replace(images=[resized(x, (side(x.shape[0]), side(x.shape[1]))) for x in query.images])


def change(checks: Checklist, model: Model, config: TrainConfig, kind: Kind, batch: Batch, mesh: Mesh | None) -> None:
    """Tries one update of the weights that the config trains, on these rows."""
    phase = config.tuning if kind == "sft" else config.learning
    optimizer = make_optimizer(phase.optimizer, 1)
    forward = dataclasses.replace(phase.forward, micro_batches=None)
    make = (
        functools.partial(make_sft_step, forward)
        if kind == "sft"
        else functools.partial(make_rl_step, forward, config.learning.loss)
    )
    step = make(optimizer, mesh=mesh)
    began = time.monotonic()
    state = init_state(model, optimizer, trainable=phase.trainable, mesh=mesh)
    trained = sum(x.size for x in jax.tree.leaves(state.trainable))
    _, report = step(state, batch if mesh is None else shard_batch(batch, mesh))
    metrics = check_report(report, 0)
    if not metrics["grad_norm"] > 0:
        raise ValueError(f"the gradient of the {_count(trained)} weights that {phase.trainable!r} trains is zero")
    checks.add(
        "update",
        f"{kind} on {_count(trained)} weights: loss {metrics['loss']:.3g}, gradient {metrics['grad_norm']:.3g}, "
        f"{time.monotonic() - began:.0f} s with compiling",
    )


def _size(count: float) -> str:
    """Writes a number of bytes, short."""
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"


def _plural(count: int, name: str) -> str:
    return f"{count} {name}" + "s" * (count != 1)


def _count(count: int) -> str:
    """Writes a number of weights, short."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)
