"""Summaries of records: numbers with intervals for each category, a table for the terminal, a page with transcripts."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from pixel_jax.dialog.grammar import Language
from pixel_jax.dialog.unrecognised import format_warning
from pixel_jax.evaluation import report, transcript
from pixel_jax.evaluation.evidence import HELD
from pixel_jax.evaluation.exchange import ALL, CASES
from pixel_jax.evaluation.modes import MODES
from pixel_jax.evaluation.stats import bootstrap, paired
from pixel_jax.files import FileError
from pixel_jax.state_files import read_note
from pixel_jax.terminal import warn

Record = Mapping[str, Any]
RATES = {  # name: (of what, over what), summed over a question's answers
    "score": ("score", "asked"),
    "accuracy": ("accuracy", "asked"),
    "rapr": ("looked", "answers"),  # rate of pixel-space reasoning: answers with at least one operation
    "operation_errors": ("failed", "executed"),  # of the operations asked for and carried out
    "unrecognised": ("unrecognised", "answers"),  # answers with something like a call that is none in the run's format
    "operations": ("operations", "answers"),
    "tokens": ("tokens", "answers"),  # written for an answer
    "finished": ("finished", "answers"),  # ended with an answer, not at a limit
    # Answers after a crop that holds the evidence, of those with a crop and a reference.
    "evidence": ("held", "referred"),
    "crop_area": ("crop_area", "referred"),  # share of the picture that the largest crop of such an answer shows
}
COUNTS = ("operations", "tokens")  # of an answer, not shares


def sums(record: Record) -> dict[str, float]:
    """The sums over a question's answers."""
    names = ("score", "accuracy", "operations", "executed", "failed", "tokens")
    return {
        **{name: float(sum(record[name])) for name in names},
        "unrecognised": float(sum(x > 0 for x in record["unrecognised"])),
        "looked": float(sum(x > 0 for x in record["operations"])),
        "finished": float(sum(x == "answer" for x in record["stop"])),
        "asked": float(len(record["score"])),
        "answers": float(len(record["stop"])),  # 0 for a question that could not be asked, which counts as wrong
        "held": float(sum(x >= HELD for x in record.get("evidence", ()))),
        "referred": float(sum(x > 0 for x in record.get("crop_area", ()))),
        "crop_area": float(sum(record.get("crop_area", ()))),
    }


def summarise(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """The rates of each category: {category: {"questions", "answers" (a question), "shrunk", "unanswered", rate: interval}}.

    The first category is "all". An interval is {"mean", "low", "high"}: a 95 % bootstrap interval over questions, or Wilson's
    for shares where all questions have the same value. A rate without a denominator (no operations at all) is None. A category
    that is itself called "all" is "all (category)".
    """
    categories = sorted({record["category"] for record in records})
    groups = {ALL: list(records)}
    if len(categories) > 1:
        for name in categories:
            groups[f"{ALL} (category)" if name == ALL else name] = [x for x in records if x["category"] == name]
    rows = {}
    for name, group in groups.items():
        added = [sums(record) for record in group]
        row: dict[str, Any] = {
            "questions": len(group),
            "answers": len(group[0]["score"]),
            "shrunk": sum(record["shrunk"] for record in group),
            "unanswered": len(unanswered(group)),
        }
        for rate, (above, below) in RATES.items():
            bounds = None if rate in COUNTS else (0, 1)
            interval = bootstrap([x[above] for x in added], [x[below] for x in added], bounds=bounds)
            row[rate] = {key: None if math.isnan(interval[key]) else interval[key] for key in ("mean", "low", "high")}
        rows[name] = row
    return rows


def unanswered(records: Sequence[Record]) -> dict[str, str]:
    """The questions that could not be asked: id -> reason."""
    return {record["id"]: record["unanswered"] for record in records if "unanswered" in record}


def format_warnings(name: str, runs: Mapping[str, Sequence[Record]], language: Language) -> list[str]:
    """Warnings about a benchmark's runs {mode: records} whose calls are often in another format.

    Modes without tools are left out: there a model is not asked to call one.
    """
    texts = {mode: [text for record in records for text in record["responses"]] for mode, records in runs.items()}
    warnings = {
        mode: format_warning(some, language) for mode, some in texts.items() if MODES[mode].guidelines != "notool"
    }
    return [f"{name} {mode}: {warning}" for mode, warning in warnings.items() if warning is not None]


def compare(first: Sequence[Record], second: Sequence[Record], what: str = "score") -> dict[str, float]:
    """The paired test (`stats.paired`) of two runs over the same questions, by the average of each question's answers.

    Raises:
        ValueError: the questions are not the same.
    """
    one, other = ({record["id"]: record for record in records} for records in (first, second))
    if one.keys() != other.keys():
        odd = sorted(one.keys() ^ other.keys())
        raise ValueError(
            f"the runs are about different questions: {len(odd)} of them are in one run only, such as {odd[0]!r}"
        )
    for name, record in one.items():
        if record["answers"] != other[name]["answers"]:
            raise ValueError(f"question {name!r} has the answers {record['answers']} and {other[name]['answers']}")

    def average(record: Record) -> float:
        return sum(record[what]) / len(record[what])

    return paired([average(x) for x in one.values()], [average(other[name]) for name in one])


def percent(interval: Mapping[str, float | None]) -> str:
    """An interval in percent, as in `50.0 [40.2, 59.8]`."""
    mean, low, high = (interval[name] for name in ("mean", "low", "high"))
    if mean is None or low is None or high is None:
        return "–"
    return f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


HEAD = (
    "benchmark",
    "mode",
    "category",
    "questions",
    "score %",
    "accuracy %",
    "RaPR %",
    "op. errors %",
    "unrecognised %",
    "evidence held %",
    "tokens",
    "ended %",
    "unanswered",
)


def table_rows(benchmarks: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The rows below `HEAD` of {benchmark: {"modes": {mode: what `summarise` returns}}}."""
    rows = []
    for name, benchmark in benchmarks.items():
        for mode, categories in benchmark["modes"].items():
            for category, row in categories.items():
                count = str(row["questions"]) if row["answers"] == 1 else f"{row['questions']} × {row['answers']}"
                rates = [
                    percent(row[rate]) if rate in row else "–"  # an older evaluation has fewer
                    for rate in ("score", "accuracy", "rapr", "operation_errors", "unrecognised", "evidence")
                ]
                tokens = "–" if row["tokens"]["mean"] is None else f"{row['tokens']['mean']:.0f}"
                rows.append(
                    [name, mode, category, count, *rates, tokens, percent(row["finished"]), str(row["unanswered"])]
                )
    return rows


EXCHANGE_HEAD = (
    "benchmark",
    "beside",
    "category",
    "questions",
    "gain %",
    "harm %",
    "right both %",
    "wrong both %",
    "gain held %",
)


def exchange_rows(benchmarks: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The rows below `EXCHANGE_HEAD` of {benchmark: {"exchange": {mode: what `exchange.exchange` returns}}}."""
    rows = []
    for name, benchmark in benchmarks.items():
        for mode, categories in benchmark.get("exchange", {}).items():  # an older evaluation has none
            for category, row in categories.items():
                shares = [percent(row[case]) for case in CASES]
                held = "–" if row["gain_held"] is None else percent(row["gain_held"])
                rows.append([name, mode, category, str(row["questions"]), *shares, held])
    return rows


def sentence(first: str, second: str, test: Mapping[str, float]) -> str:
    """A paired test in words."""
    return (
        f"{second} − {first}: {100 * test['difference']:+.1f} points [{100 * test['low']:+.1f}, {100 * test['high']:+.1f}], "
        f"p = {test['p']:.2g} ({test['better']} questions better, {test['worse']} worse, of {test['n']})"
    )


def exchange_section(benchmarks: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of gains and harms with the modes in words; "" if there is nothing to compare."""
    rows = exchange_rows(benchmarks)
    modes = dict.fromkeys(row[1] for row in rows)
    words = "; ".join(f"{mode}: {MODES[mode].what}" for mode in modes)
    text = (
        "Gain: wrong in the other mode and right with operations; harm: the opposite. Gain held: the share of the gain in which "
        f"a crop held the evidence, where the data say where it lies. {words}."
    )
    return report.paragraph(text) + report.table(EXCHANGE_HEAD, rows) if rows else ""


def _traces(path: pathlib.Path) -> list[transcript.Transcript]:
    try:
        return transcript.load(path)
    except FileError as error:
        warn(f"{error}. It is not drawn")
        return []


def sections_of(
    metrics: Mapping[str, Any], directories: Mapping[tuple[str, str], pathlib.Path]
) -> list[tuple[str, str]]:
    """The sections of the report, for `report.page`: table, paired tests, transcripts from {(benchmark, mode): directory}."""
    benchmarks = metrics["benchmarks"]
    tests = [
        report.paragraph(f"{name}: {sentence(metrics['first_mode'], mode, test)}")
        for name, benchmark in benchmarks.items()
        for mode, test in benchmark["differences"].items()
    ]
    sections = [
        (
            "",
            report.paragraph(
                "95 % bootstrap intervals over questions; Wilson's where all questions have the same score."
            )
            + report.table(HEAD, table_rows(benchmarks)),
        ),
        *([("Modes compared, paired by question", "".join(tests))] if tests else []),
        *([("What operations gain and harm", exchanged)] if (exchanged := exchange_section(benchmarks)) else []),
    ]
    missing = [
        (name, mode, question, why)
        for name, benchmark in benchmarks.items()
        for mode, reasons in benchmark["unanswered"].items()
        for question, why in reasons.items()
    ]
    if missing:
        head = ("benchmark", "mode", "question", "why")
        sections.append(("Could not be asked, and count as wrong", report.table(head, missing)))
    for (name, mode), directory in directories.items():
        files = sorted((directory / "traces").glob("[0-9]*.json"), key=lambda path: int(path.stem))
        shown = [report.transcript(item) for path in files for item in _traces(path)]
        if shown:
            sections.append((f"{name}, {mode}", "".join(shown)))
    return sections


def page(title: str, metrics: Mapping[str, Any], directories: Mapping[tuple[str, str], pathlib.Path]) -> str:
    """The report as a whole page, with the numbers embedded."""
    return report.page(title, sections_of(metrics, directories), metrics)


def evaluated(out: pathlib.Path) -> tuple[dict[str, Any], dict[tuple[str, str], pathlib.Path]] | None:
    """The numbers of the evaluation in the directory `out`, and {(benchmark, mode): directory}; None: none has ended there."""
    metrics = read_note(out / "metrics.json")
    if metrics is None or not isinstance(metrics.get("benchmarks"), dict):
        return None
    return metrics, {
        (name, mode): out / name / mode for name, x in metrics["benchmarks"].items() for mode in x["modes"]
    }


def redraw(out: pathlib.Path) -> None:
    """Writes the page of the evaluation in the directory `out` into it."""
    if (found := evaluated(out)) is not None:
        report.write(out / "report.html", page(f"Evaluation of {found[0].get('model')}", *found))
