"""`pixel-jax synth --config=configs/pixel/synth.py`: makes traces for `pixel-jax sft` and a report from seeds."""

import pathlib

from absl import flags

from pixel_jax.cli import UserError
from pixel_jax.config import define_flag, load
from pixel_jax.terminal import say

FLAGS = flags.FLAGS
SETTINGS = "pixel_jax.synthesis.run:SynthConfig"  # whose fields `--help` lists


def define_flags(command: str) -> None:
    """Declares the flags of `synth`."""
    define_flag(None, "The synthesis: a file, or a name as pixel/synth.")
    flags.mark_flag_as_required("config")


def main(command: str, arguments: list[str]) -> None:
    """Carries out the synthesis of the config."""
    from pixel_jax.data.limits import use_limits
    from pixel_jax.synthesis.run import SynthConfig, show, synthesize

    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}; settings are given as --config.NAME=VALUE")
    config = load(SynthConfig, FLAGS.config)
    use_limits(config.limits)
    report = synthesize(config)
    show(report)
    if not report["made"]:
        raise UserError(f"no seed became a trace; {config.out}/report.json says why")
    traces = pathlib.Path(config.out) / "traces.jsonl"
    say(f"The traces are in {traces}, their images beside them: pixel-jax sft reads them as --config.data={traces}.")
