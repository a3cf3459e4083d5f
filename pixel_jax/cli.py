"""The program `pixel-jax COMMAND`: it imports the command's module, lets it declare its flags, and runs it."""

import contextlib
import importlib
import os
import pathlib
import re
import sys
from collections.abc import Mapping

from absl import app, flags, logging

from pixel_jax.signals import SIGNALS, leaving
from pixel_jax.terminal import be_quiet, end_starting, keep_streams, say, start

# name -> (module with `define_flags(command)` and `main(command, arguments)`, help)
Commands = Mapping[str, tuple[str, str]]

COMMANDS: Commands = {
    "quickstart": (
        "pixel_jax.quickstart.main",
        "train and compare two small models from scratch, in minutes, on a CPU",
    ),
    "check": (
        "pixel_jax.bench.check",
        "check that a model, the data and this machine go together; without a model, that the accelerator is right",
    ),
    "chat": ("pixel_jax.chat", "ask a trained model about an image and see how it looks at it"),
    "serve": (
        "pixel_jax.serving.main",
        "answer OpenAI's chat completions with trained models, tools and pictures included",
    ),
    "sft": ("pixel_jax.train", "tune a model on traces, from a config file"),
    "rl": ("pixel_jax.train", "train a model by reinforcement learning with the curiosity reward"),
    "export": ("pixel_jax.export", "write a checkpoint of a run as a model directory"),
    "bench": ("pixel_jax.bench.main", "measure speed and memory, compared with other libraries"),
    "eval": ("pixel_jax.evaluation.main", "evaluate a model on benchmarks, compare runs, choose a checkpoint"),
    "synth": ("pixel_jax.synthesis.main", "make traces for tuning from questions whose evidence is known"),
    "plan": ("pixel_jax.planning.main", "predict memory and time of a recipe on TPUs and GPUs that are not present"),
    "view": ("pixel_jax.view", "show runs in the browser: curves, traces, comparisons"),
}


# Remedies when a command runs out of device memory, the most effective first.
LESS_MEMORY: Mapping[str, tuple[str, ...]] = {
    "pixel-jax quickstart": (
        "lower config.rl.rollout.in_flight",
        "raise config.rl.forward.micro_batches, config.warm.forward.micro_batches and config.ground.forward.micro_batches",
        "lower config.rl.prompts, config.warm.batch_size and config.ground.batch_size",
    ),
    "pixel-jax chat": (
        "give smaller or fewer images",
        "lower crop_max_pixels, max_pixels, video_max_pixels and max_response in the model's rollout.json",
        "set implementation there to chunked",
    ),
    "pixel-jax serve": (
        "lower --slots, --prompt_tokens, --images and --image_side",
        "lower crop_max_pixels, max_pixels and max_response in the model's rollout.json",
        "set implementation there to chunked",
    ),
    "pixel-jax sft": (
        "raise config.sft.forward.micro_batches",
        "set config.sft.forward.implementation to kernel, on a CPU to chunked",
        "lower config.rollout.max_pixels, config.rollout.crop_max_pixels and config.rollout.video_max_pixels, or set smaller "
        "shapes by hand: config.trace_tokens, config.trace_frames and config.trace_patches",
        "lower config.sft.batch_size",
        "lower config.watch.batch, or set config.watch.answers to False",
        "split the weights over more devices with config.mesh",
    ),
    "pixel-jax rl": (
        "lower config.rl.rollout.in_flight",
        "raise config.rl.forward.micro_batches",
        "set config.rl.rollout.implementation and config.rl.forward.implementation to kernel, on a CPU to chunked",
        "lower config.rl.rollout.max_response and config.rl.rollout.max_pixels, or set smaller config.image_buffer and "
        "config.prompt_width",
        "lower config.rl.prompts and config.rl.train_batch",
        "lower config.watch.batch",
        "split the weights over more devices with config.mesh",
    ),
    "pixel-jax export": ("set JAX_PLATFORMS=cpu, for the memory of the host",),
    "pixel-jax eval": (
        "lower config.rollout.in_flight",
        "lower config.batch and config.rollout.group_size",
        "set config.rollout.implementation to kernel, on a CPU to chunked",
        "lower config.benchmarks.NAME.buckets and config.rollout.max_response",
        "split the weights over more devices with config.mesh",
    ),
    **dict.fromkeys(
        ("unlearn-jax train", "unlearn-jax erase", "unlearn-jax eval"),
        (
            "lower config.erasure.micro_batch and config.evaluation.batch",
            "set config.forward.implementation to chunked",
            "set config.forward.remat to True",
            "set config.erasure.linearize to False",
        ),
    ),
}


class UserError(Exception):
    """A mistake that the user can correct; it is shown without a traceback."""


def check_output(flag: str, path: str | os.PathLike | None) -> None:
    """Raises UserError if no file can be written to `path` (None or "": none is), before the work whose result would be lost."""
    if not path:
        return
    if pathlib.Path(path).is_dir():
        raise UserError(f"{flag}={path} is a directory: give the name of a file in it")
    if not (parent := pathlib.Path(path).parent).is_dir():
        raise UserError(f"{flag}={path}: there is no directory {parent}")


def usage(program: str, commands: Commands) -> str:
    """The help of a program: a line for each command."""
    width = max(map(len, commands))
    lines = [f"  {name:{width}}  {what}" for name, (_, what) in commands.items()]
    return "\n".join(
        [f"usage: {program} COMMAND [flags]", "", *lines, "", f"{program} COMMAND --help lists the flags."]
    )


@contextlib.contextmanager
def key_errors(name: str):
    """Turns the errors of `config_flags` about a section that the config lacks into a message, and exits."""
    try:
        yield
    except (AttributeError, KeyError) as error:
        key, _, hint = str(error.args[0]).replace('"', "").replace("'", "").partition("\n")
        matching = [flag for flag in sys.argv if key in flag.split("=")[0].split(".")]
        problem = f"the config has no section {key!r}" + "".join(f" to set {flag} in" for flag in matching[:1])
        say(f"{name}: {problem}. {hint or 'A whole section is set as --config.SECTION={...}.'}", sys.stderr)
        sys.exit(1)


def all_settings(name: str, where: str) -> str:
    """The settings of a dataclass, named `MODULE:CLASS`, with the values of the config on the command line if there is one."""
    from pixel_jax.settings import listing

    module, _, cls = where.partition(":")
    arguments = [argument for argument in sys.argv[2:] if argument not in ("-h", "--help")]
    with key_errors(name), contextlib.suppress(flags.Error):  # a config that help does not need is missing
        flags.FLAGS([name, *arguments])
    values = flags.FLAGS["config"].value
    return listing(getattr(importlib.import_module(module), cls), values)


def out_of_memory(name: str, error: Exception) -> str | None:
    """The message for an error that a device's full memory caused in the command `name`; None for any other error."""
    # The text of the error is XLA's; its class depends on where it was raised.
    message = re.search(r"RESOURCE_EXHAUSTED.*", str(error))
    if not message:
        return None
    remedies = LESS_MEMORY.get(name, ("give it less to do at a time",))
    return f"the memory of a device is full ({message[0][:200]}). What helps, the most first: {'; '.join(remedies)}."


def run_program(program: str, commands: Commands) -> None:
    """Runs the command of the command line. A user's mistake ends it with one line; `--traceback` shows more."""
    keep_streams()
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        print(usage(program, commands))
        sys.exit(0 if len(sys.argv) > 1 else 2)
    command = sys.argv[1]
    if command not in commands:
        say(f"{program}: there is no command {command!r}\n\n{usage(program, commands)}", sys.stderr)
        sys.exit(2)
    name = f"{program} {command}"
    SIGNALS.listen(name)
    # Else transformers warns that torch is missing, which is not needed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    module = importlib.import_module(commands[command][0])
    with key_errors(name):
        module.define_flags(command)
    if "config" in flags.FLAGS:  # belongs to the command's module, whoever defined it
        flags.FLAGS.register_key_flag_for_module(module.__name__, flags.FLAGS["config"])
    if {"-h", "--help"} & set(sys.argv[2:]):  # absl's own help looks for flags in the script that was started
        print(f"{module.__doc__}\n{flags.FLAGS.module_help(module)}")
        if where := getattr(module, "SETTINGS", None):
            print(f"\nSettings of the config, --config.KEY=VALUE:\n{all_settings(name, where)}")
        sys.exit(0)

    def run(arguments: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # libraries report every file they write
        if flags.FLAGS.quiet:
            be_quiet()
        start()
        try:
            module.main(command, arguments[1:])
        except (UserError, ValueError, OSError, FloatingPointError, RuntimeError) as error:
            full = out_of_memory(name, error)
            if flags.FLAGS.traceback or (isinstance(error, RuntimeError) and full is None):
                raise
            message = full or str(error)
            if message.startswith("Configuration is not available"):  # every place it was sought, then why it failed
                message = f"--config: {message.splitlines()[-1].strip()}"
            say(f"{name}: {message}", sys.stderr)
            sys.exit(1)
        finally:
            end_starting()

    def parse(arguments: list[str]) -> list[str]:
        try:
            with key_errors(name):
                return flags.FLAGS(arguments)
        except flags.Error as error:
            message = str(error)
            if missing := re.search("Flag (--.*) must have a value other than None", message):
                message = f"give {missing[1]}=..."
            elif refused := re.search(
                "flag (--.*): Error whilst parsing config file:(?s:.*)\nValueError: (.*)", message
            ):
                message = f"{refused[1]}: {refused[2]}"  # the file's own word; any other error is shown with its place
            say(f"{name}: {message}", sys.stderr)
            sys.exit(1)

    flags.DEFINE_bool("traceback", False, "Show where in the code an error came from.")
    flags.DEFINE_bool("quiet", False, "Show no progress, only results, warnings and errors.")
    with leaving():
        app.run(run, argv=[name, *sys.argv[2:]], flags_parser=parse)


def main() -> None:
    """Entry point of the console script."""
    run_program("pixel-jax", COMMANDS)
