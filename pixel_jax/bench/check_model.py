"""`pixel-jax check DIR`: checks whether a model, the data and this machine go together, before hours are spent on them.

It checks devices and versions; the model directory; the memory that answering, tuning and learning take; the rows of the data;
whether the model sees; one rollout and one update at small shapes. Every line says what was found and, where something is wrong,
what to do about it.
"""

import collections
import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pixel_jax.bench.check_memory import memory_lines
from pixel_jax.bench.check_trial import trial_lines
from pixel_jax.bench.checklist import Checklist, Kind, UsableExamples, count_text, phases_of, plural, size_text
from pixel_jax.cli import UserError
from pixel_jax.data.example import Example, ReadReport
from pixel_jax.data.limits import use_limits
from pixel_jax.data.packed import Packing
from pixel_jax.data.questions import assign_shapes
from pixel_jax.data.read import read_rows, readable
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.models.checkpoint import named_weights
from pixel_jax.models.io import ModelFiles, open_model
from pixel_jax.models.layers import LoRAWeight
from pixel_jax.models.tensors import FLOATS
from pixel_jax.parallel import make_mesh
from pixel_jax.parallel.memory import device_memory
from pixel_jax.phases import limits_of, question_shapes, tuning_shapes
from pixel_jax.planning.programs import (
    Recipe,
    abstract_model,
)
from pixel_jax.provenance import versions
from pixel_jax.rollouts.limits import read_limits
from pixel_jax.rollouts.prompts import tables
from pixel_jax.rollouts.shapes import BatchShape
from pixel_jax.rollouts.trajectory import Tables
from pixel_jax.tools.named import find_format, find_tools
from pixel_jax.train_config import TrainConfig

SHOWN = 5  # faults of the data that are printed; all are in the record


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


def machine_lines(checks: Checklist, config: TrainConfig) -> None:
    """Adds lines about devices, versions, attention kernels, and the mesh."""
    devices = jax.devices()
    kinds = ", ".join(f"{n} x {kind}" for kind, n in collections.Counter(x.device_kind for x in devices).items())
    summary = f"{kinds}, {size_text(device_memory())} each for programs"
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
            f"none: 1 of {plural(len(devices), 'device')} is used",
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
        parts = ", ".join(f"{count_text(n)} {part}" for part, n in sorted(sizes.items(), reverse=True))
        sees = "images" if network.vision is not None else "text only"
        checks.add(
            "model",
            f"{network.model_type}, {count_text(total)} weights ({parts}), {dtype}, "
            f"{size_text(total * jnp.dtype(dtype).itemsize)}; {network.text.num_hidden_layers} layers, {sees}",
        )
        checks.details["model"] = {"family": network.model_type, "dtype": dtype, "weights": dict(sizes)}
        if config.adapter is not None:
            checks.add("adapter", f"{config.adapter}: {count_text(sizes['adapter'])} weights fit the model")
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
) -> UsableExamples | None:
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
        fitting, shapes = fitting_examples(config, kind, examples, report, vocabulary, known, files, mesh)
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
    summary = f"{plural(total, 'row')}: {len(examples)} {use[kind]}"
    summary += f", {len(found[other][0])} {use[other]}" if other in found and found[other][0] else ""
    summary += "".join(f"; {n} {name}" for name, n in counts.items())
    left_out = len(report.dropped)
    remedy = "mend these rows, or leave them out with config.bad_rows='drop'" * (
        left_out > 0 and config.bad_rows == "error"
    )
    checks.details["data"] = {"kind": kind, "rows": total, "usable": len(fitting), "faults": report.dropped}
    if not fitting:
        remedy = "no row can be used: docs/your-own-data.md describes the format, config.columns renames fields"
    where = "the config's shapes" if config.trace_shapes or config.image_buffer else "shapes worked out from them"
    checks.add("data", f"{summary}; {len(fitting)} fit {where}", remedy)
    for fault in report.dropped[:SHOWN]:
        checks.add("fault", fault, status="note")
    if left_out > SHOWN:
        checks.add("fault", f"and {left_out - SHOWN} more, in {checks.path}", status="note")
    for what, n in report.mended.items():
        checks.add("changed", f"{n} times {what}", status="note")
    return UsableExamples(kind, fitting, shapes) if fitting else None


def fitting_examples(
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
