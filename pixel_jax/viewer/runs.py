"""What a directory of `pixel-jax sft`, `rl` or `eval` holds: its curves, its numbers, and parts with traces.

Directories may be written meanwhile. Nothing in them is trusted: files have limits, and what cannot be read is named.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from pixel_jax.cli import UserError
from pixel_jax.evaluation import summary, transcript
from pixel_jax.evaluation.curves import Points, thinned
from pixel_jax.evaluation.results import FIELDS
from pixel_jax.evaluation.transcript import ShownTurn, Transcript
from pixel_jax.files import FileError, open_regular, parse_json, read_json
from pixel_jax.identity import HISTORY, RUN, flatten
from pixel_jax.run_page import METRICS, PANELS, PHASES, SHARES, UNITS, points_of
from pixel_jax.train_config import CONFIG
from pixel_jax.training.watch import HELD_OUT, ROLLOUTS, numbered
from pixel_jax.viewer.tail import Signature, Tail, recently, signature

MOST_BYTES = 2**28  # of a file of traces
MOST_TEXT = 300  # characters of a text in the list
RIGHT = 0.5  # the least score of a right answer, as in the traces of an evaluation
EVALUATED, NUMBERS = "results-*.jsonl", "metrics.json"


@dataclasses.dataclass(frozen=True)
class TraceEntry:
    """What the list shows of a trace, and what it is filtered by."""

    question: str  # names the question in every run; "": one of many samples, which are not compared
    title: str
    about: str  # the question's text
    when: str = ""  # of a training run
    answer: str | None = None
    reference: str | None = None
    right: bool | None = None  # None: it is not known
    calls: int = 0
    tools: tuple[str, ...] = ()  # those that it called, each once
    category: str = ""
    value: float | None = None  # the reward, or the score


class GoneError(LookupError):
    """A trace that a run has deleted since it was listed."""


class Part(Protocol):
    """Traces of a run that belong together."""

    @property
    def name(self) -> str:
        """What the page calls it."""
        ...

    @property
    def entries(self) -> Mapping[tuple, TraceEntry]:
        """The entries of the list, by a key that stays the same while the run goes on."""
        ...

    @property
    def problems(self) -> Sequence[str]:
        """What could not be read."""
        ...

    def refresh(self) -> bool:
        """Reads what is new. Returns whether anything has changed."""
        ...

    def read(self, key: tuple) -> list[Transcript]:
        """Reads a trace: the conversations about one question.

        Raises:
            GoneError: it is no longer there.
        """
        ...


def entry_of(item: Transcript, when: str, *, compared: bool) -> TraceEntry:
    """What the list shows of a conversation."""
    observed = [turn for turn in item.turns if turn.role == "tool"]
    return TraceEntry(
        question=(item.title or item.question)[:MOST_TEXT] if compared else "",
        title=(item.title or item.question)[:MOST_TEXT],
        about=item.question[:MOST_TEXT],
        when=when,
        answer=item.answer and item.answer[:MOST_TEXT],
        reference=item.reference and item.reference[:MOST_TEXT],
        right=item.correct,
        calls=len(observed),
        tools=tuple(dict.fromkeys(turn.tool[:MOST_TEXT] for turn in observed if turn.tool)),
        category=item.category[:MOST_TEXT],
        value=item.reward,
    )


def load_transcripts(path: pathlib.Path) -> list[Transcript]:
    """Reads a file of transcripts. FileError: it is none, or too large."""
    return transcript.load(path, limit=MOST_BYTES)


class Conversations:
    """Files of conversations (`pixel_jax.evaluation.transcript`), which are written once and may be deleted."""

    def __init__(
        self,
        name: str,
        find: Callable[[], Iterable[pathlib.Path]],
        *,
        when: Callable[[pathlib.Path], str] = lambda path: "",
        compared: bool = True,
        load: Callable[[pathlib.Path], Sequence[Transcript]] = load_transcripts,
    ):
        """Prepares reading.

        Args:
            name: of the part.
            find: the files, in order.
            when: says when a file was written.
            compared: whether a question has one newest answer, which can be compared with that of another run.
            load: reads a file. FileError: it cannot be read.
        """
        self.name, self.find, self.when, self.compared = name, find, when, compared
        self.load = load
        self.seen: dict[pathlib.Path, Signature | None] = {}
        self.found: dict[pathlib.Path, dict[tuple, TraceEntry]] = {}
        self.wrong: dict[pathlib.Path, str] = {}
        self.entries: Mapping[tuple, TraceEntry] = {}
        self.recent = recently(load)

    @property
    def problems(self) -> list[str]:
        """The files that could not be read."""
        return list(self.wrong.values())

    def refresh(self) -> bool:
        """Reads new files. Returns whether anything has changed."""
        now = {path: signature(path) for path in self.find()}
        if now == self.seen:
            return False
        for path in self.seen.keys() - now.keys():
            self.found.pop(path, None)
            self.wrong.pop(path, None)
        for path in (path for path, x in now.items() if self.seen.get(path) != x):
            self.found[path], when = {}, self.when(path)
            self.wrong.pop(path, None)
            try:
                items = self.load(path)
            except FileError as error:
                self.wrong[path] = f"{str(error)[:300]}. It is left out"
                continue
            self.found[path] = {(path, i): entry_of(x, when, compared=self.compared) for i, x in enumerate(items)}
        self.seen = now
        self.entries = {key: entry for path in now for key, entry in self.found[path].items()}
        return True

    def read(self, key: tuple) -> list[Transcript]:
        """Reads a conversation."""
        path, number = key
        try:
            return [self.recent(path)[number]]
        except (FileError, IndexError) as error:
            raise GoneError(f"this trace cannot be read: {error}") from None


class AnswerRecords:
    """The records of a benchmark in one mode (`pixel_jax.evaluation.results`), of which some have a trace with pictures."""

    def __init__(self, name: str, directory: pathlib.Path):
        self.name, self.directory = name, directory
        self.tails: dict[pathlib.Path, Tail] = {}
        # The location of each question's record: its file, and the index of its line.
        self.locations: dict[int, tuple[Tail, int]] = {}
        self.entries: dict[tuple, TraceEntry] = {}
        self.taken: dict[pathlib.Path, int] = {}  # lines
        self.generation = 0  # of all files together
        self.recent = recently(load_transcripts)

    @property
    def problems(self) -> list[str]:
        """The lines that could not be read."""
        return [problem for tail in self.tails.values() for problem in tail.problems]

    def refresh(self) -> bool:
        """Reads new records. A record with answers replaces one without."""
        for path in sorted(self.directory.glob(EVALUATED)):
            self.tails.setdefault(path, Tail(path, **FIELDS))
        changed = [tail for tail in self.tails.values() if tail.refresh()]
        generation = sum(tail.generation for tail in self.tails.values())
        if generation != self.generation:  # a file is new, or was replaced
            self.generation, self.taken, changed = generation, {}, list(self.tails.values())
            self.locations, self.entries = {}, {}
        for tail in changed:
            for i in range(self.taken.get(tail.path, 0), len(tail.lines)):
                start, length, record = tail.lines[i]
                index = record["index"]
                if "unanswered" not in record or index not in self.locations:
                    self.locations[index] = (tail, i)
                    self.entries[(self.directory, index)] = _entry_of_record(record)
            self.taken[tail.path] = len(tail.lines)
        return bool(changed)

    def read(self, key: tuple) -> list[Transcript]:
        """Reads the conversations about a question."""
        _, index = key
        tail, number = self.locations[index]
        start, length, _ = tail.lines[number]
        try:
            with open_regular(tail.path) as file:
                file.seek(start)
                record = parse_json(file.read(length), str(tail.path))
            conversations = _conversations_of(record)
            trace = self.directory / "traces" / f"{index}.json"
            kept = self.recent(trace) if trace.is_file() else []
        except (FileError, OSError, TypeError, KeyError, ValueError) as error:
            raise GoneError(f"this trace cannot be read: {error}") from None
        return [*kept, *conversations[len(kept) :]]


def _entry_of_record(record: Mapping[str, Any]) -> TraceEntry:
    scores = [x for x in record["score"] if isinstance(x, int | float)]
    mean = sum(scores) / len(scores) if scores else None
    tools = [x for row in _list(record.get("tools")) for x in _list(row) if isinstance(x, str) and x]
    given = [str(x) for x in _list(record.get("given")) if x is not None]
    return TraceEntry(
        question=record["id"][:MOST_TEXT],
        title=record["id"][:MOST_TEXT],
        about=str(record.get("question") or record.get("unanswered") or "")[:MOST_TEXT],
        answer=" · ".join(dict.fromkeys(given))[:MOST_TEXT] or None,
        reference=" / ".join(map(str, record["answers"]))[:MOST_TEXT],
        right=None if mean is None else mean >= RIGHT,
        calls=max((x for x in _list(record.get("calls")) if isinstance(x, int)), default=0),
        tools=tuple(dict.fromkeys(x[:MOST_TEXT] for x in tools)),
        category=record["category"][:MOST_TEXT],
        value=mean,
    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _conversations_of(record: Mapping[str, Any]) -> list[Transcript]:
    """The answers of a record as conversations without pictures, which hold all that the model wrote."""
    question, answers = str(record.get("question", "")), " / ".join(map(str, record["answers"]))
    known = {"reference": answers, "title": record["id"], "category": record["category"]}
    if "unanswered" in record:
        return [Transcript(question, (), (), (), f"could not be asked: {record['unanswered']}", **known)]
    rows = zip(record["responses"], record["given"], record["score"], record["stop"], strict=True)
    return [
        Transcript(
            question,
            (),
            (),
            (ShownTurn("assistant", str(text)),),
            str(stop),
            answer=None if given is None else str(given),
            correct=score >= RIGHT,
            **known,
        )
        for text, given, score, stop in rows
    ]


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart of one run: label -> points (steps done, value)."""

    title: str
    unit: str  # of the x axis
    bounds: tuple[float, float] | None  # of the y axis; None: those of the points
    lines: Mapping[str, Points]


class TrainingRun:
    """A directory of `pixel-jax sft` or `rl`."""

    kind = "training"

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        self.metrics = {phase: Tail(directory / phase / METRICS, step=int) for phase in PHASES}
        self.history = {phase: Tail(directory / phase / HISTORY, what=str) for phase in PHASES}
        self.parts: list[Part] = []
        for phase in PHASES:
            folder, unit = directory / phase / "traces", UNITS[phase]
            when = functools.partial(_when, unit)
            held_out, sampled = (functools.partial(numbered, folder / x) for x in (HELD_OUT, ROLLOUTS))
            self.parts.append(Conversations(f"{phase}, held out", held_out, when=when))
            self.parts.append(Conversations(f"{phase}, rollouts", sampled, when=when, compared=False))
        judged = directory / "traces.json"
        self.parts.append(Conversations("judged", lambda: [judged] if judged.is_file() else []))
        self.settings: dict[str, Any] = {}
        self.noted: Any = None
        self.wrong: list[str] = []

    def refresh(self) -> bool:
        """Reads what is new. Returns whether anything has changed."""
        readers = [*self.metrics.values(), *self.history.values(), *self.parts]
        changed = [x.refresh() for x in readers]
        notes = [self.directory / CONFIG, *(self.directory / phase / RUN for phase in PHASES)]
        if (now := [*map(signature, notes)]) != self.noted:
            self.noted, self.wrong = now, []
            self.settings = {}
            for path in notes[1:]:
                self.settings |= flatten(self._note(path))
            self.settings |= flatten(self._note(notes[0]))
            changed.append(True)
        return any(changed)

    def _note(self, path: pathlib.Path) -> dict[str, Any]:
        if not path.is_file():
            return {}
        try:
            value = read_json(path)
        except FileError as error:
            self.wrong.append(str(error)[:300])
            return {}
        return value if isinstance(value, dict) else {}

    @property
    def problems(self) -> list[str]:
        """What could not be read."""
        tails = [*self.metrics.values(), *self.history.values()]
        return [*self.wrong, *(x for tail in tails for x in tail.problems)]

    @property
    def charts(self) -> list[Chart]:
        """The curves of all phases."""
        charts = []
        for phase, tail in self.metrics.items():
            for title, names in PANELS.items():
                lines = {label: points for label, name in names.items() if (points := points_of(tail.values, name))}
                if lines:
                    bounds = (0.0, 1.0) if title in SHARES else None
                    thin = {label: thinned(points) for label, points in lines.items()}
                    charts.append(Chart(f"{phase}: {title}", f"{UNITS[phase]}s", bounds, thin))
        return charts

    @property
    def status(self) -> list[tuple[str, str]]:
        """What the run is doing, in short."""
        status = []
        for phase, tail in self.metrics.items():
            of = next((x["of"] for x in reversed(self.history[phase].values) if isinstance(x.get("of"), int)), None)
            if not tail.values and of is None:
                continue
            done = max((x["step"] + 1 for x in tail.values), default=0)
            status.append((phase, f"{done} of {of} {UNITS[phase]}s" if of else f"{done} {UNITS[phase]}s"))
            for label, name in (("accuracy", "accuracy"), ("accuracy, held out", "eval_accuracy"), ("loss", "loss")):
                if points := points_of(tail.values, name):
                    status.append((label, f"{points[0][1]:.3g} → {points[-1][1]:.3g}"))
        return status

    table: tuple[Sequence[str], Sequence[Sequence[str]]] = ((), ())


def _when(unit: str, path: pathlib.Path) -> str:
    return f"after {unit} {int(path.stem)}" if int(path.stem) else f"before the first {unit}"


class Evaluation:
    """A directory of `pixel-jax eval`."""

    kind = "evaluation"
    charts: Sequence[Chart] = ()

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        self.parts: list[Part] = []
        self.settings: dict[str, Any] = {}
        self.noted: Any = None
        self.wrong: list[str] = []
        self.rows: list[list[str]] = []

    def refresh(self) -> bool:
        """Reads what is new. Returns whether anything has changed."""
        known = {part.directory for part in self.parts if isinstance(part, AnswerRecords)}
        found = dict.fromkeys(path.parent for path in sorted(self.directory.glob(f"*/*/{EVALUATED}")))
        new = [x for x in found if x not in known]
        self.parts += [AnswerRecords(f"{x.parent.name}, {x.name}", x) for x in new]
        changed = [x.refresh() for x in self.parts]
        path = self.directory / NUMBERS
        if (now := signature(path)) != self.noted:
            self.noted, self.wrong, self.rows, self.settings = now, [], [], {}
            try:
                if now is not None:
                    value = read_json(path)
                    self.rows = summary.table_rows(value["benchmarks"])
                    self.settings = {"model": str(value.get("model"))[:MOST_TEXT]}
            except (LookupError, TypeError, ValueError, AttributeError) as error:  # it holds something else
                self.wrong = [f"{path} cannot be read: {str(error)[:300]}"]
            changed.append(True)
        return any(changed) or bool(new)

    @property
    def problems(self) -> list[str]:
        """What could not be read."""
        return self.wrong

    @property
    def status(self) -> list[tuple[str, str]]:
        """What has been answered."""
        status = [("model", str(self.settings["model"]))] if "model" in self.settings else []
        for part in self.parts:
            known = [x.right for x in part.entries.values() if x.right is not None]
            rate = f", {100 * sum(known) / len(known):.1f} % right" if known else ""
            status.append((part.name, f"{len(part.entries)} answered{rate}"))
        return status

    @property
    def table(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """The numbers with intervals, once the evaluation has ended: a head and rows."""
        return (summary.HEAD, self.rows) if self.rows else ((), ())


class Traces:
    """Files of traces that belong to no run."""

    kind = "traces"
    charts: Sequence[Chart] = ()
    settings: Mapping[str, Any] = {}  # noqa: RUF012, never changed
    problems: Sequence[str] = ()
    table: tuple[Sequence[str], Sequence[Sequence[str]]] = ((), ())

    def __init__(self, what: pathlib.Path, conversations: Conversations):
        self.directory, self.parts = what, [conversations]

    def refresh(self) -> bool:
        """Reads what is new. Returns whether anything has changed."""
        return self.parts[0].refresh()

    @property
    def status(self) -> list[tuple[str, str]]:
        """How many there are."""
        return [("traces", str(len(self.parts[0].entries)))]


Run = TrainingRun | Evaluation | Traces


def is_training(directory: pathlib.Path) -> bool:
    """Whether a directory is one of `sft` or `rl`, just begun ones included."""
    return any((directory / phase / name).is_file() for phase in PHASES for name in (METRICS, RUN, HISTORY))


def is_evaluation(directory: pathlib.Path) -> bool:
    """Whether a directory is one of `eval`, unfinished ones included."""
    return any(directory.glob(f"*/*/{EVALUATED}"))


def open_run(directory: pathlib.Path) -> TrainingRun | Evaluation:
    """Opens the directory of a run.

    Raises:
        UserError: it is none; the message names the runs within it.
    """
    if directory.name in PHASES and is_training(directory.parent):
        directory = directory.parent
    if is_training(directory):
        return TrainingRun(directory)
    if is_evaluation(directory):
        return Evaluation(directory)
    if not directory.is_dir():
        raise UserError(f"there is no file or directory {str(directory)!r}")
    inside = [
        x for pattern in ("*/", "*/*/") for x in sorted(directory.glob(pattern)) if is_training(x) or is_evaluation(x)
    ]
    hint = f"; it holds runs: {' '.join(map(str, inside[:4]))}" if inside else ""
    metrics = " nor ".join(f"{phase}/{METRICS}" for phase in PHASES)
    raise UserError(
        f"{directory} is no directory of pixel-jax sft, rl, eval or synth: it has neither {metrics} nor "
        f"BENCHMARK/MODE/{EVALUATED}, nor traces{hint}"
    )
