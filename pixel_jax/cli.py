"""`pixel-jax COMMAND`: finds the command's module, lets it declare its flags, and hands over."""

import contextlib
import importlib
import sys

from absl import app, flags, logging

# Command: (module with `define_flags()` and `main(arguments)`, what it does)
COMMANDS = {
    "quickstart": (
        "pixel_jax.quickstart.main",
        "train and compare two small models from scratch, in minutes, on a CPU",
    ),
    "chat": ("pixel_jax.chat", "ask a trained model about an image and see how it looks at it"),
    "sft": ("pixel_jax.train", "instruction tuning on traces, from a config file"),
    "rl": ("pixel_jax.train", "reinforcement learning with the curiosity reward, from a config file"),
    "view": ("pixel_jax.view", "draw saved traces as a page"),
}


class UserError(Exception):
    """Something the user can mend; shown without a traceback."""


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: pixel-jax COMMAND [flags]", "", *lines, "", "pixel-jax COMMAND --help lists the flags."])


@contextlib.contextmanager
def key_errors(command: str):
    """Around the reading of flags: `config_flags` lets an unknown key of a config end as an AttributeError."""
    try:
        yield
    except AttributeError as error:
        print(f"pixel-jax {command}: unknown key of the config: {error}", file=sys.stderr)
        sys.exit(1)


def main() -> None:
    """Entry point of the console script."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        print(usage())
        sys.exit(0 if len(sys.argv) > 1 else 2)
    command = sys.argv[1]
    if command not in COMMANDS:
        print(f"pixel-jax: there is no command {command!r}\n\n{usage()}", file=sys.stderr)
        sys.exit(2)
    module = importlib.import_module(COMMANDS[command][0])
    with key_errors(command):
        module.define_flags(command)
    if {"-h", "--help"} & set(sys.argv[2:]):  # absl's own help looks for flags in the script that was started
        print(f"{module.__doc__}\n{flags.FLAGS.module_help(module)}")
        sys.exit(0)

    def run(arguments: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # libraries report every file they write
        try:
            module.main(command, arguments[1:])
        except (UserError, ValueError, OSError) as error:
            if flags.FLAGS.traceback:
                raise
            print(f"pixel-jax {command}: {error}", file=sys.stderr)
            sys.exit(1)

    def parse(arguments: list[str]) -> list[str]:
        with key_errors(command):
            return app.parse_flags_with_usage(arguments)

    flags.DEFINE_bool("traceback", False, "Show where in the code an error came from.")
    app.run(run, argv=[f"pixel-jax {command}", *sys.argv[2:]], flags_parser=parse)
