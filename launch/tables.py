"""Writes the tables of the documentation from the records in `docs/*.json`: `python -m launch.tables`.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->` in a page. Nobody edits it by hand:
`tests/test_tables.py` fails where a page differs from what its records give. A table shows one record, which is of one machine;
where the record names commits, the caption does, and says so where they differ. `--check` writes nothing and ends with 1
where a page would change.
"""

import argparse
import functools
import pathlib
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from pixel_jax.bench.machine import MachineSpeed
from pixel_jax.bench.report import describe
from pixel_jax.cli import COMMANDS
from pixel_jax.evaluation.stats import over_seeds
from pixel_jax.files import read_json, write_file
from pixel_jax.planning.machines import GIB
from pixel_jax.planning.report import mesh
from unlearn_jax.cli import COMMANDS as UNLEARN_COMMANDS

ROOT = pathlib.Path(__file__).parents[1]
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def record(name: str) -> Any:
    """The record `docs/NAME.json`."""
    return read_json(ROOT / "docs" / f"{name}.json")


def lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def digits(value: float, count: int = 3) -> str:
    """A number with `count` significant digits."""
    text = f"{value:.{count}g}"
    return f"{float(text):.0f}" if "e+" in text else text


def origin(name: str, commits: Iterable[str | None]) -> str:
    """Where the numbers of a table are from."""
    known = sorted({commit or "not recorded" for commit in commits})
    word = "commit" if len(known) == 1 else "several commits"
    return f"[`{name}.json`]({name}.json), {word} {', '.join(known)}."


def bench(name: str) -> str:
    """Cases of a benchmark: seconds, and how many times as fast, with quartiles."""
    found, rows = record(name), []
    for case, entry in found["cases"].items():
        aims = {(aim["against"], aim["memory"]): aim for aim in entry["aims"]}
        (ours, mine), *others = entry["alternatives"].items()
        rows.append((f"**{case}**: {entry['shapes']}", ours, digits(mine["seconds"]), "", ""))
        for other, timing in others:
            ratio = f"{timing['ratio']:.2f} ({timing['ratio_low']:.2f} to {timing['ratio_high']:.2f})"
            texts = [
                f"{'memory ' if memory else ''}{aim['ratio']:g}: {reached(aim)}"
                for (against, memory), aim in aims.items()
                if against == other
            ]
            rows.append(("", other, digits(timing["seconds"]), ratio, "; ".join(texts)))
    head = ("work", "", "seconds", "as fast (quartiles)", "aim")
    commits = (entry.get("commit") for entry in found["cases"].values())
    return f"{describe(MachineSpeed(**found['machine']))}. {origin(name, commits)}\n\n{lines(head, rows)}"


def reached(aim: dict[str, Any]) -> str:
    """Whether an aim was met."""
    if aim["reached"] is None:
        return "too little to measure"
    return "met" if aim["reached"] >= aim["ratio"] else f"missed ({aim['reached']:.2f})"


def plan(name: str) -> str:
    """The best plan of each step: counts of one chip, and predicted seconds."""
    found, rows = record(name), []
    for topology, steps in found["best"].items():
        for step, best in steps.items():
            x = found["plans"][best["plan"]]
            sent = sum(kind["bytes"] for kind in x["collectives"].values())
            counts = (f"{x['bytes_per_chip'] / GIB:.1f}", digits(x["flops_per_chip"] / 1e12, 4))
            counts += (digits(x["bytes_moved"] / 1e12), digits(sent / 1e9), digits(x["seconds"]))
            rows.append((topology, step, mesh(x["sharding"]), *counts, x["bound"]))
    head = ("machine", "step", "mesh", "memory, GiB", "TFLOP", "TB moved", "GB sent", "seconds", "bound by")
    return f"{origin(name, [found.get('commit')])}\n\n{lines(head, rows)}"


def scaling(name: str) -> str:
    """Weak scaling: the same work for each chip."""
    found, rows = record(name), []
    for x in found["scaling"]:
        chips = 1
        for side in x["topology"].partition(":")[2].split("x"):
            chips *= int(side)
        times = (digits(x["times"]["memory"]), digits(x["times"]["links"]))
        share = f"{100 * x['rate'] / found['scaling'][0]['rate']:.0f} %"
        memory = f"{x['bytes_per_chip'] / GIB:.1f}"
        rows.append((str(chips), mesh(x["sharding"]), memory, *times, f"{x['rate']:.0f}", share))
    head = ("chips", "mesh", "memory, GiB", "seconds of memory", "of links", "tokens/s/chip", "efficiency")
    return f"{origin(name, [found.get('commit')])}\n\n{lines(head, rows)}"


def interval(x: dict[str, float] | None) -> str:
    """The mean of a share with its 95 % interval, cut to [0, 1]: Student's interval of few seeds may go beyond."""
    return "" if x is None else f"{x['mean']:.2f}\N{NO-BREAK SPACE}[{max(x['low'], 0):.2f}, {min(x['high'], 1):.2f}]"


QUICKSTART = {
    "accuracy": "accuracy, free to choose",
    "rapr": "rate of pixel-space reasoning",
    "rapr_small": "… small digits",
    "rapr_large": "… large digits",
    "greedy_accuracy": "accuracy, greedy",
    "zoom_small": "made to zoom, small digits",
    "direct_small": "made to answer at once, small digits",
    "zoom_iou": "overlap of the box with the reference (IoU)",
}
ROTATE = {
    "accuracy": "accuracy, free to choose",
    "accuracy_on_side": "… cards on their side",
    "accuracy_upright": "… upright cards",
    "rapr_on_side": "rate of turning the picture, cards on their side",
    "rapr_upright": "… upright cards",
    "turned_on_side": "made to turn it, cards on their side",
    "direct_on_side": "made to answer at once, cards on their side",
}


def quickstart(name: str) -> str:
    """The phases of the quickstart beside each other, with intervals over seeds."""
    found = record(name)
    parts = [found["intervals_over_seeds"][phase] for phase in ("sft", "curiosity", "no_curiosity")]
    rows = [(label, *(interval(part.get(key)) for part in parts)) for key, label in QUICKSTART.items()]
    seeds = f"{len(found['per_seed'])} seeds, 95 % intervals over seeds. "
    head = ("", "warm start", "with curiosity", "without curiosity")
    return f"{seeds}{origin(name, [found.get('commit')])}\n\n{lines(head, rows)}"


def rotate(name: str) -> str:
    """The same with another tool: one seed, intervals over scenes."""
    found = record(name)
    (seed,) = found["per_seed"].values()
    parts = [x["intervals"] for x in (seed["sft"], seed["rl"]["tool"], seed["rl"]["no_tool"])]
    rows = [(label, *(interval(part.get(key)) for part in parts)) for key, label in ROTATE.items()]
    head = ("", "warm start", "with the tool", "without the tool")
    return f"One seed, 95 % intervals over scenes. {origin(name, [found.get('commit')])}\n\n{lines(head, rows)}"


def comparison(name: str) -> str:
    """Divergence from the retrain, on removed and kept facts, by method and share removed."""
    found, sums = record(name), defaultdict(list)
    for run in found["runs"]:
        for row in run["rows"]:
            sums[row["method"], run["share"]].append((row["kl_forget"], row["kl_retain"]))
    shares = sorted({share for _, share in sums})
    mean = lambda values: digits(1000 * sum(values) / len(values), 2)
    methods = [method for method in dict.fromkeys(method for method, _ in sums) if method != "cold retrain"]
    rows = [
        (method, *(" / ".join(map(mean, zip(*sums[method, share], strict=True))) for share in shares))
        for method in methods
    ]
    head = ("removed", *(f"{100 * share:g} %" for share in shares))
    seeds = len({run["seed"] for run in found["runs"]})
    what = f"KL in thousandths, removed / kept facts, means over {seeds} seeds. "
    return f"{what}{origin(name, [found.get('commit')])}\n\n{lines(head, rows)}"


PEOPLE = (
    "probability",
    "ROUGE-L",
    "extraction",
    "truth_ratio",
    "forget_quality",
    "utility",
    "auc_min_k",
    "privleak",
    "kl_forget",
    "kl_retain",
)


def people(name: str) -> str:
    """Adapters that forgot people, by the share of forgotten rows: means over seeds with half their 95 % interval."""
    found = record(name)
    parts = [origin(name, [found.get("commit")])]
    setting = found["setting"]["corpus"]
    examples = setting["people"] * setting["questions"]

    def shown(values: Sequence[float]) -> str:
        x = over_seeds(values)
        places = 1 if abs(x["mean"]) >= 10 else 3
        half_width = f" ± {x['high'] - x['mean']:.{places}f}" if x["n"] > 1 else ""
        return f"{x['mean']:.{places}f}{half_width}"

    for forgotten in sorted({run["forgotten"] for run in found["runs"]}):
        runs = [run for run in found["runs"] if run["forgotten"] == forgotten]
        outcomes = Counter(outcome for run in runs for outcome in run["outcomes"])
        rows = [
            (adapter, *(shown([run["rows"][adapter][metric] for run in runs]) for metric in PEOPLE))
            for adapter in runs[0]["rows"]
        ]
        how = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
        seeds = "one seed" if len(runs) == 1 else f"{len(runs)} seeds"
        share = f"{forgotten} of {examples} rows forgotten ({100 * forgotten / examples:g} %), {seeds} ({how})"
        parts.append(f"**{share}**\n\n{lines(('', *PEOPLE), rows)}")
    return "\n\n".join(parts)


def attribution(name: str) -> str:
    """Linear datamodelling scores."""
    found = record(name)
    rows = [(method, f"{x['mean']:.3f}", f"{x['low']:.3f} to {x['high']:.3f}") for method, x in found["scores"].items()]
    return f"{origin(name, [found.get('commit')])}\n\n{lines(('predicted by', 'score', '95 % interval'), rows)}"


def cost(name: str) -> str:
    """What an edit reaches for what it costs."""
    found = record(name)
    millionths = lambda x: f"{1e6 * x:.3f}"
    rows = [(f"{x['epochs']:.1f}", millionths(x["kl_forget"]), millionths(x["kl_retain"])) for x in found["rows"]]
    what = f"{found['examples']:,} texts, {found['removed']} removed, after {found['training_epochs']:g} epochs of training. "
    head = ("epochs spent", "KL to the retrain, removed, in millionths", "kept")
    return f"{what}{origin(name, [found.get('commit')])}\n\n{lines(head, rows)}"


def commands() -> str:
    """What each command is for, as the programs say it."""
    rows = [
        (f"`{program} {name}`", about)
        for program, table in (("pixel-jax", COMMANDS), ("unlearn-jax", UNLEARN_COMMANDS))
        for name, (_, about) in table.items()
    ]
    return lines(("command", "what it does"), rows)


def results() -> str:
    """The results of the README that have a record."""
    over = record("quickstart")["intervals_over_seeds"]
    seeds = len(record("quickstart")["per_seed"])
    both = lambda key: f"{interval(over['curiosity'][key])}, {interval(over['no_curiosity'][key])}"
    how = f"`pixel-jax quickstart --seeds {seeds}` ([details](docs/quickstart.md))"
    rows = [
        (f"quickstart, {seeds} seeds: accuracy with curiosity, without", both("accuracy"), how),
        ("rate of pixel-space reasoning with curiosity, without", both("rapr"), "the same"),
    ]
    for label, (case, *others) in RESULTS.items():
        found = [entry for name in MACHINES if (entry := record(name)["cases"].get(case))]
        spans = [span(f"{x['alternatives'][other]['ratio']:.2f}" for x in found) for other in others]
        aims = [aim for x in found for aim in x["aims"] if aim["against"] in others and not aim["memory"]]
        missed = sum(aim["reached"] < aim["ratio"] for aim in aims)
        result = f"{' and '.join(spans)} times as fast; {len(aims) - missed} of {len(aims)} aims met"
        rows.append((label, result, "`pixel-jax bench` ([details](docs/performance.md))"))
    return lines(("what", "result", "reproduced by"), rows)


def span(values: Iterable[str]) -> str:
    """The least and the most of several machines."""
    ordered = sorted(values, key=float)
    return " to ".join(dict.fromkeys((ordered[0], ordered[-1])))


MACHINES = ("bench", "bench-avx2", "bench-avx512-200")
RESULTS = {
    "rollout beside transformers, every turn prefilled again, and with its cache (CPUs, by machine)": (
        "rollout",
        "transformers, every turn prefilled again",
        "transformers, cache kept",
    ),
    "crops, bit for bit those of Pillow, beside Pillow (CPUs, by machine)": ("crop-resize", "Pillow"),
    "tuning step beside torch eager (CPUs, by machine)": ("sft-step", "torch eager"),
}
TABLES: dict[str, Callable[[], str]] = {
    "commands": commands,
    "results": results,
    "quickstart": functools.partial(quickstart, "quickstart"),
    "quickstart-rotate": functools.partial(rotate, "quickstart-rotate"),
    "unlearn": functools.partial(comparison, "unlearn"),
    "unlearn-attribution": functools.partial(attribution, "unlearn-attribution"),
    "unlearn-people": functools.partial(people, "unlearn-people"),
    "unlearn-cost": functools.partial(cost, "unlearn-cost"),
    "unlearn-bench": functools.partial(bench, "unlearn-bench"),
    "plan-7b-scaling": functools.partial(scaling, "plan-7b-scaling"),
    **{name: functools.partial(bench, name) for name in MACHINES},
    **{
        path.stem: functools.partial(plan, path.stem)
        for path in sorted((ROOT / "docs").glob("plan-*.json"))
        if "scaling" not in path.stem
    },
}


def pages() -> Iterator[pathlib.Path]:
    """All pages that may have tables."""
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").rglob("*.md"))


def filled(text: str) -> str:
    """A page with its tables as the records give them."""

    def table(found: re.Match[str]) -> str:
        if found[2] not in TABLES:
            raise ValueError(f"there is no table {found[2]!r}; the tables are {', '.join(sorted(TABLES))}")
        return f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}"

    return MARKED.sub(table, text)


def main() -> None:
    """Fills all pages."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 where a page would change")
    check = parser.parse_args().check
    changed = []
    for page in pages():
        text = page.read_text()
        if filled(text) != text:
            changed.append(page.relative_to(ROOT))
            if not check:
                write_file(page, filled(text))
    for page in changed:
        print(f"{page}: {'differs from its records' if check else 'written'}")
    sys.exit(check and bool(changed))


if __name__ == "__main__":
    main()
