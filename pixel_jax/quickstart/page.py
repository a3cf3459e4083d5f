"""`report.html` of the quickstart."""

from collections.abc import Mapping, Sequence

import numpy as np

from pixel_jax.evaluation import report
from pixel_jax.evaluation.curves import curves as curves_of
from pixel_jax.evaluation.trace import Trace
from pixel_jax.quickstart.config import QuickstartConfig

NAMES = {"curiosity": "with curiosity", "no_curiosity": "without curiosity"}
ROWS = {
    "accuracy": "accuracy, free to choose",
    "accuracy_small": "… small digits",
    "accuracy_large": "… large digits",
    "rapr": "rate of pixel-space reasoning",
    "rapr_small": "… small digits",
    "rapr_large": "… large digits",
    "greedy_accuracy": "accuracy, greedy",
    "greedy_rapr": "rate, greedy",
    "zoom_small": "made to zoom, small digits",
    "direct_small": "made to answer at once, small digits",
    "zoom_iou": "overlap of the box with the reference (IoU)",
}
SMOOTH = 9  # iterations averaged in a curve


def page(config: QuickstartConfig, metrics: Mapping, traces: Sequence[Trace]) -> str:
    """The whole report: numbers, curves, what was arranged, traces of the first seed."""
    seeds = metrics["seeds"]
    sections = [
        ("", introduction(config, seeds)),
        ("Results", results_table(metrics) + report.paragraph(verdict(metrics))),
        ("Learning curves", curves(config, metrics)),
        ("What was arranged", "".join(report.paragraph(text) for text in arrangement(config))),
        ("Time", times(metrics)),
        (f"Traces (seed {seeds[0]}, held-out scenes, sampled)", "".join(report.trace(item) for item in traces)),
    ]
    data = {name: value for name, value in metrics.items() if name != "per_seed"}
    return report.page("A model that reasons in pixel space", sections, data)


def introduction(config: QuickstartConfig, seeds: Sequence[int]) -> str:
    return report.paragraph(
        "Photographs carry a card with a handwritten digit. Small digits cannot be read in the overview the model sees "
        "first; it may zoom in, from the full-resolution image, as often as it likes, or answer at once. After instruction "
        "tuning on synthesized traces, reinforcement learning starts twice from the same checkpoint: once with the "
        f"curiosity reward of Pixel Reasoner, once without. {config.evaluation.scenes} held-out scenes (photographs and "
        f"digits no phase has seen) judge the result; seeds: {', '.join(map(str, seeds))}."
    )


def results_table(metrics: Mapping) -> str:
    columns = {"warm start": "sft", **{NAMES[arm]: arm for arm in NAMES}}
    numbers = {"sft": metrics["sft"], **metrics["rl"]}
    rows = []
    for name, words in ROWS.items():
        cells = [interval(metrics, group, name, numbers[group][name]) for group in columns.values()]
        rows.append([words, *cells])
    return report.table(["", *columns], rows)


def interval(metrics: Mapping, group: str, name: str, mean: float) -> str:
    """The mean, with its interval over seeds, or over scenes where there is one seed."""
    if metrics["intervals_over_seeds"]:
        found = metrics["intervals_over_seeds"][group][name]
        return f"{mean:.2f} [{max(found['low'], 0):.2f}, {min(found['high'], 1):.2f}]"
    (result,) = metrics["per_seed"].values()
    found = (result["sft"] if group == "sft" else result["rl"][group])["intervals"].get(name)
    return f"{mean:.2f} [{found['low']:.2f}, {found['high']:.2f}]" if found else f"{mean:.2f}"


def verdict(metrics: Mapping) -> str:
    over = metrics["intervals_over_seeds"]
    kind = "Student's t over seeds" if over else "Wilson's over scenes"
    gap = f"{metrics['accuracy_gap']:.3f}"
    if over:
        gap += f" [{over['accuracy_gap']['low']:.3f}, {over['accuracy_gap']['high']:.3f}]"
    return (
        f"Brackets are 95 % intervals ({kind}). Sampled at temperature 1 unless said otherwise. "
        f"With curiosity minus without, accuracy: {gap}."
    )


def curves(config: QuickstartConfig, metrics: Mapping) -> str:
    panels = {}
    for title, name in (("accuracy in training", "accuracy"), ("rate of pixel-space reasoning", "rapr")):
        panels[title] = {
            NAMES[arm]: smooth([(p["step"], p[name]) for p in metrics["rl"][arm]["curve"]]) for arm in NAMES
        }
    hot = temperatures(config)
    return curves_of(panels, "iteration of reinforcement learning", dict.fromkeys(panels, (0, 1))) + report.paragraph(
        f"Means over the rows of an iteration, over seeds, and over {SMOOTH} iterations, as sampled in training: at "
        f"{hot}. Training explores; the table, at temperature 1, is what was learned."
    )


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A centred moving average, shorter at the ends."""
    half = SMOOTH // 2
    return [
        (x, float(np.mean([y for _, y in points[max(i - half, 0) : i + half + 1]]))) for i, (x, _) in enumerate(points)
    ]


def arrangement(config: QuickstartConfig) -> list[str]:
    """What was done so that the learning trap shows, in words."""
    limits = config.rl.rollout
    return [
        f"Box padding is {limits.pad:g} of the image (the released recipe: 0.1). At 448 pixels a tenth on each side would "
        "undo the zoom.",
        f"Reinforcement learning explores at {temperatures(config)}; every number of the tables is sampled at 1. A call is "
        "a dozen tokens, each of which can go wrong at that temperature, and an answer is three: looking closer fails "
        "first, although the warm start can do it. That is the "
        "learning trap. For the same reason curiosity pays up to a rate of "
        f"{config.rl.reward.threshold:g} in a group (the paper: 0.3): a call that such a temperature breaks does not count.",
        f"{config.scenes.small_share:.0%} of the scenes have a small digit; the rest can be read at once. The digits are "
        "not equally frequent, so that a guess is right now and then and answering at once has some merit. In percent, 0 "
        f"to 9: {', '.join(f'{100 * x:.0f}' for x in shares(config))}.",
        f"{config.traces.mix.direct:.0%} of the image traces of the warm start answer directly; of the others "
        f"{config.traces.mix.image[0]:.0%} look once (the paper: 30 %), because mistakes carry no loss and only those "
        "traces teach a first call.",
    ]


def temperatures(config: QuickstartConfig) -> str:
    """Those that reinforcement learning samples at."""
    limits = config.rl.rollout
    later = f", and at {limits.later_temperature:g} after the first call" if limits.later_temperature else ""
    return f"temperature {limits.temperature:g}{later}"


def shares(config: QuickstartConfig) -> np.ndarray:
    """How frequent the digits 0 to 9 are."""
    weights = np.array(config.scenes.frequencies or (1.0,) * 10)
    return weights / weights.sum()


def times(metrics: Mapping) -> str:
    """A row a phase, and why they do not add up to the total."""
    seconds = dict(metrics["seconds"])
    total = seconds.pop("total")
    rows = [[name, f"{value:.0f}"] for name, value in {**seconds, "total, by the clock": total}.items()]
    return report.table(["phase", "seconds"], rows) + report.paragraph(
        f"The phases add up to {sum(seconds.values()):.0f} s, not to the total: the two arms run side by side, each in a "
        "process of its own, and the warm start is judged while the first of them compiles. The total, of one seed, has the "
        "starting of processes, too."
    )
