"""`pixel-jax chat DIR IMAGE --question ...`: one question, one conversation, shown as it went."""

import dataclasses
import pathlib
import sys

from absl import flags

from pixel_jax.cli import UserError

FLAGS = flags.FLAGS


def define_flags(command: str) -> None:
    flags.DEFINE_string("question", None, "What to ask.", required=True)
    flags.DEFINE_bool("video", False, "The images are the frames of one video.")
    flags.DEFINE_bool("greedy", True, "Take the most probable token each time; otherwise sample.")
    flags.DEFINE_integer("seed", 0, "Seed of the sampling.")
    flags.DEFINE_string("html", None, "Also draw the conversation as a page in this file.")


def load_rollout_config(directory: pathlib.Path):
    """The limits and pixel budgets a model was trained with (`rollout.json` beside it), or the released ones."""
    from pixel_jax.config import load
    from pixel_jax.files import read_json
    from pixel_jax.rollout.config import RolloutConfig

    path = directory / "rollout.json"
    return load(RolloutConfig, read_json(path), str(path)) if path.exists() else RolloutConfig()


def main(command: str, arguments: list[str]) -> None:
    if len(arguments) < 2:
        raise UserError("give the directory of a model and at least one image: pixel-jax chat DIR IMAGE --question ...")
    import jax

    from pixel_jax import from_pretrained
    from pixel_jax.data.images import load_image
    from pixel_jax.dialog.tokenizer import Vocabulary
    from pixel_jax.evaluation import report
    from pixel_jax.evaluation.trace import make_trace
    from pixel_jax.rollout.prompts import Query, build_prompts, tables
    from pixel_jax.rollout.rollout import rollout
    from pixel_jax.rollout.trajectory import to_host
    from pixel_jax.training.answers import last_boxed
    from pixel_jax.training.progress import announce_compiles, use_compilation_cache

    directory, images = pathlib.Path(arguments[0]), arguments[1:]
    query = Query(FLAGS.question, [load_image(path) for path in images], FLAGS.video)
    announce_compiles()
    use_compilation_cache(pathlib.Path.home() / ".cache" / "pixel_jax")  # models of one shape share their programs
    model, processor = from_pretrained(directory)
    if processor is None:
        raise UserError(f"{directory} has no tokenizer: it can be trained from, but not talked to")
    config = dataclasses.replace(load_rollout_config(directory), group_size=1)
    config = dataclasses.replace(config, temperature=0.0 if FLAGS.greedy else config.temperature or 1.0)
    vocabulary = Vocabulary.of(processor.tokenizer)
    prompts = build_prompts([query], vocabulary, tables(vocabulary), config)
    trajectories = to_host(rollout(model, prompts, jax.random.key(FLAGS.seed), config))
    written = vocabulary.to_bytes(trajectories.tokens[0][trajectories.chosen[0]]).decode("utf-8", "replace")
    trace = make_trace(trajectories, 0, query, vocabulary, answer=last_boxed(written))
    show(trace)
    if FLAGS.html:
        report.write(FLAGS.html, report.traces_page([trace], query.question))
        print(f"\nThe conversation is drawn in {FLAGS.html}.")


def show(trace, stream=None) -> None:
    """A trace as text: who said what, which box of which image was cropped, what was seen of it."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
    print_line = lambda who, text, style: console.print(Text.assemble((f"{who:>9}  ", style), text))
    print_line("question", trace.question, "bold")
    for picture in trace.overview:
        print_line("sees", f"{picture.caption}, {picture.width}x{picture.height}", "dim")
    call = 0
    for turn in trace.turns:
        if turn.role == "assistant":
            print_line("model", turn.text, "bold green")
            continue
        call += 1
        for picture in trace.pictures:
            for number, *box in picture.boxes:
                if number == call:
                    where = "({}, {}) to ({}, {})".format(*box)
                    print_line(
                        "looks at", f"{picture.caption}, {where} of {picture.width}x{picture.height} pixels", "cyan"
                    )
        print_line("tool", turn.text, "red" if turn.failed else "bold blue")
    print_line("answer", trace.answer if trace.answer is not None else f"none ({trace.stop})", "bold")
