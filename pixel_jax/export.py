"""`pixel-jax export RUN[@STEP] --out=DIR`: a checkpoint of a stopped or finished run as a model directory.

RUN is the directory of `pixel-jax sft` or `pixel-jax rl`, or the phase's in it (`RUN/sft`); STEP one of its checkpoints, by
default the newest. Adapters are merged. What the run began with is read from `run.json`, so no config is given.
"""

import dataclasses
import pathlib

from absl import flags

from pixel_jax.cli import UserError
from pixel_jax.identity import read_history
from pixel_jax.terminal import Waiting

FLAGS = flags.FLAGS
PHASES = ("sft", "rl")
DTYPES = ("float32", "bfloat16", "float16")


def define_flags(command: str) -> None:
    """Declares the flags of `export`."""
    flags.DEFINE_string("out", None, "The model directory to write.", required=True)
    flags.DEFINE_string("model", None, "Where the model that the run began with lies, if it has been moved.")
    flags.DEFINE_enum("dtype", None, DTYPES, "Of the weights; by default what the run saves its model in.")


def main(command: str, arguments: list[str]) -> None:
    """Exports the checkpoint that the command line names."""
    from pixel_jax.terminal import say

    if len(arguments) != 1:
        raise UserError("give one run: pixel-jax export RUN[@STEP] --out=DIR")
    run, step = split_step(arguments[0])
    step, steps = export(phase_of(run), FLAGS.out, step=step, model=FLAGS.model, dtype=FLAGS.dtype)
    say(f"The model after step {step} of {arguments[0]} is in {FLAGS.out}; its checkpoints are of {steps}.")


def split_step(name: str) -> tuple[pathlib.Path, int | None]:
    """Splits RUN@STEP into the run's directory and the step; None where there is no step."""
    run, at, step = name.rpartition("@")
    if at and step.isdecimal():
        return pathlib.Path(run), int(step)
    return pathlib.Path(name), None


def phase_of(run: pathlib.Path) -> pathlib.Path:
    """The directory with a run's checkpoints.

    Raises:
        UserError: the run has no such directory, or more than one.
    """
    phases = [path for path in (run, *(run / phase for phase in PHASES)) if (path / "checkpoints").is_dir()]
    if len(phases) != 1:
        which = f"has several phases, choose one: {', '.join(map(str, phases))}" if phases else "has no checkpoints"
        raise UserError(f"{run} {which}")
    return phases[0]


def is_model(directory: pathlib.Path) -> bool:
    """Whether a directory holds a model."""
    return (directory / "config.json").is_file()


def candidates(run: pathlib.Path) -> dict[int, pathlib.Path]:
    """The models that a run has or can make from its checkpoints: step -> the directory where each is or will be."""
    phase = phase_of(run)
    steps = {int(x.name) for x in (phase / "checkpoints").iterdir() if x.name.isdecimal()}
    saved = {int(x.name) for x in (phase.parent / "models").glob("*") if x.name.isdecimal() and is_model(x)}
    models = {step: phase.parent / "models" / str(step) for step in sorted(steps | saved)}
    last = max(steps, default=None)
    history = read_history(phase)
    ended = bool(history) and history[-1].get("of") == last
    if last is not None and ended and is_model(phase.parent / "model"):
        models[last] = phase.parent / "model"
    return models


def model_directory(name: str) -> pathlib.Path:
    """The directory of the model that a command line names: a model's directory; RUN, for its newest; or RUN@STEP.

    A model of which there is only a checkpoint is exported first, to RUN/models/STEP, where it stays.

    Raises:
        UserError: the run has neither a model nor a checkpoint of that step.
    """
    from pixel_jax.parallel.processes import barrier, is_main_process, say

    run, step = split_step(name)
    if step is None and (is_model(run) or not any((run / x / "checkpoints").is_dir() for x in ("", *PHASES))):
        return pathlib.Path(name)  # if it is no model either, the reader of models says so
    models = candidates(run)
    step = max(models, default=None) if step is None else step
    if step not in models:
        raise UserError(
            f"{run} has no model or checkpoint of step {step}; it has {', '.join(map(str, models)) or 'none'}"
        )
    if is_main_process() and not is_model(models[step]):
        export(phase_of(run), str(models[step]), step=step)
    barrier(f"the model of step {step} is there")
    say(f"{name} is the model of step {step}: {models[step]}")
    return models[step]


def write_model(model, processor, out, dtype: str, *, adapter_of: str | None, limits) -> None:
    """Writes a model of a run as a directory that `from_pretrained`, `eval`, `chat` and the next phase read.

    Args:
        model: the model.
        processor: its processor, whose files are written beside it.
        out: the directory.
        dtype: the dtype of the weights that are written.
        adapter_of: the model that its adapter belongs to. The adapter is merged, and also written beside the merged model, in
            `out`/adapter, in PEFT's format. None: there is none.
        limits: the `RolloutConfig` to write beside it.
    """
    from pixel_jax import save_adapter, save_pretrained
    from pixel_jax.models.lora import merge_lora
    from pixel_jax.models.peft import FOLDER
    from pixel_jax.parallel.processes import is_main_process
    from pixel_jax.rollouts.limits import write_limits

    save_pretrained(model if adapter_of is None else merge_lora(model, dtype), processor, out, dtype)
    if adapter_of is not None:
        save_adapter(model, pathlib.Path(out) / FOLDER, base=adapter_of)
    if is_main_process():
        write_limits(out, limits)


def export(
    phase: pathlib.Path,
    out: str,
    *,
    step: int | None = None,
    model: str | None = None,
    dtype: str | None = None,
) -> tuple[int, list[int]]:
    """Writes a checkpoint as a model directory, on one device.

    Args:
        phase: directory of the run's phase.
        out: the model directory to write.
        step: the step of the checkpoint; None: the newest.
        model: directory of the model that the run began with; None: as the run recorded it.
        dtype: the dtype of the weights; None: the dtype in which the run saves its model.

    Returns:
        The step, and the steps of all checkpoints of the run.

    Raises:
        UserError: the run has no such checkpoint, or the model that it began with is missing.
    """
    import re
    from typing import cast

    import jax
    import jax.numpy as jnp

    from pixel_jax import from_pretrained
    from pixel_jax.identity import read_settings
    from pixel_jax.models.io import dtype_of
    from pixel_jax.models.lora import add_lora, combine, split
    from pixel_jax.run_lock import hold
    from pixel_jax.train_config import recorded
    from pixel_jax.training.checkpoint import Checkpoints, fingerprint

    command, config = recorded(read_settings(phase))
    source = pathlib.Path(model or config.model)
    if source.resolve() == pathlib.Path(out).resolve():
        raise UserError(f"--out={out} is the model that the run began with, which its checkpoints need")
    with hold(phase.parent, True), Checkpoints(phase / "checkpoints") as checkpoints:
        steps = checkpoints.steps
        step = checkpoints.latest if step is None else step
        if step not in steps:
            raise UserError(f"{phase} has no checkpoint of step {step}; it has {', '.join(map(str, steps)) or 'none'}")
        try:
            whole, processor = from_pretrained(source, adapter=config.adapter)
        except FileNotFoundError as error:
            raise UserError(f"the model that the run began with: {error}; say where it lies with --model") from error
        dtype = dtype or config.dtype or dtype_of(whole)
        if config.lora is not None:
            whole = add_lora(whole, jax.random.key(config.seed), **dataclasses.asdict(config.lora))
        section = getattr(config, command)
        pattern = re.compile(section.trainable)
        trained, rest = split(whole, lambda path, _: pattern.match(path) is not None)
        del whole
        like = {
            path: jax.ShapeDtypeStruct(x.shape, jnp.promote_types(x.dtype, jnp.float32)) for path, x in trained.items()
        }
        with Waiting(f"reading the checkpoint of step {step}"):
            restored = checkpoints.restore_part(step, {"trainable": like}, base=fingerprint(rest))["trainable"]
    limits = section.rollout if command == "rl" else config.rollout
    whole = combine(cast(dict[str, jax.Array], restored), rest)  # `like`, with its arrays
    with Waiting(f"writing {out}"):
        write_model(whole, processor, out, dtype, adapter_of=config.model if config.adapts else None, limits=limits)
    return step, steps
