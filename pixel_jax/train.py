"""`pixel-jax sft --config=...` and `pixel-jax rl --config=...`: trains a model directory on a file of examples."""

import dataclasses
from typing import Literal

from absl import flags

from pixel_jax.config import define_flag, load
from pixel_jax.run_lock import hold
from pixel_jax.train_config import TrainConfig

FLAGS = flags.FLAGS
SETTINGS = "pixel_jax.train_config:TrainConfig"  # whose fields `--help` lists


def define_flags(command: str) -> None:
    """Declares the flags of `sft` and `rl`."""
    define_flag(None, "The experiment: a file, or a name as pixel/own_data.")
    flags.mark_flag_as_required("config")
    flags.DEFINE_string(
        "adapter", None, "Go on with the adapter in this directory (PEFT's format), not with a new one."
    )
    flags.DEFINE_bool(
        "resume_changed", False, "Go on with a run although its settings or data have changed; its history says which."
    )


def main(command: str, arguments: list[str]) -> None:
    """Runs the phase that the command names."""
    from pixel_jax.cli import UserError

    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}; settings are given as --config.NAME=VALUE")
    phase: Literal["sft", "rl"] = "sft" if command == "sft" else "rl"
    config = load(TrainConfig, FLAGS.config)
    if FLAGS.adapter is not None:
        config = dataclasses.replace(config, adapter=FLAGS.adapter, lora=None)
    if getattr(config, phase) is None:
        raise UserError(f"the config has no section {command!r}")

    from pixel_jax.parallel.processes import fail_together, initialize, is_main_process
    from pixel_jax.phases import train
    from pixel_jax.training.preemption import NOTICE

    NOTICE.listen()
    initialize()
    with fail_together(), hold(config.out, is_main_process()):
        train(phase, config, resume_changed=FLAGS.resume_changed)
