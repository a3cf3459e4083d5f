"""unlearn-jax train, erase, eval: train an adapter, carry out requests that edit it, and evaluate the edits.

    unlearn-jax train                         traces of the quickstart; --config=unlearn/people: facts about people
    unlearn-jax erase --request=requests.jsonl
    unlearn-jax eval

With --config=unlearn/movielens_tallrec (or _llara) or unlearn/noisy_responses they fill in the table of a comparison instead, and
carry out no requests.

The adapter of a finished `pixel-jax sft`:

    unlearn-jax erase --run=runs/sft --request=requests.jsonl

A request is a line of JSON, see docs/unlearning.md:

    {"id": "zoom-3", "kind": "remove", "reason": "consent withdrawn", "who": "A. Person", "when": "2026-11-30"}

Requests are carried out in order, each starting from the result of the one before. `requests.log.jsonl` in the run's directory
has a line for each, `requests/NUMBER/` its adapter, report and page. A request that the log has is not repeated.
"""

import dataclasses
import os
import pathlib
import pkgutil
import sys
from typing import TYPE_CHECKING, NamedTuple

from absl import flags

from pixel_jax.config import define_flag

if TYPE_CHECKING:
    from jax.sharding import Mesh

FLAGS = flags.FLAGS
SETTINGS = "unlearn_jax.quickstart.config:Config"  # whose fields `--help` lists
CONFIG = "unlearn/quickstart"
CONFIG_OF_RUN = "unlearn/run"  # where --run is given


class Task(NamedTuple):
    """Where the code of a task is: names for `pkgutil.resolve_name`, which imports it when a command needs it."""

    config: str  # the class of its configuration
    edit: str  # a module or value with `train` and `edit`
    evaluate: str  # a module or value with `evaluate`


TASKS = {
    "traces": Task(SETTINGS, "unlearn_jax.quickstart.edit", "unlearn_jax.quickstart.evaluate"),
    "people": Task("unlearn_jax.people.config:PeopleConfig", "unlearn_jax.people.edit", "unlearn_jax.people.evaluate"),
    "recommendation": Task(
        "unlearn_jax.recommendation.config:RecommendationConfig",
        "unlearn_jax.recommendation.study:COMMANDS",
        "unlearn_jax.recommendation.study:COMMANDS",
    ),
    "noisy_responses": Task(
        "unlearn_jax.noisy_responses.config:NoisyResponsesConfig",
        "unlearn_jax.noisy_responses.study:COMMANDS",
        "unlearn_jax.noisy_responses.study:COMMANDS",
    ),
    "run": Task("unlearn_jax.own_run.config:RunEditConfig", "unlearn_jax.own_run.edit", "unlearn_jax.own_run.evaluate"),
}


def define_flags(command: str) -> None:
    """The flags of the three commands."""
    # The config file is read while flags are parsed, so its default has to be known before.
    of_run = any(argument.lstrip("-").partition("=")[0] == "run" for argument in sys.argv[2:])
    define_flag(CONFIG_OF_RUN if of_run else CONFIG, "The model, the examples and the training.")
    flags.DEFINE_string("run", None, "Edit the adapter of this run of `pixel-jax sft`: its config.out.")
    flags.DEFINE_integer(
        "devices", None, "Spread the examples over so many devices; on a CPU they are made.", lower_bound=1
    )
    flags.DEFINE_string(
        "adapter", None, "Begin with the adapter in this directory (PEFT's format), not with a new one."
    )
    if command == "erase":
        flags.DEFINE_string("request", None, "File of requests, a line of JSON each; without it, one of each kind.")
        flags.DEFINE_bool("show_content", False, "Show forgotten texts and images on the pages of the requests.")


def main(command: str, arguments: list[str]) -> None:
    """Runs one of the three commands."""
    from pixel_jax.cli import UserError
    from pixel_jax.config import load
    from pixel_jax.parallel.processes import is_main_process
    from pixel_jax.run_lock import hold
    from pixel_jax.training.progress import announce_compiles
    from unlearn_jax.requests.request import read_requests

    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}; settings are given as --config.NAME=VALUE")
    name = FLAGS.config.get("task", "traces")
    if name not in TASKS:
        raise UserError(f"config.task must be one of {', '.join(TASKS)}, not {name!r}")
    if FLAGS.run is not None:
        if name != "run":
            raise UserError(f"--run={FLAGS.run} goes with --config={CONFIG_OF_RUN}, not with one of task {name!r}")
        FLAGS.config.run = FLAGS.run
    task = TASKS[name]
    config = load(pkgutil.resolve_name(task.config), FLAGS.config)
    if FLAGS.adapter is not None:
        if name != "traces":
            raise UserError(
                f"--adapter={FLAGS.adapter} goes with config.task=traces; the model of {name!r} is made here"
            )
        config = dataclasses.replace(config, start=FLAGS.adapter)
    requests = None  # read first, so that a mistake in the file costs no time
    if command == "erase" and FLAGS.request:
        requests = read_requests(pathlib.Path(FLAGS.request))
    mesh = start(FLAGS.devices)
    if is_main_process():
        announce_compiles()
    with hold(config.out, is_main_process()):
        if command == "train":
            pkgutil.resolve_name(task.edit).train(config, mesh)
        elif command == "erase":
            pkgutil.resolve_name(task.edit).edit(config, requests, mesh, show_content=FLAGS.show_content)
        else:
            pkgutil.resolve_name(task.evaluate).evaluate(config, mesh)


def start(devices: int | None) -> "Mesh | None":
    """Joins the processes of the run and returns a mesh of `devices` devices on its axis `data`, or None for one device.

    It must be called before JAX starts. On a CPU `devices` virtual devices are created; None takes the existing devices.
    """
    import jax

    from pixel_jax.parallel import make_mesh
    from pixel_jax.parallel.mesh import use_cores
    from pixel_jax.parallel.processes import COUNT, initialize

    if devices is not None:
        processes = int(os.environ.get(COUNT, 1))
        if devices % processes:
            raise ValueError(f"{devices} devices cannot be spread over {processes} processes evenly")
        use_cores(devices // processes)
    initialize()
    available = jax.devices()
    count = devices or len(available)
    if count > len(available):
        raise ValueError(f"{count} devices were asked for, there are {len(available)}")
    return make_mesh({"data": count}, available[:count]) if count > 1 else None
