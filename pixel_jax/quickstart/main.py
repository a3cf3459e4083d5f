"""`pixel-jax quickstart`: runs every phase for every seed, then writes `metrics.json` and `report.html`."""

import io
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from pixel_jax.config import define_flag

FLAGS = flags.FLAGS
SETTINGS = "pixel_jax.quickstart.config:QuickstartConfig"  # whose fields `--help` lists
CONFIG = "pixel/quickstart"


def define_flags(command: str) -> None:
    """Declares the flags of `quickstart`."""
    define_flag(CONFIG, "The experiment.")
    flags.DEFINE_integer("seeds", 1, "How many times to repeat it, with seeds 0, 1, ...", lower_bound=1)
    flags.DEFINE_string("out", "runs/quickstart", "Where checkpoints, metrics and the report go.")


def write_card(config, path: pathlib.Path) -> None:
    """Writes a held-out scene that needs the tool, as a PNG file."""
    import numpy as np
    from PIL import Image

    from pixel_jax.files import write_file
    from pixel_jax.quickstart.task import EVALUATION_SEED, lesson_of

    scene = lesson_of(config).scene(np.random.default_rng(EVALUATION_SEED), "test", config.scenes, hard=True)
    file = io.BytesIO()
    Image.fromarray(scene.image).save(file, "PNG")
    write_file(path, file.getvalue())


def chat_command(model: pathlib.Path, picture: pathlib.Path, tools: Sequence[str]) -> str:
    """A command for a shell in this folder that asks the model about the picture; it activates the virtual environment."""
    from pixel_jax.quickstart.miniature import QUESTION
    from pixel_jax.tools.named import DEFAULT

    named = [] if tuple(tools) == DEFAULT else [f"--tools={','.join(tools)}"]
    asks = shlex.join(["pixel-jax", "chat", str(model), str(picture), "--question", QUESTION, *named])
    activate = pathlib.Path(sys.prefix) / "bin" / "activate"  # of a virtual environment; others have none
    return f"source {shlex.quote(os.path.relpath(activate))} && {asks}" if activate.is_file() else asks


def main(command: str, arguments: list[str]) -> None:
    """Runs the quickstart."""
    from pixel_jax.cli import UserError
    from pixel_jax.config import load
    from pixel_jax.evaluation import report, transcript
    from pixel_jax.quickstart.config import QuickstartConfig
    from pixel_jax.quickstart.page import page
    from pixel_jax.quickstart.pipeline import run_seeds, say
    from pixel_jax.quickstart.summary import summarise
    from pixel_jax.quickstart.task import lesson_of
    from pixel_jax.state_files import write_json

    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}; settings are given as --config.NAME=VALUE")
    config = load(QuickstartConfig, FLAGS.config)
    out = pathlib.Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    results, arms, first = {}, lesson_of(config).arms, out / f"seed-{config.seed}"
    metrics: dict[str, Any] = {}
    for seed, result in run_seeds(config, out, FLAGS.seeds):
        results[seed] = result
        metrics = summarise(results)  # after each seed, so that first results can be read early
        write_json(out / "metrics.json", metrics)
        traces = [item for name in (*arms, "warm") for item in transcript.load(first / name / "traces.json")]
        report.write(out / "report.html", page(config, metrics, traces))
    numbers = metrics["rl"]
    for name, arm in arms.items():
        result = numbers[name]
        say(f"{arm.label}: accuracy {result['accuracy']:.3f}, {lesson_of(config).rows['rapr']} {result['rapr']:.3f}")
    say(f"\n{out / 'metrics.json'} has the numbers, {out / 'report.html'} the curves and traces.")
    write_card(config, out / "card.png")
    say(f"Talk to the model about {out / 'card.png'}, a scene it has not seen (it knows this one question):")
    tools = [tool.name for tool in lesson_of(config).tools]
    say(f"  {chat_command(first / next(iter(arms)) / 'model', out / 'card.png', tools)}")
