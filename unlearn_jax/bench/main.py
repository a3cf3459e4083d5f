"""`unlearn-jax bench`: curvature products and solves compared with other libraries, and an edit compared with retraining.

Every case first checks that all alternatives give the same product (for solvers, the error from the dense solution), and then
measures them in turn. Of torch, kronfluence, dattri and pyDVL those that are not installed are left out and named.

`unlearn-jax bench compare A.json B.json` says what changed between two records by more than noise.
"""

import pathlib

from absl import flags

FLAGS = flags.FLAGS
CASES = "unlearn_jax.bench.cases"


def define_flags(command: str) -> None:
    """Defines the flags of `unlearn-jax bench`."""
    flags.DEFINE_bool("quick", False, "Tiny shapes and two rounds: whether it works, not how fast.")
    flags.DEFINE_list("only", [], "The cases to measure, separated by commas; all if empty.")
    flags.DEFINE_string("out", "runs/unlearn-bench.json", "Where the figures are written.")
    flags.DEFINE_string("cost_curve", None, "Write the curve of an edit's cost there, instead of the bench.")
    flags.DEFINE_string("attribution", None, "Write the linear datamodelling score there, instead of the bench.")


def main(command: str, arguments: list[str]) -> None:
    """Runs the cases, measures the cost curve or the linear datamodelling score, or compares two records."""
    if arguments[:1] == ["compare"]:
        from pixel_jax.bench import compare

        return compare.main(arguments[1:])
    from pixel_jax.bench.report import run_cases
    from pixel_jax.cli import UserError
    from unlearn_jax.bench.attribution import AttributionSetting, measure
    from unlearn_jax.bench.cost_curve import cost_curve

    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}; cases are named by --only=NAME,NAME")
    if FLAGS.attribution:
        setting = (
            AttributionSetting(subsets=3, people=5, width=16, epochs=4, pretraining=60, tests=8)
            if FLAGS.quick
            else AttributionSetting()
        )
        measure(setting, pathlib.Path(FLAGS.attribution))
    elif FLAGS.cost_curve:
        cost_curve(FLAGS.cost_curve, FLAGS.quick)
    else:
        run_cases(CASES, FLAGS.only, FLAGS.quick, FLAGS.out)
