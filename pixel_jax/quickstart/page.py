"""The page `report.html` of the quickstart."""

from collections.abc import Mapping, Sequence

from pixel_jax.evaluation import report
from pixel_jax.evaluation.curves import curves as curves_of
from pixel_jax.evaluation.transcript import Transcript
from pixel_jax.quickstart.config import QuickstartConfig
from pixel_jax.quickstart.task import lesson_of


def page(config: QuickstartConfig, metrics: Mapping, traces: Sequence[Transcript]) -> str:
    """Writes the whole report: numbers, curves, settings, transcripts of the first seed."""
    seeds, lesson = metrics["seeds"], lesson_of(config)
    sections = [
        ("", introduction(config, seeds)),
        ("Results", results_table(config, metrics) + report.paragraph(verdict(config, metrics))),
        ("Learning curves", curves(config, metrics)),
        ("What was arranged", "".join(report.paragraph(text) for text in lesson.arrangement(config))),
        ("Time", times(metrics)),
        (f"Traces (seed {seeds[0]}, held-out scenes, sampled)", "".join(report.transcript(item) for item in traces)),
    ]
    data = {name: value for name, value in metrics.items() if name != "per_seed"}
    return report.page(lesson.title, sections, data)


def introduction(config: QuickstartConfig, seeds: Sequence[int]) -> str:
    """The first paragraph."""
    return report.paragraph(
        f"{lesson_of(config).introduction} {config.evaluation.scenes} held-out scenes (photographs and digits no phase has seen) "
        f"judge the result; seeds: {', '.join(map(str, seeds))}."
    )


def results_table(config: QuickstartConfig, metrics: Mapping) -> str:
    """The table of the warm start and both arms."""
    columns = {"warm start": "sft", **{arm.label: name for name, arm in lesson_of(config).arms.items()}}
    numbers = {"sft": metrics["sft"], **metrics["rl"]}
    rows = []
    for name, words in lesson_of(config).rows.items():
        cells = [interval(metrics, group, name, numbers[group].get(name)) for group in columns.values()]
        rows.append([words, *cells])
    return report.table(["", *columns], rows)


def interval(metrics: Mapping, group: str, name: str, mean: float | None) -> str:
    """A mean with its interval over seeds, or over scenes where there is one seed; a dash where it was not measured."""
    if mean is None:
        return "–"
    if metrics["intervals_over_seeds"]:
        bounds = metrics["intervals_over_seeds"][group][name]
        return f"{mean:.2f} [{max(bounds['low'], 0):.2f}, {min(bounds['high'], 1):.2f}]"
    (result,) = metrics["per_seed"].values()
    bounds = (result["sft"] if group == "sft" else result["rl"][group])["intervals"].get(name)
    return f"{mean:.2f} [{bounds['low']:.2f}, {bounds['high']:.2f}]" if bounds else f"{mean:.2f}"


def verdict(config: QuickstartConfig, metrics: Mapping) -> str:
    """The difference between the arms, in words."""
    over = metrics["intervals_over_seeds"]
    kind = "Student's t over seeds" if over else "Wilson's over scenes"
    gap = f"{metrics['accuracy_gap']:.3f}"
    if over:
        gap += f" [{over['accuracy_gap']['low']:.3f}, {over['accuracy_gap']['high']:.3f}]"
    first, second = (arm.label for arm in lesson_of(config).arms.values())
    return (
        f"Brackets are 95 % intervals ({kind}). Sampled at temperature 1 unless said otherwise. "
        f"{first[0].upper()}{first[1:]} minus {second}, accuracy: {gap}."
    )


def curves(config: QuickstartConfig, metrics: Mapping) -> str:
    """The learning curves of both arms: what the table has at their ends."""
    lesson = lesson_of(config)
    panels = {
        lesson.rows[name]: {
            arm.label: [(point["step"], point[name]) for point in metrics["rl"][key]["looks"]]
            for key, arm in lesson.arms.items()
        }
        for name in ("accuracy", "rapr")
    }
    return curves_of(panels, "iterations of reinforcement learning", dict.fromkeys(panels, (0, 1))) + report.paragraph(
        "On the held-out scenes, sampled at temperature 1, means over seeds: the last point is the number of the table. "
        f"Training itself samples at {config.temperatures}; its own numbers are in metrics.json."
    )


def times(metrics: Mapping) -> str:
    """The table of the phases' seconds, with the reason why they do not add up to the total."""
    seconds = dict(metrics["seconds"])
    total = seconds.pop("total")
    rows = [[name, f"{value:.0f}"] for name, value in {**seconds, "total, by the clock": total}.items()]
    return report.table(["phase", "seconds"], rows) + report.paragraph(
        f"The phases add up to {sum(seconds.values()):.0f} s, not to the total: the two arms run side by side, each in a "
        "process of its own, and the warm start is judged while the first of them compiles. The total, of one seed, has the "
        "starting of processes, too."
    )
