"""`pixel-jax bench`: rollouts, updates and operations, compared with other libraries and with the machine's peak rates.

Every case first checks that all alternatives give the same output, then runs them in turns. If torch or transformers are not
installed, their alternatives are left out.

`pixel-jax bench compare A.json B.json` says what changed between two records by more than noise.
"""

from absl import flags

FLAGS = flags.FLAGS
CASES = "pixel_jax.bench.cases"


def define_flags(command: str) -> None:
    """Declares the flags of `bench`."""
    flags.DEFINE_bool("quick", False, "Tiny shapes and two rounds: whether it works, not how fast.")
    flags.DEFINE_list("only", [], "The cases to measure, separated by commas; all if empty.")
    flags.DEFINE_string("out", "runs/bench.json", "Where the figures are written.")


def main(command: str, arguments: list[str]) -> None:
    """Runs the cases, or compares two records."""
    if arguments[:1] == ["compare"]:
        from pixel_jax.bench import compare

        return compare.main(arguments[1:])
    import jax

    from pixel_jax.bench.machine import count_cores
    from pixel_jax.bench.report import run_cases
    from pixel_jax.cli import UserError
    from pixel_jax.parallel.mesh import use_cores

    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}; cases are named by --only=NAME,NAME")
    if not FLAGS.quick:
        jax.config.update("jax_enable_compilation_cache", False)  # a program read from the cache was not compiled
    use_cores(count_cores())  # crops are spread over the cores; one device has the threads of all
    run_cases(CASES, FLAGS.only, FLAGS.quick, FLAGS.out)
