"""`pixel-jax view RUN [RUN ...]`: a local page of runs, finished or still running; --out=FILE writes one page instead.

RUN is a directory of `pixel-jax sft`, `rl`, `eval` or `synth`; a file of traces of one of these (`traces/.../NUMBER.json`) or of
`chat --json`; or traces for tuning, as `synth` and people write them (`traces.jsonl`), drawn with what the calls in them show.
The page is served to this computer only, until Ctrl-C.
"""

import asyncio
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from pixel_jax.cli import UserError, check_output

if TYPE_CHECKING:
    import socket

    from starlette.types import ASGIApp

    from pixel_jax.dialog import Language
    from pixel_jax.evaluation.transcript import Transcript
    from pixel_jax.viewer.runs import Run

FLAGS = flags.FLAGS
SIDE = 640  # pixels, the longest side of a picture on the page
MOST_IMAGES = 64  # most images of a trace, those that its calls show included
HOST = "127.0.0.1"
WRITTEN = (".jsonl", ".parquet")  # endings of files of traces for tuning
FOLDERS = ("traces", "held_out", "rollouts")  # in which files of traces lie


def define_flags(command: str) -> None:
    """Declares the flags of `view`."""
    flags.DEFINE_string("out", None, "Write one page that holds everything to this file, and serve nothing.")
    flags.DEFINE_integer("port", 0, "Port to listen at; 0: any that is free.", lower_bound=0, upper_bound=65535)
    flags.DEFINE_integer(
        "most", 100, "Traces of traces.jsonl, or of files without a run, that are drawn.", lower_bound=1
    )
    flags.DEFINE_list("image_folders", [], "Where else than beside traces.jsonl its images may lie, as in a config.")
    flags.DEFINE_list("tools", None, "That traces.jsonl calls: shipped tools, or module:name. By default the paper's.")
    flags.DEFINE_string("call_format", "pixel_reasoner", "How calls are written in it, or module:name.")


def main(command: str, arguments: list[str]) -> None:
    """Shows what the command line names."""
    from pixel_jax.dialog import Language
    from pixel_jax.terminal import Waiting, say
    from pixel_jax.tools.named import DEFAULT, find_format, find_tools

    if not arguments:
        raise UserError("give directories of runs: pixel-jax view RUN [RUN ...]")
    language = Language(find_tools(FLAGS.tools or DEFAULT), find_format(FLAGS.call_format))
    source = RunOpener(FLAGS.most, FLAGS.image_folders, language)
    paths = [pathlib.Path(argument) for argument in arguments]
    if FLAGS.out is not None:
        check_output("--out", FLAGS.out)
        with Waiting("drawing the page"):
            words = draw(paths, FLAGS.out, source)
        say(words)
    else:
        show(paths, source)


# ---- served


def show(paths: Sequence[pathlib.Path], source: "RunOpener") -> None:
    """Serves the page until Ctrl-C or SIGTERM."""
    try:
        import uvicorn  # noqa: F401, it is needed when the runs are read

        from pixel_jax.viewer.app import make_app
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install 'pixel_jax[serve]', or give --out=FILE") from None
    from pixel_jax.serving.http import listen
    from pixel_jax.signals import SIGNALS
    from pixel_jax.terminal import Waiting, say
    from pixel_jax.viewer.index import Index

    runs = [source.open(path) for path in paths]
    listener = listen(HOST, FLAGS.port)
    index = Index(runs, names_of(paths))
    with Waiting("reading the runs"):
        index.refresh()
    SIGNALS.save_first("")  # there is nothing to save: it ends at once
    say(f"{len(index.traces)} traces at http://{HOST}:{listener.getsockname()[1]}/, until Ctrl-C")
    asyncio.run(serve(make_app(index), listener))


async def serve(app: "ASGIApp", listener: "socket.socket") -> None:
    """Answers requests until SIGTERM or Ctrl-C."""
    from pixel_jax.serving.http import serve_until
    from pixel_jax.signals import SIGNALS

    async def stop_requested() -> None:
        while not SIGNALS.requested:
            await asyncio.sleep(0.05)

    await serve_until(stop_requested, app, listener)


def names_of(paths: Sequence[pathlib.Path]) -> list[str]:
    """Short names of directories: as many of their last folders as make them different; equal ones get a number."""
    whole, names = [path.resolve().parts[1:] or ("/",) for path in paths], list[str]()
    for length in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-length:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({i})" for i, name in enumerate(names, 1)]


class RunOpener:
    """Opens what the command line names.

    Args:
        most: traces that are drawn of `traces.jsonl` and of files that belong to no run.
        image_folders: other folders in which images of `traces.jsonl` may lie.
        language: the language of the calls in it; None: the released one.
    """

    def __init__(self, most: int, image_folders: Sequence[str] = (), language: "Language | None" = None):
        self.most, self.image_folders, self.language = most, image_folders, language

    def open(self, what: pathlib.Path) -> "Run":
        """Opens a directory or file for the viewer. UserError: it is none of those that the command takes."""
        from pixel_jax.viewer.runs import Conversations, Traces, load_transcripts, open_run

        files = self.files(what)
        if files is None:
            return open_run(what)
        load = self.written if files[0].suffix in WRITTEN else load_transcripts
        traces = Traces(what, Conversations("traces", lambda: self.files(what) or (), load=load))
        if len(files) == 1:
            load(files[0])  # an error ends the command
        return traces

    def files(self, what: pathlib.Path) -> list[pathlib.Path] | None:
        """The files of traces that `what` is or holds; None: it is a run, an evaluation, or neither."""
        from pixel_jax.viewer.runs import is_evaluation, is_training

        if what.is_file():
            return [what]
        if is_training(what) or is_training(what.parent) or is_evaluation(what):
            return None
        if (what / "traces.jsonl").is_file():
            return [what / "traces.jsonl"]
        return traces_in(what)[: self.most] or None

    def written(self, path: pathlib.Path) -> list["Transcript"]:
        """Draws the first traces of a file of traces for tuning."""
        drawn, count = written_traces(path, self.most, self.image_folders, self.language)
        if count > self.most:
            from pixel_jax.terminal import warn

            warn(f"{path} has {count} traces; {self.most} are drawn, as --most says")
        return drawn


def traces_in(directory: pathlib.Path) -> list[pathlib.Path]:
    """The files of traces below a directory, in order."""
    return sorted((x for x in directory.rglob("*.json") if x.parent.name in FOLDERS), key=str)


# ---- written


def draw(paths: Sequence[pathlib.Path], out: str, source: RunOpener) -> str:
    """Writes one page of everything.

    Args:
        paths: directories and files, as the command takes them.
        out: the page to write.
        source: how they are read.

    Returns:
        A sentence that says what was drawn, and where.

    Raises:
        UserError: there is nothing to draw.
    """
    from pixel_jax.evaluation import report
    from pixel_jax.run_page import curves_together

    names, pages = names_of(paths), [drawn(path, source) for path in paths]
    words, sections, data = "; ".join(page.words for page in pages), [], None
    runs = {name: path for name, path in zip(names, paths, strict=True) if source.files(path) is None}
    if len(runs) > 1 and (curves := curves_together(runs)):
        sections.append(("Curves of all runs", curves))
    if len(pages) == 1:
        sections, data = pages[0].sections, pages[0].data
    else:
        for name, page in zip(names, pages, strict=True):
            sections += [(name, ""), *page.sections]
    report.write(out, report.page(words[:1].upper() + words[1:], sections, data))
    return f"{words}: drawn in {out}."


class Drawn(NamedTuple):
    """What is drawn of a directory or file."""

    words: str  # what it is
    sections: Sequence[tuple[str, str]]
    data: Mapping[str, Any] | None = None  # numbers that the page embeds


def drawn(what: pathlib.Path, source: RunOpener) -> Drawn:
    """Draws a directory or file. UserError: there is nothing to draw."""
    from pixel_jax.evaluation import report, summary, transcript
    from pixel_jax.files import FileError
    from pixel_jax.run_page import is_run, run_sections
    from pixel_jax.viewer.runs import Evaluation, open_run

    files = source.files(what)
    if files is None:
        run = open_run(what)
        if isinstance(run, Evaluation):
            if (found := summary.evaluated(run.directory)) is not None:
                return Drawn(f"the evaluation {what}", summary.sections_of(*found), found[0])
            files = traces_in(what)  # it goes on, and there are no numbers yet
        elif is_run(run.directory):
            return Drawn(f"the run {run.directory}", run_sections(run.directory))
    if not files:
        raise UserError(f"{what} holds nothing yet that can be drawn; without --out it is shown as it goes on")
    try:
        items = [x for path in files for x in (source.written if path.suffix in WRITTEN else transcript.load)(path)]
    except FileError as error:
        raise UserError(f"{what} does not hold traces: {error}") from error
    of = f" of {len(items)}, as --most says," if len(items) > source.most else ""
    shown = items[: source.most]
    return Drawn(f"{len(shown)} traces{of} of {what}", [("", "".join(report.transcript(item) for item in shown))])


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
        known: dict[str, Any] = {"title": example.id, "reference": " / ".join(example.answer)}
        drawn.append(make_transcript(t, 0, query, vocabulary, side=SIDE, **known))
    return drawn, len(examples)
