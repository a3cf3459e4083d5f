"""Predicts memory and time of a recipe's steps on a machine that need not be present: `pixel-jax plan`.

The steps of training are compiled from shapes alone for TPU slices and nodes of GPUs that are not present (extras `plan` and
`plan-gpu`). Their operations and the bytes that they move and send are counted and divided by published peak rates, which gives a
lower bound on the time.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from absl import flags

from pixel_jax.config import define_flag
from pixel_jax.state_files import write_json
from pixel_jax.terminal import print_table, say

if TYPE_CHECKING:
    from pixel_jax.planning.programs import Recipe

FLAGS = flags.FLAGS
SETTINGS = "pixel_jax.train_config:TrainConfig"  # whose fields `--help` lists


def define_flags(command: str) -> None:
    """Declares the flags of `plan`."""
    define_flag(None, "The experiment: a file, or a name as pixel/qwen2_5_vl_7b_rl.")
    flags.mark_flag_as_required("config")
    flags.DEFINE_list(
        "topology",
        [],
        "Slices, as v6e:16x16 or v5p:4x4x4 (v4, v5e, v5p, v6e, tpu7x), or nodes x GPUs, as h100:8 or h200:2x8 (a100, h100, h200, "
        "b200), comma-separated.",
    )
    flags.DEFINE_list(
        "steps", [], "Those to plan, of the steps that the config has: sft, rollout, score, update. Default: all."
    )
    flags.DEFINE_string("json", None, "File for the plans.")
    flags.DEFINE_integer("fitting", 1, "Shardings that fit to compile for each step; the fastest is the plan.")
    flags.DEFINE_integer("most", 4, "Most shardings to compile for each step.")
    flags.DEFINE_bool(
        "fit",
        False,
        "Also choose prompts in flight and micro-batches: the largest that fit (mostly two more compilations for each step).",
    )
    flags.DEFINE_bool("configured", False, "Plan the config's own meshes and micro-batches, and look for no others.")
    flags.DEFINE_bool(
        "video", False, "Plan the shapes of videos (config.video_buffer, ...) instead of those of images."
    )
    flags.DEFINE_multi_string(
        "pools",
        [],
        "File of --json (FILE@MACHINE where it has several): predict an iteration of rl together, apart and with rows that carry "
        "over, from the plans in it. Given twice: the plans of training, and of rollouts on other chips. Compiles nothing.",
    )
    flags.DEFINE_float(
        "mean_response", None, "With --pools: tokens of the mean row. Default: all are as long as allowed."
    )
    flags.DEFINE_float("pool_gigabits", 100.0, "With --pools: Gb/s that a host receives from the other pool.")
    flags.DEFINE_string("scaling", None, "A kind of chip: also predict weak scaling from 8 to 1024 of them.")


def main(command: str, arguments: list[str], of_recipe: Callable[["Recipe"], "Recipe"] = lambda recipe: recipe) -> None:
    """Makes the plans of the flags; `of_recipe` converts the config's recipe to one of other steps."""
    import jax
    from rich.console import Console

    from pixel_jax.cli import UserError, check_output
    from pixel_jax.config import load
    from pixel_jax.planning import fit, report
    from pixel_jax.planning.machines import machine, slices
    from pixel_jax.planning.programs import RUN
    from pixel_jax.planning.search import Compiled, search
    from pixel_jax.planning.weak_scaling import Point, weak_scaling
    from pixel_jax.provenance import commit
    from pixel_jax.train_config import TrainConfig

    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}; settings are given as --config.NAME=VALUE")
    if not FLAGS.topology and not FLAGS.scaling and not FLAGS.pools:
        raise UserError("name a machine, as in --topology=v6e:16x16 or --topology=h100:8, or --scaling=v5p")
    if min(FLAGS.fitting, FLAGS.most) < 1:
        raise UserError(f"--fitting={FLAGS.fitting} and --most={FLAGS.most} must be positive")
    check_output("--json", FLAGS.json)
    jax.config.update("jax_platforms", "cpu")  # this machine is not the one to plan for
    console = Console(width=None if sys.stdout.isatty() else 200)  # a file has no width
    config = load(TrainConfig, FLAGS.config)
    if FLAGS.pools:
        return compare_pools(config, console)
    if FLAGS.configured and not config.mesh:
        raise UserError("--configured: the config has no mesh, so its runs are on one device")
    if FLAGS.video:
        config = of_videos(config)
    check_shapes(config)
    recipe = of_recipe(dataclasses.replace(read_recipe(config, console), configured=FLAGS.configured))
    if unknown := set(FLAGS.steps) - set(recipe.steps):
        raise UserError(f"this config has no step {sorted(unknown)[0]!r}; it has {', '.join(recipe.steps)}")
    if FLAGS.scaling:
        slices(FLAGS.scaling)  # an unknown kind stops before anything is compiled
    machines = [machine(name) for name in FLAGS.topology]
    wanted = [step for step in recipe.steps if not FLAGS.steps or step in FLAGS.steps]
    if set(wanted) & set(RUN):
        config = recipe.config
        assert config.rl is not None and config.image_buffer is not None
        config.rl.rollout.check_model(recipe.network, videos=config.image_buffer[0] > 1 and FLAGS.video)
    if "rollout" in wanted and not {"update", "score"} & set(wanted):
        console.print("Without a plan of the update its state is counted as the config's mesh has it.", style="dim")
    learning = [step for step in wanted if step in RUN]
    plans: list[Compiled] = []
    best: dict[str, dict[str, Compiled]] = {}
    points: list[Point] = []

    def keep() -> None:
        if FLAGS.json:
            write_json(FLAGS.json, report.document(plans, best, points) | {"commit": commit()})

    def note(compiled) -> None:
        console.print(report.line(compiled))
        plans.append(compiled)
        keep()

    least = dataclasses.replace(recipe, together=1) if FLAGS.fit else recipe
    for target in machines:
        best[target.name] = {}
        for steps in [[step] for step in wanted if step not in RUN] + [learning] * bool(learning):
            found = search(least, steps, target, fitting=FLAGS.fitting, most=FLAGS.most, report=note)
            if found and FLAGS.fit:
                found = fit.enlarge(least, found, target, report=note)
            best[target.name] |= found
            keep()
            if not found:
                made = [compiled for compiled in plans if compiled.plan.topology == target.name]
                say(fit.shortfall(made, target, steps, fitted=FLAGS.fit))
            elif text := fit.lines(found):
                say("\n".join([f"For the config, to run as planned on {target.name}:", *text]))
    if plans:
        print_table(report.table(plans, best))
    if FLAGS.scaling:
        step = "update" if "update" in recipe.steps else recipe.steps[0]
        for point in weak_scaling(recipe, step, FLAGS.scaling, most=FLAGS.most):
            console.print(report.line(point.compiled))
            points.append(point)
            keep()
        print_table(report.scaling_table(points, step))


def compare_pools(config, console) -> None:
    """Prints what an iteration of a config takes with rollouts and training together and apart (`planning.pools`)."""
    from pixel_jax.cli import UserError
    from pixel_jax.planning import pools

    recipe = read_recipe(config, console)
    try:
        found = pools.compared(recipe, FLAGS.pools, FLAGS.mean_response, FLAGS.pool_gigabits)
    except (ValueError, OSError) as error:
        raise UserError(f"--pools: {error}") from error
    print_table(pools.table(found, pools.moved_bytes(recipe)))


def of_videos(config):
    """Returns the config with its shapes for videos instead of those for images.

    Raises:
        UserError: the config has no shapes for videos.
    """
    from pixel_jax.cli import UserError

    names = {"image_buffer": "video_buffer", "prompt_width": "video_prompt_width"}
    if config.sft is not None:
        names |= {"trace_frames": "video_frames", "trace_patches": "video_patches"}
    shapes = {name: getattr(config, source) for name, source in names.items()}
    for name, shape in shapes.items():
        if shape is None:
            raise UserError(f"--video: config.{names[name]} is not set")
    return dataclasses.replace(config, **shapes)


def check_shapes(config) -> None:
    """Checks that a config gives the shapes, which a plan cannot infer because it reads no data.

    Raises:
        UserError: shapes are missing; the message names them.
    """
    from pixel_jax.cli import UserError

    needed = {"sft": ("trace_tokens", "trace_frames", "trace_patches"), "rl": ("image_buffer", "prompt_width")}
    for phase, names in needed.items():
        lacking = [f"config.{name}" for name in names if getattr(config, name) is None]
        if getattr(config, phase) is not None and lacking:
            raise UserError(f"a plan reads no data, from which shapes are worked out: give {', '.join(lacking)}")


def read_recipe(config, console):
    """Makes the recipe of a config, with the network and the tokenizer of its model directory if there is one.

    Raises:
        UserError: there is no such directory, and the config names no architecture.
    """
    from pixel_jax.cli import UserError
    from pixel_jax.dialog.tokenizer import Vocabulary
    from pixel_jax.models.config import CONFIG
    from pixel_jax.models.families import read_config
    from pixel_jax.models.gguf_files import find_gguf, read_gguf
    from pixel_jax.models.processor import Processor
    from pixel_jax.models.released import released
    from pixel_jax.planning.programs import Recipe
    from pixel_jax.quickstart.vocabulary import build_vocabulary
    from pixel_jax.rollouts.prompts import tables
    from pixel_jax.tools.named import find_format

    directory, vocabulary = pathlib.Path(config.model), None
    gguf = None if (directory / CONFIG).exists() else find_gguf(directory)
    if gguf is not None or (directory / CONFIG).exists():
        if gguf is not None:
            network, _, processor = read_gguf(gguf)
        else:
            network, _ = read_config(directory)
            processor = Processor.from_directory(directory, network)
        vocabulary = Vocabulary.of(processor.tokenizer) if processor else None
    elif config.architecture is None:
        raise UserError(f"{config.model} is no model directory, and the config names no architecture")
    else:
        network = released(config.architecture)
    if vocabulary is None:
        console.print("No tokenizer there: the text of observations is counted in that of the quickstart.", style="dim")
        vocabulary = build_vocabulary()
    config = config.for_model(network)
    limits = config.rollout if config.rl is None else config.rl.rollout
    return Recipe(config, network, tables(vocabulary, calls=find_format(limits.call_format)))
