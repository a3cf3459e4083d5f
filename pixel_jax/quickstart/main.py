"""`pixel-jax quickstart`: every phase for every seed, then `metrics.json` and `report.html`."""

import pathlib

from absl import flags

from pixel_jax.config import define_flag

FLAGS = flags.FLAGS
SETTINGS = "pixel_jax.quickstart.config:QuickstartConfig"  # whose fields `--help` lists
CONFIG = "pixel/quickstart"


def define_flags(command: str) -> None:
    define_flag(CONFIG, "The experiment.")
    flags.DEFINE_integer("seeds", 1, "How many times to repeat it, with seeds 0, 1, ...", lower_bound=1)
    flags.DEFINE_string("out", "runs/quickstart", "Where checkpoints, metrics and the report go.")


def main(command: str, arguments: list[str]) -> None:
    import dataclasses

    from pixel_jax.cli import UserError
    from pixel_jax.config import load
    from pixel_jax.evaluation import report, trace
    from pixel_jax.quickstart.config import QuickstartConfig
    from pixel_jax.quickstart.page import page
    from pixel_jax.quickstart.pipeline import ARMS, run_seed, say
    from pixel_jax.quickstart.summary import summarise
    from pixel_jax.state_files import write_json

    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}; settings are given as --config.NAME=VALUE")
    config = load(QuickstartConfig, FLAGS.config)
    out = pathlib.Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    results = {}
    for seed in range(config.seed, config.seed + FLAGS.seeds):
        results[seed] = run_seed(dataclasses.replace(config, seed=seed), out / f"seed-{seed}")
        metrics = summarise(results)  # after each seed: what there is so far is there to look at
        write_json(out / "metrics.json", metrics)
        first = out / f"seed-{config.seed}"
        traces = [item for name in (*ARMS, "warm") for item in trace.load(first / name / "traces.json")]
        report.write(out / "report.html", page(config, metrics, traces))
    numbers = metrics["rl"]
    for arm in ARMS:
        say(f"{arm}: accuracy {numbers[arm]['accuracy']:.3f}, rate of pixel-space reasoning {numbers[arm]['rapr']:.3f}")
    say(f"\n{out / 'metrics.json'} has the numbers, {out / 'report.html'} the curves and traces. Talk to the model:")
    say(f'  pixel-jax chat {first / "curiosity" / "model"} IMAGE --question "What is the digit on the card?"')
