"""The traces of several runs by number, filtered and compared, and what the page shows of them as JSON."""

import base64
import dataclasses
import io
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from PIL import Image

from pixel_jax.evaluation.transcript import Picture, Transcript
from pixel_jax.viewer.runs import GoneError, Part, Run, TraceEntry

REFRESH_SECONDS = 1.0  # files are looked at no more often
MOST_ROWS = 200  # of the list in one response
MOST_SHOWN = 200_000  # characters of a text in a trace
MOST_PIXELS = 100_000_000  # of a picture, which the browser decodes
MOST_PROBLEMS = 20  # of a run that are named
SEPARATOR = "."

Verdict = Literal["", "right", "wrong", "unknown"]
Change = Literal["", "any", "gained", "lost"]
ANY_CALL, NO_CALL, NAMED = "any", "none", "="  # of `Filter.tool`; a name follows NAMED


class FilterError(ValueError):
    """A filter that does not exist."""


@dataclasses.dataclass(frozen=True)
class Filter:
    """Which traces are listed. Everything that is "" lets all through."""

    side: str = ""  # RUN or RUN.PART, by their numbers
    verdict: Verdict = ""
    tool: str = ""  # ANY_CALL, NO_CALL, or NAMED and the name of a tool
    category: str = ""  # NAMED and the name of a category
    text: str = ""  # that the title, the question, the answer or the reference has, in any case
    # Of questions that both sides answered: those that are right in one and wrong in the other. The traces are those of `to`.
    change: Change = ""
    before: str = ""  # like `side`
    to: str = ""


class TraceLocation(NamedTuple):
    """The run and the part that hold a trace, and its key there."""

    run: int
    part: int
    key: tuple


class ListedTrace(NamedTuple):
    """A trace of the list."""

    number: int
    location: TraceLocation
    entry: TraceEntry


class Index:
    """The traces of runs. All methods may be called by several threads."""

    def __init__(self, runs: Sequence[Run], names: Sequence[str]):
        """Prepares reading; `names` are those of the runs."""
        self.runs, self.names = tuple(runs), tuple(names)
        self.lock = threading.RLock()
        self.version = 0
        self.looked = float("-inf")
        # Given once, so that an address keeps its meaning while a run goes on.
        self.numbers: dict[TraceLocation, int] = {}
        self.locations: list[TraceLocation] = []
        self.traces: list[ListedTrace] = []

    def refresh(self) -> None:
        """Reads what the runs have written since the last look."""
        with self.lock:
            if time.monotonic() - self.looked < REFRESH_SECONDS:
                return
            if any([run.refresh() for run in self.runs]):
                self.version += 1
                self.traces = [
                    ListedTrace(self._number(TraceLocation(r, p, key)), TraceLocation(r, p, key), entry)
                    for r, run in enumerate(self.runs)
                    for p, part in enumerate(run.parts)
                    for key, entry in part.entries.items()
                ]
            self.looked = time.monotonic()

    def _number(self, location: TraceLocation) -> int:
        if location not in self.numbers:
            self.numbers[location] = len(self.locations)
            self.locations.append(location)
        return self.numbers[location]

    # ---- the state of all runs

    def state(self) -> dict[str, Any]:
        """What the page shows of the runs as a whole."""
        with self.lock:
            entries = [x.entry for x in self.traces]
            return {
                "version": self.version,
                "runs": [self._run(i) for i in range(len(self.runs))],
                "charts": self._charts(),
                "differing": self._differing(),
                "tools": sorted({tool for x in entries for tool in x.tools}),
                "categories": sorted({x.category for x in entries if x.category}),
                "traces": len(entries),
            }

    def _run(self, number: int) -> dict[str, Any]:
        run = self.runs[number]
        problems = [*run.problems, *(x for part in run.parts for x in part.problems)]
        if len(problems) > MOST_PROBLEMS:
            problems = [*problems[:MOST_PROBLEMS], f"and {len(problems) - MOST_PROBLEMS} more"]
        head, rows = run.table
        return {
            "name": self.names[number],
            "directory": str(run.directory),
            "kind": run.kind,
            "status": run.status,
            "table": {"head": head, "rows": rows},
            "problems": problems,
            "parts": [
                {"side": f"{number}{SEPARATOR}{i}", "name": part.name, "traces": len(part.entries)}
                for i, part in enumerate(run.parts)
                if part.entries
            ],
        }

    def _charts(self) -> list[dict[str, Any]]:
        charts: dict[str, dict[str, Any]] = {}
        for i, run in enumerate(self.runs):
            for chart in run.charts:
                drawn = charts.setdefault(
                    chart.title, {"title": chart.title, "unit": chart.unit, "bounds": chart.bounds, "lines": []}
                )
                drawn["lines"] += [{"run": i, "label": label, "points": x} for label, x in chart.lines.items()]
        return list(charts.values())

    def _differing(self) -> list[tuple[str, list[str]]]:
        """The settings in which runs of a kind differ."""
        kinds = {run.kind for run in self.runs}
        if len(self.runs) < 2 or len(kinds) > 1:
            return []
        names = dict.fromkeys(name for run in self.runs for name in run.settings)
        values = {name: [_said(run.settings, name) for run in self.runs] for name in sorted(names)}
        return [(name, x) for name, x in values.items() if len(set(x)) > 1]

    # ---- the list

    def select(self, wanted: Filter) -> list[ListedTrace]:
        """The traces that pass a filter, in order.

        Raises:
            FilterError: the filter names a side that is not there.
        """
        with self.lock:
            if wanted.change:
                traces = self._changed(wanted)
            else:
                traces = (
                    [x for x in self.traces if self._on(x, wanted.side)] if self._known(wanted.side) else self.traces
                )
            return [x for x in traces if passes(x.entry, wanted)]

    def _known(self, side: str) -> bool:
        """Whether a side is named. FilterError: it is not there."""
        if not side:
            return False
        run, _, part = side.partition(SEPARATOR)
        if not (run.isascii() and run.isdecimal() and int(run[:6]) < len(self.runs)):
            raise FilterError(f"there is no run {side[:20]!r}")
        if part and not (part.isascii() and part.isdecimal() and int(part[:6]) < len(self.runs[int(run)].parts)):
            raise FilterError(f"there is no part {side[:20]!r}")
        return True

    @staticmethod
    def _on(x: ListedTrace, side: str) -> bool:
        run, _, part = side.partition(SEPARATOR)
        return x.location.run == int(run) and (not part or x.location.part == int(part))

    def answers(self, side: str, *, parts: bool) -> dict[tuple[str, str], ListedTrace]:
        """The newest trace of a side for each question; with `parts` questions of different parts are different ones."""
        newest = {}
        for x in self.traces:
            if x.entry.question and x.entry.right is not None and self._on(x, side):
                newest[self.part(x).name if parts else "", x.entry.question] = x
        return newest

    def counterparts(self, before: str, to: str) -> list[tuple[ListedTrace, ListedTrace]]:
        """The newest traces of both sides, by question."""
        if not (self._known(before) and self._known(to)):
            raise FilterError("a change is one between two sides: give `before` and `to`")
        parts = SEPARATOR not in before and SEPARATOR not in to
        one, other = (self.answers(side, parts=parts) for side in (before, to))
        return [(one[name], x) for name, x in other.items() if name in one]

    def _changed(self, wanted: Filter) -> list[ListedTrace]:
        def changed(old: TraceEntry, new: TraceEntry) -> bool:
            if wanted.change == "any":
                return old.right != new.right
            return (old.right, new.right) == ((False, True) if wanted.change == "gained" else (True, False))

        return [b for a, b in self.counterparts(wanted.before, wanted.to) if changed(a.entry, b.entry)]

    def part(self, x: ListedTrace) -> Part:
        """The part in which a trace lies."""
        return self.runs[x.location.run].parts[x.location.part]

    def page(self, wanted: Filter, start: int, count: int) -> dict[str, Any]:
        """A page of the list: `count` traces that pass the filter, from number `start` of them."""
        with self.lock:
            found = self.select(wanted)
            rows = [self._row(x) for x in found[start : start + min(count, MOST_ROWS)]]
            right = sum(x.entry.right is True for x in found)
            judged = sum(x.entry.right is not None for x in found)
            return {"of": len(found), "right": right, "judged": judged, "start": start, "rows": rows}

    def _row(self, x: ListedTrace) -> dict[str, Any]:
        entry = x.entry
        return {
            "number": x.number,
            "run": x.location.run,
            "part": self.part(x).name,
            "when": entry.when,
            "title": entry.title,
            "about": entry.about,
            "answer": entry.answer,
            "reference": entry.reference,
            "right": entry.right,
            "calls": entry.calls,
            "tools": entry.tools,
            "category": entry.category,
            "value": entry.value,
        }

    # ---- one trace

    def read(self, number: int) -> list[Transcript]:
        """The conversations of a trace.

        Raises:
            GoneError: there is none of that number, or it was deleted meanwhile.
        """
        with self.lock:
            if not 0 <= number < len(self.locations):
                raise GoneError(f"there is no trace {number}")
            location = self.locations[number]
            part = self.runs[location.run].parts[location.part]
            if location.key not in part.entries:
                raise GoneError("the run has deleted this trace: it keeps only some")
            return part.read(location.key)

    def trace(self, number: int, wanted: Filter) -> dict[str, Any]:
        """A trace as the page shows it, with its neighbours in the filtered list."""
        with self.lock:
            conversations = self.read(number)
            found = self.select(wanted)
            at = next((i for i, x in enumerate(found) if x.number == number), None)
            near = {-1: None, 1: None}
            if at is not None:
                near = {step: found[at + step].number if 0 <= at + step < len(found) else None for step in near}
            own = next(x for x in self.traces if x.number == number)
            other = None
            if wanted.before and wanted.to:
                other = next(
                    (a.number for a, b in self.counterparts(wanted.before, wanted.to) if b.number == number), None
                )
            counter = Pictures()
            return {
                "number": number,
                "at": at,
                "of": len(found),
                "previous": near[-1],
                "next": near[1],
                "before": other,
                "row": self._row(own),
                "conversations": [_conversation(item, counter) for item in conversations],
            }

    def tokens(self, number: int, conversation: int, turn: int) -> dict[str, Any]:
        """The tokens of a turn, with their log-probabilities. GoneError: there is no such turn."""
        try:
            found = self.read(number)[conversation].turns[turn]
        except IndexError:
            raise GoneError("there is no such turn") from None
        return {"pieces": found.pieces, "log_probs": found.log_probs}

    def picture(self, number: int, picture: int) -> tuple[str, bytes]:
        """The media type and the bytes of a picture, by its number in the trace.

        Raises:
            GoneError: there is no such picture, or it is none that a browser should decode.
        """
        every = [x for item in self.read(number) for x in pictures_of(item)]
        if not 0 <= picture < len(every):
            raise GoneError("there is no such picture")
        head, _, encoded = every[picture].uri.partition(",")
        try:
            data = base64.b64decode(encoded, validate=True)
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
                width, height = image.size
                kind = {"PNG": "image/png", "JPEG": "image/jpeg"}[str(image.format)]
        except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise GoneError(f"this is no picture: {error}") from None
        if width * height > MOST_PIXELS:
            raise GoneError(f"this picture has {width} x {height} pixels, more than {MOST_PIXELS:,}")
        return kind, data


def passes(entry: TraceEntry, wanted: Filter) -> bool:
    """Whether a trace passes a filter, whatever side it is on."""
    if wanted.verdict and {"right": True, "wrong": False, "unknown": None}[wanted.verdict] is not entry.right:
        return False
    if wanted.category and wanted.category != NAMED + entry.category:
        return False
    if wanted.tool == ANY_CALL and not entry.calls or wanted.tool == NO_CALL and entry.calls:
        return False
    if wanted.tool.startswith(NAMED) and wanted.tool.removeprefix(NAMED) not in entry.tools:
        return False
    if wanted.text:
        seek = wanted.text.casefold()
        return any(seek in x.casefold() for x in (entry.title, entry.about, entry.answer, entry.reference) if x)
    return True


def pictures_of(item: Transcript) -> list[Picture]:
    """The pictures of a conversation in the order in which they are numbered."""
    return [*item.pictures, *item.overview, *(x for turn in item.turns for x in turn.pictures)]


class Pictures:
    """Numbers pictures, in the order of `pictures_of`."""

    def __init__(self):
        self.count = 0

    def __call__(self, pictures: Sequence[Picture]) -> list[dict[str, Any]]:
        """What the page needs to know of pictures: everything but their pixels."""
        shown = []
        for x in pictures:
            known = {"width": x.width, "height": x.height, "caption": _cut(x.caption), "boxes": x.boxes}
            shown.append({"picture": self.count, **known})
            self.count += 1
        return shown


def _conversation(item: Transcript, number: Pictures) -> dict[str, Any]:
    return {
        "title": _cut(item.title),
        "question": _cut(item.question),
        "answer": item.answer and _cut(item.answer),
        "reference": item.reference and _cut(item.reference),
        "correct": item.correct,
        "stop": _cut(item.stop),
        "reward": item.reward,
        "advantage": item.advantage,
        "terms": [(_cut(name), value) for name, value in item.terms.items()],
        "category": _cut(item.category),
        "pictures": number(item.pictures),
        "overview": number(item.overview),
        "turns": [
            {
                "role": turn.role,
                "text": _cut(turn.text),
                "failed": turn.failed,
                "tool": _cut(turn.tool),
                "tokens": len(turn.pieces),
                "pictures": number(turn.pictures),
            }
            for turn in item.turns
        ],
    }


def _cut(text: str) -> str:
    if len(text) <= MOST_SHOWN:
        return text
    return f"{text[:MOST_SHOWN]}\n[{len(text) - MOST_SHOWN:,} more characters are not shown]"


def _said(settings: Mapping[str, Any], name: str) -> str:
    return str(settings.get(name, "–"))[:200]
