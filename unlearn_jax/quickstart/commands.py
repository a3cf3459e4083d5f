"""unlearn-jax train, erase, eval: an adapter of the quickstart's vision-language model, edits of it, and how good they are.

    unlearn-jax train
    unlearn-jax erase                         one trace removed, one answer corrected, one question changed
    unlearn-jax erase --request=edits.json    {"remove": [ID, ...], "correct": {ID: ANSWER}, "ask": {ID: QUESTION}}
    unlearn-jax eval

Requests are carried out one after another: each starts from what the one before has left, in a directory of its own, and what has
been done already is not done twice. `eval` is about the last one. IDs are zoom-0, zoom-1, ..., direct-0, ..., video-0, ...
"""

import dataclasses
import pathlib

from absl import flags

from pixel_jax.config import define_flag

FLAGS = flags.FLAGS
SETTINGS = "unlearn_jax.quickstart.config:Config"  # whose fields `--help` lists
CONFIG = "unlearn/quickstart"


def define_flags(command: str) -> None:
    """The flags of the three commands."""
    define_flag(CONFIG, "The experiment.")
    flags.DEFINE_integer(
        "devices", None, "Spread the examples over so many devices; on a CPU they are made.", lower_bound=1
    )
    flags.DEFINE_string(
        "adapter", None, "Begin with the adapter in this directory (PEFT's format), not with a new one."
    )
    if command == "erase":
        flags.DEFINE_string("request", None, "JSON file of edits; without it, one of each kind.")


def main(command: str, arguments: list[str]) -> None:
    """Runs one of the three commands."""
    from pixel_jax.cli import UserError
    from pixel_jax.config import load
    from pixel_jax.parallel.processes import is_main_process
    from pixel_jax.run_lock import hold
    from pixel_jax.training.progress import announce_compiles
    from unlearn_jax.quickstart.config import Config
    from unlearn_jax.quickstart.job import start

    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}; settings are given as --config.NAME=VALUE")
    config = load(Config, FLAGS.config)
    if FLAGS.adapter is not None:
        config = dataclasses.replace(config, start=FLAGS.adapter)
    mesh = start(FLAGS.devices)
    if is_main_process():
        announce_compiles()
    with hold(config.out, is_main_process()):
        if command == "train":
            from unlearn_jax.quickstart.edit import train

            train(config, mesh)
        elif command == "erase":
            from unlearn_jax.quickstart.edit import edit
            from unlearn_jax.quickstart.requests import EditRequest

            edit(config, EditRequest.read(pathlib.Path(FLAGS.request)) if FLAGS.request else None, mesh)
        else:
            from unlearn_jax.quickstart.evaluate import evaluate

            evaluate(config, mesh)
