"""`pixel-jax view TRACES.json --out PAGE.html`: saved traces as a page."""

from absl import flags

from pixel_jax.cli import UserError

FLAGS = flags.FLAGS


def define_flags(command: str) -> None:
    flags.DEFINE_string("out", "traces.html", "The page to write.")


def main(command: str, arguments: list[str]) -> None:
    from pixel_jax.evaluation import report, trace
    from pixel_jax.files import FileError
    from pixel_jax.terminal import say

    if len(arguments) != 1:
        raise UserError("give one file of traces: pixel-jax view TRACES.json --out PAGE.html")
    try:
        traces = trace.load(arguments[0])
    except FileError as error:
        raise UserError(f"{arguments[0]} does not hold traces: {error}") from error
    report.write(FLAGS.out, report.traces_page(traces, arguments[0]))
    say(f"{len(traces)} traces are drawn in {FLAGS.out}.")
