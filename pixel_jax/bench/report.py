"""Runs the cases of a module, prints their tables and writes a record as JSON."""

import dataclasses
import importlib
import pathlib
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from pixel_jax.bench.machine import MachineSpeed, measure_machine
from pixel_jax.bench.memory import peak_memory
from pixel_jax.bench.timing import Timing, Workload, measure
from pixel_jax.cli import check_output
from pixel_jax.files import read_json
from pixel_jax.provenance import commit
from pixel_jax.state_files import write_json
from pixel_jax.terminal import Waiting, print_table, say, table


def run_cases(module: str, only: Sequence[str], quick: bool, out: str | pathlib.Path) -> dict[str, Any]:
    """Measures the cases of `module.CASES`, one after the other, and returns the record.

    Args:
        module: dotted name of the module.
        only: names of the cases; all if empty.
        quick: tiny shapes and two rounds.
        out: the record, written after every case. Cases that it already holds and that are not measured now stay in it.

    Raises:
        ValueError: a name in `only` is of no case.
        UserError: `out` cannot be written.
    """
    cases = {case.name: case for case in importlib.import_module(module).CASES}
    unknown = sorted(set(only) - set(cases))
    if unknown:
        raise ValueError(f"there is no case {', '.join(unknown)}; the cases are {', '.join(cases)}")
    out = pathlib.Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    check_output("--out", out)
    with Waiting("measuring the machine"):
        machine = measure_machine(quick)
    say(describe(machine))
    record: dict[str, Any] = read_json(out) if only and out.exists() else {"cases": {}}
    record |= {"machine": dataclasses.asdict(machine), "quick": quick}
    began = time.monotonic()
    for number, name in enumerate(only or cases, 1):
        say(f"case {number} of {len(only or cases)}, after {time.monotonic() - began:.0f} s: {name}")
        with Waiting(name) as waiting:
            work = cases[name].build(quick)
            timings = measure(work, least=2, most=2, note=waiting.at) if quick else measure(work, note=waiting.at)
            ours = () if quick else tuple(timings)[:1]
            for alternative in ours if work.memory is None else work.memory:
                waiting.at(f"memory, in a process of its own: {alternative}")
                peak = peak_memory(module, name, alternative, quick)
                timings[alternative] = dataclasses.replace(timings[alternative], peak_bytes=peak)
        entry = case_record(work, timings, machine) | {"commit": commit()}
        record["cases"][name] = entry
        write_json(out, record)
        print_table(case_table(name, entry, quick))
    return record


def case_record(work: Workload, timings: dict[str, Timing], machine: MachineSpeed) -> dict[str, Any]:
    """The record of a case: plain numbers and strings."""
    ours = next(iter(timings))
    seconds = timings[ours].seconds
    aims = []
    for aim in work.aims:
        if aim.memory:
            # Small work is not seen in the process's memory.
            theirs, mine = (timings[name].peak_bytes or 0 for name in (aim.against, ours))
            reached = theirs / mine if min(theirs, mine) > 0 else None
        else:
            reached = timings[aim.against].ratio
        aims.append({**dataclasses.asdict(aim), "reached": reached})
    return {
        "shapes": work.shapes,
        "flops": flops_of(work, timings),
        "bytes": work.bytes,
        "share_of_matmul": {
            name: count / timings[name].seconds / machine.matmul for name, count in flops_of(work, timings).items()
        },
        "share_of_read": None if work.bytes is None else work.bytes / seconds / machine.read,
        "alternatives": {name: dataclasses.asdict(timing) for name, timing in timings.items()},
        "aims": aims,
        "details": dict(work.details),
    }


def flops_of(work: Workload, names: Iterable[str]) -> dict[str, float]:
    """The FLOPs of a run by alternative; empty where they are not known."""
    if work.flops is None:
        return {}
    return dict(work.flops) if isinstance(work.flops, Mapping) else dict.fromkeys(names, work.flops)


def case_table(name: str, entry: dict[str, Any], quick: bool = False) -> Table:
    """The table of a case. With `quick` no aim is shown: aims are for the case's own shapes, not for tiny ones."""
    head = ("", "seconds (quartiles)", "ours is faster", "of matmul", "first call", "programs", "compiled", "memory")
    rows = []
    for index, (alternative, timing) in enumerate(entry["alternatives"].items()):
        share, peak = entry["share_of_matmul"].get(alternative), timing["peak_bytes"]
        rows.append(
            (
                alternative,
                f"{timing['seconds']:.3g} ({timing['low']:.3g}-{timing['high']:.3g})",
                f"{timing['ratio']:.2f}x ({timing['ratio_low']:.2f}-{timing['ratio_high']:.2f})" if index else "",
                "" if share is None else f"{100 * share:.0f} %",
                f"{timing['first_call']:.1f} s",
                f"{timing['compilations']}+{timing['recompilations']}" if timing["compilations"] else "",
                f"{timing['compile']:.1f} s" if timing["compilations"] else "",
                "" if peak is None else f"{peak / 1e6:.0f} MB",
            )
        )
    caption = "; ".join(_remarks(entry | {"aims": []} if quick else entry))
    return table(head, rows, title=f"{name}: {entry['shapes']}", caption=caption)


def _remarks(entry: dict[str, Any]) -> list[str]:
    remarks = []
    if entry["flops"]:
        remarks.append(", ".join(dict.fromkeys(f"{count / 1e9:.3g}" for count in entry["flops"].values())) + " GFLOP")
    if entry["share_of_read"] is not None:
        remarks.append(f"{entry['bytes'] / 1e6:.3g} MB, {100 * entry['share_of_read']:.0f} % of the read ceiling")
    for aim in entry["aims"]:
        what = "less memory than" if aim["memory"] else "faster than"
        reached = "too little to measure" if aim["reached"] is None else f"reached {aim['reached']:.2f}x"
        remarks.append(f"aim {aim['ratio']:.2g}x {what} {aim['against']}, {reached}")
    return remarks + [f"{name} {value}" for name, value in entry["details"].items()]


def describe(machine: MachineSpeed) -> str:
    """A line about the machine."""
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    return (
        f"{machine.devices} x {machine.device}, {machine.cores} cores; products {machine.matmul / 1e9:.0f} GFLOP/s in float32, "
        f"{machine.matmul_bf16 / 1e9:.0f} in bfloat16; reading {machine.read / 1e9:.1f} GB/s ({versions})"
    )
