"""`pixel-jax view WHAT [--out=PAGE.html]`: a page that shows the results of a command.

WHAT is a directory of `pixel-jax sft`, `rl`, `eval` or `synth`; a file of traces of one of these (`traces/.../NUMBER.json`); or
traces for tuning, as `synth` and people write them (`traces.jsonl`), drawn with what the calls in them show. The page of a run
or an evaluation is written into its directory unless --out says otherwise.
"""

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from pixel_jax.cli import UserError

if TYPE_CHECKING:
    from pixel_jax.dialog import Language

FLAGS = flags.FLAGS
PAGE = "traces.html"
SIDE = 640  # pixels, the longest side of a picture on the page
MOST_IMAGES = 64  # most images of a trace, those that its calls show included


def define_flags(command: str) -> None:
    """Declares the flags of `view`."""
    flags.DEFINE_string("out", None, f"The page to write; of a file of traces {PAGE}, unless it is given.")
    flags.DEFINE_integer("most", 100, "Traces of a file that are drawn.", lower_bound=1)
    flags.DEFINE_list("image_folders", [], "Where else than beside traces.jsonl its images may lie, as in a config.")
    flags.DEFINE_list("tools", None, "That traces.jsonl calls: shipped tools, or module:name. By default the paper's.")
    flags.DEFINE_string("call_format", "pixel_reasoner", "How calls are written in it, or module:name.")


def main(command: str, arguments: list[str]) -> None:
    """Draws what the command line names."""
    from pixel_jax.dialog import Language
    from pixel_jax.terminal import say
    from pixel_jax.tools.named import DEFAULT, find_format, find_tools

    if len(arguments) != 1:
        raise UserError(
            "give one directory of a run, an evaluation or synth, or one file of traces: pixel-jax view WHAT"
        )
    language = Language(find_tools(FLAGS.tools or DEFAULT), find_format(FLAGS.call_format))
    result = view(
        pathlib.Path(arguments[0]), FLAGS.out, most=FLAGS.most, image_folders=FLAGS.image_folders, language=language
    )
    say(result)


def view(
    what: pathlib.Path,
    out: str | None,
    *,
    most: int,
    image_folders: Sequence[str] = (),
    language: "Language | None" = None,
) -> str:
    """Draws a page.

    Args:
        what: a directory or file, as the command takes it.
        out: the page to write; None: the default.
        most: traces of a file that are drawn.
        image_folders: other folders in which images of `traces.jsonl` may lie.
        language: the language of the calls in traces for tuning; None: the released one.

    Returns:
        A sentence that says what was drawn, and where.

    Raises:
        UserError: there is nothing to draw.
    """
    from pixel_jax.evaluation import report, summary, transcript
    from pixel_jax.files import FileError
    from pixel_jax.run_page import PHASES, draw_run, is_run

    if what.name in PHASES and is_run(what.parent):
        what = what.parent
    if is_run(what):
        return f"The run {what} is drawn in {draw_run(what, out)}."
    if (what / "metrics.json").is_file() and (page_path := summary.redraw(what, out)) is not None:
        return f"The evaluation {what} is drawn in {page_path}."
    if (what / "traces.jsonl").is_file():
        what = what / "traces.jsonl"
    page = out or PAGE
    if what.suffix in (".jsonl", ".parquet"):
        drawn, count = written_traces(what, most, image_folders, language)
    elif what.is_dir():
        files = sorted((x for x in what.rglob("*.json") if x.parent.name in KINDS_OF_TRACES), key=lambda x: str(x))
        if not files:
            raise UserError(f"{what} holds no run, no evaluation and no traces")
        drawn = [item for path in files[:most] for item in transcript.load(path)]
        count = len(drawn) + len(files[most:])
    else:
        try:
            drawn = transcript.load(what)
        except FileError as error:
            raise UserError(f"{what} does not hold traces: {error}") from error
        count = len(drawn)
    report.write(page, report.traces_page(drawn[:most], str(what)))
    of = f" of {count}, as --most says," if count > most else ""
    return f"{min(len(drawn), most)} traces{of} are drawn in {page}."


KINDS_OF_TRACES = ("traces", "held_out", "rollouts")  # folders in which files of traces lie


def written_traces(
    path: pathlib.Path, most: int, image_folders: Sequence[str], language: "Language | None" = None
) -> tuple[list, int]:
    """The transcripts of traces for tuning, with what their calls show, and the number of traces in the file.

    They are rendered as tuning renders them, but with a tokenizer of bytes, as none is known: the text is the same.
    """
    from pixel_jax.data.read import read_examples
    from pixel_jax.data.traces import assemble, render, write_rows
    from pixel_jax.dialog import Language
    from pixel_jax.dialog.formats import FORMATS
    from pixel_jax.dialog.tokenizer import Vocabulary, build_tokenizer
    from pixel_jax.evaluation.transcript import make_transcript
    from pixel_jax.rollouts.config import RolloutConfig
    from pixel_jax.rollouts.prompts import tables
    from pixel_jax.terminal import warn

    language = language or Language()
    examples, _ = read_examples(path, turns=True, image_folders=image_folders, language=language)
    vocabulary = Vocabulary.of(build_tokenizer([]))
    token_tables, drawn = tables(vocabulary, language.tools, language.format), []
    limits = RolloutConfig(
        max_calls=max((len(x.turns) for x in examples), default=1),
        max_images=MOST_IMAGES,
        call_format=next(name for name, known in FORMATS.items() if known is language.format),
    )
    for example in examples[:most]:
        try:
            query = example.query()
            (row,) = write_rows([example.trace(query)], vocabulary, token_tables, limits)
            t = assemble([row], [render(row, query.images)], limits, row.shape)
        except ValueError as error:  # a TraceError, a PromptError, an ImageError
            warn(f"{example.id} is not drawn: {error}")
            continue
        known = {"title": example.id, "reference": " / ".join(example.answer)}
        drawn.append(make_transcript(t, 0, query, vocabulary, side=SIDE, **known))
    return drawn, len(examples)
