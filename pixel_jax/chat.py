"""`pixel-jax chat DIR IMAGE --question ...`: one question, one conversation, shown as it went."""

import dataclasses
import os
import pathlib
import sys

from absl import flags

from pixel_jax.cli import UserError
from pixel_jax.terminal import printable, say, warn

FLAGS = flags.FLAGS


def define_flags(command: str) -> None:
    flags.DEFINE_string("question", None, "What to ask.", required=True)
    flags.DEFINE_bool("video", False, "The images are the frames of one video, or a video file.")
    flags.DEFINE_bool("greedy", True, "Take the most probable token each time; otherwise sample, at temperature 1.")
    flags.DEFINE_float("temperature", None, "Sample at this temperature; 0 is greedy.", lower_bound=0.0)
    flags.DEFINE_integer("seed", 0, "Seed of the sampling.")
    flags.DEFINE_list("tools", None, "What the model may call: shipped tools, or module:name. By default the paper's.")
    flags.DEFINE_string(
        "call_format", None, "How calls are written, or module:name. By default what the model was trained in."
    )
    flags.DEFINE_integer("tool_workers", 4, "Processes for tools that run on the host.", lower_bound=1)
    flags.DEFINE_float("tool_seconds", 30.0, "Seconds that a call of such a tool may take.", lower_bound=1e-3)
    flags.DEFINE_string("html", None, "Also draw the conversation as a page in this file.")


def main(command: str, arguments: list[str]) -> None:
    if len(arguments) < 2:
        raise UserError("give the directory of a model and at least one image: pixel-jax chat DIR IMAGE --question ...")
    import jax

    from pixel_jax import from_pretrained
    from pixel_jax.data.sources import load_frames
    from pixel_jax.dialog.formats import call_format
    from pixel_jax.dialog.tokenizer import Vocabulary
    from pixel_jax.dialog.unrecognised import format_warning
    from pixel_jax.evaluation import report
    from pixel_jax.evaluation.transcript import make_transcript
    from pixel_jax.rollouts.config import RolloutConfig
    from pixel_jax.rollouts.limits import read_limits, single_answer
    from pixel_jax.rollouts.materialize import materialize_on_host
    from pixel_jax.rollouts.prompts import Query, build_prompts, tables
    from pixel_jax.rollouts.rollout import host_rollouts, rollout
    from pixel_jax.rollouts.trajectory import to_host
    from pixel_jax.tools.host import HostToolsConfig
    from pixel_jax.tools.named import DEFAULT, find_format, find_tools
    from pixel_jax.training.answers import last_boxed
    from pixel_jax.training.progress import announce_compiles, use_compilation_cache

    directory, images = pathlib.Path(arguments[0]), arguments[1:]
    try:  # whatever the locale takes the bytes of the command line for
        question = os.fsencode(FLAGS.question).decode("utf-8")
    except UnicodeError as error:
        raise UserError(f"--question is not UTF-8: {error}") from None
    pictures, seconds = load_frames([pathlib.Path(path) for path in images], FLAGS.video)
    query = Query(question, pictures, FLAGS.video, seconds or 1.0)
    tools = find_tools(FLAGS.tools or DEFAULT)
    announce_compiles()
    use_compilation_cache(pathlib.Path.home() / ".cache" / "pixel_jax")  # models of one shape share their programs
    model, processor = from_pretrained(directory)
    if processor is None:
        raise UserError(f"{directory} has no tokenizer: it can be trained from, but not talked to")
    temperature = FLAGS.temperature if FLAGS.temperature is not None else 0.0 if FLAGS.greedy else 1.0
    config = single_answer(read_limits(directory) or RolloutConfig(), temperature)
    if FLAGS.call_format:
        find_format(FLAGS.call_format)  # imported on the word of the command line, not of the model
        config = dataclasses.replace(config, call_format=FLAGS.call_format)
    vocabulary = Vocabulary.of(processor.tokenizer)
    token_tables = tables(vocabulary, tools, call_format(config.call_format))
    prompts = build_prompts([query], vocabulary, token_tables, config)
    workers = HostToolsConfig(FLAGS.tool_workers, FLAGS.tool_seconds)
    with host_rollouts(FLAGS.tools or DEFAULT, tools, vocabulary, workers) as rollouts:
        trajectories = to_host((rollouts or rollout)(model, prompts, jax.random.key(FLAGS.seed), config))
    written = vocabulary.to_bytes(trajectories.tokens[0][trajectories.loss_mask[0]]).decode("utf-8", "replace")
    seen = materialize_on_host(trajectories, prompts.images, tools, config)
    trace = make_transcript(seen, 0, query, vocabulary, answer=last_boxed(written))
    show(trace)
    if said := format_warning([written], token_tables.parser.language):
        warn(said)
    if FLAGS.html:
        report.write(FLAGS.html, report.traces_page([trace], query.question))
        say(f"\nThe conversation is drawn in {FLAGS.html}.")


def show(trace, stream=None) -> None:
    """A trace as text: who said what, which box of which image was cropped, what was seen of it."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
    print_line = lambda who, text, style: console.print(Text.assemble((f"{who:>9}  ", style), printable(text)))
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
