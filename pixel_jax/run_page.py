"""The page of a training run, made from the files in its directory: curves, conversations, the data, and every start."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from pixel_jax.evaluation import report, transcript
from pixel_jax.evaluation.curves import Points, curves
from pixel_jax.files import FileError
from pixel_jax.identity import read_history
from pixel_jax.settings import Setting, settings
from pixel_jax.state_files import read_note
from pixel_jax.terminal import warn
from pixel_jax.train_config import CONFIG, DATA, TrainConfig
from pixel_jax.training.watch import BEST, HELD_OUT, ROLLOUTS, numbered
from pixel_jax.training.writers import read_metrics

PAGE = "report.html"
UNITS: Mapping[str, str] = {"sft": "step", "rl": "iteration"}  # of each phase
PHASES = tuple(UNITS)
METRICS = "metrics.jsonl"
# Title of a panel: line -> metric. A panel is drawn where a run has any of them.
PANELS: Mapping[str, Mapping[str, str]] = {
    "accuracy": {"training": "accuracy", "held out": "eval_accuracy"},
    "rate of pixel-space reasoning": {"training": "rapr", "held out": "eval_rapr"},
    "reward": {"all": "reward", "answer": "reward_answer", "curiosity": "reward_curiosity"},
    "loss": {"training": "loss", "held out": "eval_loss"},
    "groups": {"that teach": "nonzero_variance", "all right": "all_right", "all wrong": "all_wrong"},
    "tokens of an answer": {"training": "response_tokens", "held out": "eval_response_tokens"},
    "calls that failed": {"training": "call_errors", "held out": "eval_call_errors"},
    "rows without a boxed answer": {"training": "unboxed", "held out": "eval_unboxed"},
    "entropy": {"training": "entropy"},
    "norm of the gradient": {"training": "grad_norm"},
    "learning rate": {"training": "learning_rate"},
    "seconds": {"all": "seconds", "rollout": "seconds_rollout", "update": "seconds_update"},
}
SHARES = ("accuracy", "rate of pixel-space reasoning", "groups", "calls that failed", "rows without a boxed answer")
NEWEST = 3  # files of conversations that are drawn, besides the first
EXPLAINED = (
    "Training curves are of each batch, sampled as the model explores; held-out curves are of examples that it is never trained "
    "on, sampled at temperature 1."
)


def is_run(directory: pathlib.Path) -> bool:
    """Whether a directory holds the metrics of a phase."""
    return any((directory / phase / METRICS).is_file() for phase in PHASES)


def draw_run(out: pathlib.Path) -> pathlib.Path:
    """Writes the page of the run in the directory `out` into it, and returns its path."""
    report.write(out / PAGE, report.page(f"The run {out}", run_sections(out)))
    return out / PAGE


def run_sections(out: pathlib.Path) -> list[tuple[str, str]]:
    """The sections of the page of the run in the directory `out`, for `report.page`."""
    sections = []
    for phase in PHASES:
        if (out / phase / METRICS).is_file():
            sections += _phase(out, out / phase)
    return [*sections, ("Settings", _settings(read_note(out / CONFIG)))]


def curves_together(runs: Mapping[str, pathlib.Path]) -> str:
    """The curves of several runs, by name, in the same charts: of every chart the first line that a run has."""
    panels: dict[str, dict[str, Points]] = {}
    for phase in PHASES:
        for name, out in runs.items():
            lines = read_metrics(out / phase / METRICS)
            for title, metrics in PANELS.items():
                if points := next((p for metric in metrics.values() if (p := points_of(lines, metric))), None):
                    panels.setdefault(f"{phase}: {title}", {})[name] = points
    bounds = {f"{phase}: {title}": (0.0, 1.0) for phase in PHASES for title in SHARES}
    return curves(panels, "steps (sft), iterations (rl)", bounds)


def _phase(out: pathlib.Path, phase: pathlib.Path) -> list[tuple[str, str]]:
    lines = read_metrics(phase / METRICS)
    history, read = read_history(phase), read_note(out / DATA) or {}
    looks, rollouts = ([*numbered(phase / "traces" / name)] for name in (HELD_OUT, ROLLOUTS))
    unit = UNITS[phase.name]
    return [
        (phase.name, _summary(phase, lines, history, read, unit)),
        ("Curves", _curves(lines, unit) + report.paragraph(EXPLAINED)),
        ("Held-out examples", _conversations(looks, lambda n: f"after {n} {unit}s" if n else "before the first step")),
        ("Rollouts", _conversations(rollouts, lambda n: f"{unit} {n}")),
        ("What was read", _read(read)),
        ("Starts", _starts(history)),
    ]


def _summary(phase: pathlib.Path, lines: Sequence[Mapping[str, Any]], history, read, unit: str) -> str:
    of = next((x["of"] for x in reversed(history) if x.get("of") is not None), None)
    done = max((x["step"] + 1 for x in lines), default=0)
    rows = [(f"{unit}s", f"{done} of {of}" if of is not None else str(done))]
    rows += [("data", f"{read['source']}: {read['data']}"), ("judged by", read["judged_by"])] if _is_read(read) else []
    best = read_note(phase / BEST)
    if best is not None:
        rows.append(("best model", f"after {best.get('done')} {unit}s, by {best.get('by')}: {best.get('value')}"))
    rows += [(name, _course(lines, name)) for name in ("loss", "accuracy", "rapr", "reward") if points_of(lines, name)]
    rows += [
        (f"{name}, held out", _course(lines, f"eval_{name}"))
        for name in ("loss", "accuracy", "rapr")
        if points_of(lines, f"eval_{name}")
    ]
    return report.table(("", ""), rows, style="facts")


def _is_read(read: Mapping[str, Any]) -> bool:
    return all(isinstance(read.get(name), str) for name in ("source", "data", "judged_by"))


def points_of(lines: Sequence[Mapping[str, Any]], name: str) -> Points:
    """The points (steps done, value) of a metric where it is a number."""
    return [(x["step"] + 1, float(x[name])) for x in lines if type(x.get(name)) in (int, float)]


def _course(lines: Sequence[Mapping[str, Any]], name: str) -> str:
    points = points_of(lines, name)
    return f"{points[0][1]:.4g} → {points[-1][1]:.4g}"


def _curves(lines: Sequence[Mapping[str, Any]], unit: str) -> str:
    panels = {}
    for title, names in PANELS.items():
        panel = {label: points for label, name in names.items() if (points := points_of(lines, name))}
        if panel:
            panels[title] = panel
    if not panels:
        return report.paragraph("Nothing has been measured yet.")
    return curves(panels, f"{unit}s", dict.fromkeys(SHARES, (0.0, 1.0)))


def _conversations(files: Sequence[pathlib.Path], name) -> str:
    """The first file of conversations and the newest ones; the last is unfolded, the others are folded."""
    shown = list(dict.fromkeys([*files[:1], *files[-NEWEST:]]))
    if not shown:
        return report.paragraph("None were kept.")
    sections = []
    for path in reversed(shown):
        try:
            items = transcript.load(path)
        except FileError as error:
            warn(f"{error}. It is not drawn")
            continue
        drawn = "".join(report.transcript(item) for item in items)
        sections.append(report.folded(name(int(path.stem)), drawn, unfolded=path == shown[-1]))
    if len(files) > len(shown):
        where = f"{len(files) - len(shown)} more are kept in {files[0].parent}"
        sections.append(report.paragraph(f"{where}; `pixel-jax view {files[0].parents[3]}` shows all."))
    return "".join(sections)


def _read(read: Mapping[str, Any]) -> str:
    if not _is_read(read):
        return report.paragraph("It was not recorded.")
    dropped, mended = read.get("dropped") or [], read.get("mended") or {}
    rows = [("rows dropped", str(len(dropped))), *((what, str(count)) for what, count in mended.items())]
    counts = report.table(("", ""), rows, style="facts")
    return counts + (
        report.folded("why", report.table(("",), [[why] for why in dropped], style="facts")) if dropped else ""
    )


def _starts(history: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for x in history:
        done = "" if x.get("done") is None else f" from {x['done']} of {x.get('of')}"
        changed = "; ".join(f"{name}: {pair}" for name, pair in x["changed"].items())
        devices = x.get("devices") or {}
        where = f"{x['host']}, {devices.get('count')} × {devices.get('kind')}"
        rows.append((x["time"], x["what"] + done, x.get("command", ""), where, changed))
    versions = history[-1].get("versions") if history else None
    starts = report.table(("time (UTC)", "", "command", "where", "changed"), rows, style="facts")
    return starts + (report.paragraph(", ".join(f"{a} {b}" for a, b in versions.items())) if versions else "")


def _settings(values: Mapping[str, Any] | None) -> str:
    if values is None:
        return report.paragraph("They were not recorded.")
    every_setting = list(settings(TrainConfig, values, prefix="--config"))

    def shown(x: Setting) -> tuple[str, str, str]:
        return x.key, _short(x.value), x.about

    own = [shown(x) for x in every_setting if _short(x.value) != _short(x.default)]
    head = ("setting", "value", "")
    every = report.folded("all settings", report.table(head, [shown(x) for x in every_setting], style="facts"))
    return report.paragraph("Those that are not the default:") + report.table(head, own, style="facts") + every


def _short(value: Any) -> str:
    """A value as JSON, in which lists and tuples are the same."""
    return json.dumps(value, default=str)
