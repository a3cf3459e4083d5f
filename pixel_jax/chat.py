"""`pixel-jax chat DIR [IMAGE ...]`: a conversation with a model about images or a video, shown as it goes.

Each line is a question. Words that begin with `@` name files to look at: `@photo.jpg What does the sign say?`, with quotes
where a name has spaces (`@"my photo.jpg"`); `@@` is an @ of the text. `/new` begins another conversation, `/quit` ends.
With `--question` one question is answered, about the images of the command line.
"""

import os
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple, TextIO

from absl import flags

from pixel_jax.cli import UserError, check_output
from pixel_jax.serving.speakers import define_speaker_flags, host_tools, load_speaker
from pixel_jax.signals import SIGNALS
from pixel_jax.terminal import Waiting, printable, say, warn

if TYPE_CHECKING:
    from pixel_jax.evaluation.transcript import Transcript
    from pixel_jax.models.preprocessors import FrameSampling
    from pixel_jax.rollouts.prompts import Query
    from pixel_jax.serving.conversation import ChatMessage, Clip, Part, Prompt, Speaker
    from pixel_jax.serving.session import Saw, Session
    from pixel_jax.tools.host import HostTools

FLAGS = flags.FLAGS
BUDGET = 8  # tokens that are written before the screen is updated
TOKENS = 512  # widths of prompts are multiples of it, because each width is compiled
SIDE = 64  # pixels: sides of image buffers are multiples of it
FILE = re.compile(r"""(?<!\S)@(?!@)(?:"([^"]+)"|'([^']+)'|(\S+))\s*""")
HELP = "A question; @FILE for an image or a video; /new for another conversation; /quit or Ctrl-D to end."


def define_flags(command: str) -> None:
    """Declares the flags of the command."""
    flags.DEFINE_string("question", None, "What to ask. By default questions are read, a line each.")
    flags.DEFINE_bool("video", False, "The images are the frames of one video.")
    flags.DEFINE_integer("frames", None, "Frames of a video file, evenly spread; with --fps the most.", lower_bound=1)
    flags.DEFINE_float(
        "fps", None, "Frames a second of a video file. Default: the model's own rate, if it has one.", lower_bound=1e-3
    )
    flags.DEFINE_bool("greedy", True, "Take the most probable token each time; otherwise sample, at temperature 1.")
    flags.DEFINE_float("temperature", None, "Sample at this temperature; 0 is greedy.", lower_bound=0.0)
    flags.DEFINE_integer("seed", 0, "Seed of the sampling.")
    flags.DEFINE_string("adapter", None, "Directory of an adapter (PEFT's format) to put on the model.")
    flags.DEFINE_string("html", None, "Also draw the conversation as a page in this file.")
    flags.DEFINE_string("json", None, "Also write it to this file, for `pixel-jax view`.")
    define_speaker_flags()


def main(command: str, arguments: list[str]) -> None:
    """Answers the question of the command line, or those that are read from standard input."""
    if not arguments:
        raise UserError("give the directory of a model: pixel-jax chat DIR [IMAGE ...] [--question=...]")
    from pixel_jax.evaluation import report, transcript
    from pixel_jax.tools.host import HostToolsConfig
    from pixel_jax.tools.named import DEFAULT, find_tools
    from pixel_jax.training.progress import announce_compiles, use_compilation_cache

    for name, path in (("--html", FLAGS.html), ("--json", FLAGS.json)):
        check_output(name, path)
    question = None if FLAGS.question is None else as_utf8(FLAGS.question, "--question")
    paths = list(map(local_path, arguments[1:]))
    check_files(paths, FLAGS.video)
    find_tools(FLAGS.tools or DEFAULT)
    announce_compiles()
    temperature = FLAGS.temperature if FLAGS.temperature is not None else 0.0 if FLAGS.greedy else 1.0
    speaker = load_speaker(
        arguments[0],
        tools=FLAGS.tools,
        call_format=FLAGS.call_format,
        adapter=FLAGS.adapter,
        temperature=temperature,
    )
    use_compilation_cache(pathlib.Path.home() / ".cache" / "pixel_jax")  # models of one shape share their programs
    workers = HostToolsConfig(FLAGS.tool_workers, FLAGS.tool_seconds)
    with host_tools(speaker, FLAGS.tools or DEFAULT, workers) as host:
        chat = Chat(speaker, host=host, seed=FLAGS.seed, screen=Screen(), frames=Frames(FLAGS.frames, FLAGS.fps))
        parts = load_parts(paths, FLAGS.video, chat.frames.of(speaker.sampling))
        if question is not None:
            chat.ask(question, parts)
        else:
            converse(chat, parts)
    if FLAGS.json:
        transcript.save(FLAGS.json, chat.transcripts)
        say(f"\nThe conversation is written to {FLAGS.json}.")
    if FLAGS.html:
        title = chat.transcripts[0].question if chat.transcripts else "Nothing was asked"
        report.write(FLAGS.html, report.traces_page(chat.transcripts, title))
        say(f"\nThe conversation is drawn in {FLAGS.html}.")


def converse(chat: "Chat", parts: list["Part"]) -> None:
    """Answers questions line by line, the first about `parts`. An error in a line is printed, and the next line is read."""
    typed = sys.stdin.isatty()
    if typed:
        say(HELP)
    for line in typed_lines():
        command = line.strip()
        if command in ("/quit", "/exit"):
            return
        if command == "/help":
            say(HELP)
        elif command == "/new":
            chat.messages, parts = [], []
        elif command:
            try:
                names, question = split_line(line)
                frames = chat.frames.of(chat.speaker.sampling)
                shown = [*parts, *load_parts(list(map(local_path, names)), False, frames)]
                with (
                    SIGNALS.stoppable("The answer is stopped; Ctrl-C again ends the program.")
                    if typed
                    else nullcontext()
                ):
                    chat.ask(question, shown)
                parts = []
            except (UserError, ValueError, OSError) as error:
                warn(f"pixel-jax chat: {error}")


def typed_lines() -> Iterator[str]:
    """Iterates over the lines of standard input: a terminal, a file or a pipe. UserError: one is not UTF-8."""
    if sys.stdin.isatty():
        import readline  # noqa: F401, `input` edits lines with it

        while True:
            try:
                yield as_utf8(input("\nquestion  "), "the line")
            except EOFError:
                return
    for line in sys.stdin.buffer:
        yield as_utf8(line, "the line").rstrip("\r\n")


def as_utf8(written: str | bytes, name: str) -> str:
    """Decodes text from outside as UTF-8, whatever the encoding of the locale. UserError: it is not UTF-8."""
    try:
        return (os.fsencode(written) if isinstance(written, str) else written).decode("utf-8")
    except UnicodeError as error:
        raise UserError(f"{name} is not UTF-8: {error}") from None


def split_line(line: str) -> tuple[list[str], str]:
    """Splits a line into the files that it names with @, and its text."""
    names = [next(filter(None, found.groups())) for found in FILE.finditer(line)]
    return names, re.sub(r"(?<!\S)@@", "@", FILE.sub("", line)).strip()


def local_path(name: str) -> pathlib.Path:
    """Returns the path that a person has written, with `~` for the home folder. UserError: it is an address."""
    if "://" in name:
        raise UserError(f"{name!r} is an address, and nothing is fetched: save the picture and give the file's name")
    return pathlib.Path(name).expanduser()


class Frames(NamedTuple):
    """The frames of a video file that are shown.

    Attributes:
      most: the most; None: `FRAMES`, or with a rate what the model was made for.
      rate: frames a second; None: `most` frames, evenly spread.
    """

    most: int | None = None
    rate: float | None = None

    def of(self, usual: "FrameSampling") -> "Frames":
        """What a person has asked for, or else what is usual for a model."""
        from pixel_jax.data.clips import FRAMES

        if self.rate is not None:
            return Frames(self.most or usual.most, self.rate)
        return self if self.most else Frames(usual.frames or FRAMES, usual.fps)


def check_files(paths: Sequence[pathlib.Path], video: bool) -> None:
    """Checks, by their first bytes, that files can be shown: before a model is loaded.

    Raises:
      ImageError: a file is neither an image nor a video.
      UserError: there is no such file; or `video`, and the files are not those of one.
    """
    from pixel_jax.data.sources import frame_sizes, shows_clip

    if missing := [path for path in paths if not os.path.lexists(path)]:
        raise UserError(
            f"{str(missing[0])!r} cannot be opened: there is no such file; a question is given by --question=..."
        )
    if video and not paths:
        raise UserError("--video: name the frames of the video, in their order, or the video file")
    films = [path for path in paths if shows_clip(path)]
    if video and len(paths) > 1 and films:
        raise UserError(f"--video: {str(films[0])!r} is a video file: give it alone, or only frames")
    for path in paths:
        frame_sizes([path], path in films)


def load_parts(paths: Sequence[pathlib.Path], video: bool, frames: Frames) -> list["Part"]:
    """Loads the images and videos in files; with `video`, the images together are the frames of one.

    Raises:
      ImageError: a file is neither.
    """
    from pixel_jax.data.sources import load_frames, shows_clip
    from pixel_jax.serving.conversation import Clip

    if video and not shows_clip(paths[0]):
        return [Clip(load_frames(paths, False)[0], 1.0)]
    parts: list[Part] = []
    for path in paths:
        parts += [load_clip(path, frames)] if shows_clip(path) else load_frames([path], False)[0]
    return parts


def load_clip(path: pathlib.Path, frames: Frames) -> "Clip":
    """Loads a video file. Warns: it has fewer frames a second than asked for."""
    from pixel_jax.data.clips import FRAMES, read_video
    from pixel_jax.serving.conversation import Clip

    shown, seconds = read_video(path, frames.most or FRAMES, fps=frames.rate)
    if frames.rate is not None and seconds > 1.001 / frames.rate:
        warn(
            f"{str(path)!r} is shown at {1 / seconds:.3g} frames a second, not {frames.rate:g}: {len(shown)} frames are the "
            "most; --frames=N allows more"
        )
    return Clip(list(shown), 2 * seconds)


class Chat:
    """A conversation with a model, one question after another.

    Args:
      speaker: the model.
      host: carries out calls of tools that run on the host; None: there are none.
      seed: the seed of the sampling.
      screen: the terminal in which it is shown.
      frames: those of a video file that a person has asked for.
    """

    def __init__(
        self,
        speaker: "Speaker",
        *,
        host: "HostTools | None",
        seed: int,
        screen: "Screen",
        frames: Frames = Frames(),  # noqa: B008, never changed
    ):
        self.speaker, self.host, self.seed, self.screen, self.frames = speaker, host, seed, screen, frames
        self.messages: list[ChatMessage] = []
        self.transcripts: list[Transcript] = []
        self._session: Session | None = None

    def ask(self, question: str, parts: Sequence["Part"] = ()) -> str:
        """Answers a question about `parts` and what was shown before; the answer is shown while it is written.

        Raises:
          PromptError: the question has no text, or the conversation cannot be shown; it is as it was before.
          UserError: Ctrl-C asked for the end; the conversation is as it was before.
        """
        from pixel_jax.dialog.template import SPECIAL_TOKENS
        from pixel_jax.dialog.unrecognised import format_warning
        from pixel_jax.evaluation.transcript import make_transcript
        from pixel_jax.rollouts.materialize import materialize_on_host
        from pixel_jax.serving.conversation import ChatMessage, prompt_of
        from pixel_jax.serving.session import Reader, Wrote
        from pixel_jax.training.answers import last_boxed

        speaker, screen = self.speaker, self.screen
        messages = [*self.messages, ChatMessage("user", (*parts, question))]
        prompt = prompt_of(messages, speaker)
        query = prompt.query
        session = self._session_for(prompt)
        placed = prompt.placed(speaker, session.shape, len(self.transcripts))
        slot = session.admit(placed, speaker.config.temperature)
        screen.question(question, query, len(parts))
        reader, turns = Reader(speaker.vocabulary), [""]
        try:
            with Waiting("the model reads the question and what it is shown") as reading:
                while reader.ended is None:
                    session.advance(BUDGET)
                    for event in reader.read(session.read()[slot]):
                        reading.end()
                        if isinstance(event, Wrote):
                            turns[-1] += event.text
                            screen.wrote(event.text)
                        else:
                            turns.append("")
                            screen.saw(event, query)
                    if SIGNALS.requested:
                        raise UserError("the answer was stopped; the conversation is as it was before the question")
        except BaseException:
            self._session = None  # its state is not known
            screen.end()
            raise
        row = session.row(slot)
        session.drop(slot)
        # Pictures that tools on the host have drawn are kept beside the images of the prompt.
        materialized = materialize_on_host(row, placed.images, speaker.tables.tools, speaker.config)
        answer = "".join(turns)
        boxed = last_boxed(answer)
        screen.answer(boxed, reader.reason)
        if warning := format_warning([SPECIAL_TOKENS["im_end"].join(turns)], speaker.tables.parser.language):
            warn(warning)
        self.transcripts.append(
            make_transcript(materialized, 0, query, speaker.vocabulary, tools=speaker.tables.tools, answer=boxed)
        )
        self.messages = [*messages, ChatMessage("assistant", (answer,))]
        return answer

    def _session_for(self, prompt: "Prompt") -> "Session":
        """Returns a session that the prompt fits: the present one, or a new, larger one."""
        from pixel_jax.rollouts.prompts import PromptError
        from pixel_jax.rollouts.shapes import prompt_shape
        from pixel_jax.serving.session import Session

        query, config = prompt.query, self.speaker.config
        if len(prompt.ids) >= config.max_tokens:
            raise PromptError(
                f"the conversation has {len(prompt.ids)} tokens, and a row may have {config.max_tokens}: begin a new one"
            )
        up = lambda value, step: max(1, -(-value // step)) * step
        height, width = (max((up(image.shape[i], SIDE) for image in query.images), default=SIDE) for i in (0, 1))
        images, tokens = max(1, len(query.images)), up(len(prompt.ids), TOKENS)
        old = self._session.shape if self._session is not None else None
        if old is not None and old.video == query.is_video:
            images, height, width = max(images, old.images), max(height, old.height), max(width, old.width)
            tokens = max(tokens, old.tokens)
        shape = prompt_shape(images, height, width, tokens, config, video=query.is_video)
        if self._session is None or shape != old:
            self._session = None  # frees its memory before the new one takes some
            self._session = Session(self.speaker, shape, slots=1, host=self.host, seed=self.seed)
        return self._session


class Screen:
    """A conversation as text in a terminal, as it goes."""

    def __init__(self, stream: TextIO | None = None):
        from rich.console import Console

        self.console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._writing = False

    def question(self, question: str, query: "Query", shown: int) -> None:
        """Shows a question, and the last `shown` images that it is about, or all frames of a video."""
        self._line("question", question, "bold")
        first = 0 if query.is_video else len(query.images) - shown
        for i, image in list(enumerate(query.images))[first if shown else len(query.images) :]:
            name = "frame" if query.is_video else "image"
            self._line("sees", f"{name} {i + 1}, {image.shape[1]}x{image.shape[0]}", "dim")

    def wrote(self, text: str) -> None:
        """Shows a piece of what the model writes."""
        from rich.text import Text

        if not self._writing:
            self.console.print(Text.assemble((f"{'model':>9}  ", "bold green")), end="")
            text, self._writing = text.removeprefix("\n"), True
        self.console.print(Text(printable(text)), end="")

    def saw(self, event: "Saw", query: "Query") -> None:
        """Shows what a call looked at, and what came back."""
        self.end()
        for image, x1, y1, x2, y2 in event.regions:
            height, width = query.images[image].shape[:2]
            name = f"{'frame' if query.is_video else 'image'} {image + 1}"
            where = f"({x1}, {y1}) to ({x2}, {y2}) of {width}x{height} pixels"
            self._line("looks at", f"{name}, {where}", "cyan")
        self._line("tool", event.text, "red" if event.failed else "bold blue")

    def answer(self, answer: str | None, reason: str) -> None:
        """Shows the final answer; None: there is none, for this `reason`."""
        self.end()
        self._line("answer", answer if answer is not None else f"none ({reason})", "bold")

    def end(self) -> None:
        """Ends the line of what is being written."""
        if self._writing:
            self.console.print()
        self._writing = False

    def _line(self, who: str, text: str, style: str) -> None:
        from rich.text import Text

        self.console.print(Text.assemble((f"{who:>9}  ", style), printable(text)))
