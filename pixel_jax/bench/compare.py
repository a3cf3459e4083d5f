"""`pixel-jax bench compare A.json B.json`: what changed from one record of the bench to another by more than noise.

A median has an interval, median +- 1.57 (quartile distance) / sqrt(rounds): where the intervals of two medians do not overlap,
they differ at about the level of 5 % (McGill, Tukey and Larsen, Variations of Box Plots, The American Statistician 32, 1978).
"""

import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pixel_jax.cli import UserError
from pixel_jax.files import read_json
from pixel_jax.terminal import print_table, say, table

NOTCH = 1.57
FEWEST = 4  # rounds: of fewer on both sides no order of the times is rarer than 5 %
SMALLEST = 0.05  # of a figure: two equal programs that were measured at different times differ by as much
MACHINE = 0.1  # a difference of the machine's rates that is said
MEMORY = 16e6  # bytes, the least change of a peak: it is measured once, and the kernel counts pages in batches


class Figure(NamedTuple):
    """A measured number and the bounds of its noise."""

    value: float
    low: float
    high: float
    judged: bool = True  # whether there were rounds enough to know the noise


class Change(NamedTuple):
    """A figure of an alternative of a case that differs by more than noise."""

    case: str
    alternative: str
    what: str  # a key of `figures`
    before: float
    after: float

    @property
    def ratio(self) -> float:
        """How many times the old value the new one is; infinite from zero."""
        return self.after / self.before if self.before else math.inf


class Comparison(NamedTuple):
    """What two records have in common and what not."""

    changes: list[Change]
    compared: int  # figures
    unjudged: list[str]  # figures that differ, from too few rounds to tell whether by more than noise
    left_out: list[str]  # what only one record has, or what is not the same work


def median(middle: float, low: float, high: float, rounds: int) -> Figure:
    """The figure of a median with its quartiles."""
    half = NOTCH * (high - low) / math.sqrt(rounds)
    return Figure(middle, middle - half, middle + half, rounds >= FEWEST)


def figures(timing: Mapping[str, Any], ours: bool) -> dict[str, Figure]:
    """The figures of an alternative by name. Its time over ours hardly depends on the machine's other load."""
    found = {"seconds": median(timing["seconds"], timing["low"], timing["high"], timing["rounds"])}
    if not ours:
        ratio = timing["ratio"], timing["ratio_low"], timing["ratio_high"]
        found["times ours"] = median(*ratio, timing["rounds"])
    if (peak := timing["peak_bytes"]) is not None:
        found["MB of memory"] = Figure(peak / 1e6, (peak - MEMORY / 2) / 1e6, (peak + MEMORY / 2) / 1e6)
    for name in ("compilations", "recompilations"):
        found[name] = Figure(timing[name], timing[name], timing[name])
    return found


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> Comparison:
    """Compares two records of `pixel_jax.bench.report.run_cases`."""
    found = Comparison([], 0, [], [])
    cases = before["cases"], after["cases"]
    compared = 0
    for case in _shared(*cases, "case", found.left_out):
        old, new = (record[case] for record in cases)
        if old["shapes"] != new["shapes"]:
            found.left_out.append(f"case {case}: other work, {old['shapes']!r} and {new['shapes']!r}")
            continue
        alternatives = old["alternatives"], new["alternatives"]
        ours = next(iter(alternatives[0]), None)
        for name in _shared(*alternatives, f"{case}: ", found.left_out):
            pair = tuple(figures(timings[name], name == ours) for timings in alternatives)
            assert len(pair) == 2
            for what in _shared(*pair, f"{case}, {name}: ", found.left_out):
                a, b = (each[what] for each in pair)
                compared += 1
                if not _separated(a, b):
                    continue
                if a.judged and b.judged:
                    found.changes.append(Change(case, name, what, a.value, b.value))
                else:
                    found.unjudged.append(f"{case}, {name}: {a.value:.3g} and {b.value:.3g} {what}")
    return found._replace(compared=compared)


def _separated(a: Figure, b: Figure) -> bool:
    """Whether two figures differ by more than noise."""
    return max(a.low, b.low) > min(a.high, b.high) and abs(a.value - b.value) > SMALLEST * max(a.value, b.value)


def _shared(a: Mapping[str, Any], b: Mapping[str, Any], of: str, left_out: list[str]) -> Iterator[str]:
    """Yields the names that both have; notes those that one lacks."""
    for name in dict.fromkeys([*a, *b]):
        if name in a and name in b:
            yield name
        else:
            left_out.append(f"{of.rstrip()} {name} is only in the {'first' if name in a else 'second'}")


def read_record(path: str) -> dict[str, Any]:
    """Reads a record.

    Raises:
        UserError: the file is not a record of a bench.
    """
    record = read_json(path)
    if not isinstance(record, dict) or not all(isinstance(record.get(x), dict) for x in ("cases", "machine")):
        raise UserError(f"{path} is no record of `bench`: it lacks cases or machine")
    return record


def machines(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Says what differs between the machines of two records."""
    old, new = before["machine"], after["machine"]
    said = [
        f"the machines differ: {name} {old.get(name)!r} and {new.get(name)!r}"
        for name in ("device", "devices", "cores", "versions")
        if old.get(name) != new.get(name)
    ]
    for name, unit in (("matmul", "GFLOP/s"), ("read", "GB/s")):
        a, b = old[name], new[name]
        if abs(a - b) > MACHINE * max(a, b):
            said.append(
                f"the machine's speed differs: {name} {a / 1e9:.3g} and {b / 1e9:.3g} {unit}; seconds follow, times ours hardly"
            )
    return said


def main(arguments: list[str]) -> None:
    """Prints what changed between the two records that `arguments` name.

    Raises:
        UserError: there are not two, or one is no record.
    """
    if len(arguments) != 2:
        raise UserError("compare needs two records: bench compare A.json B.json")
    before, after = map(read_record, arguments)
    try:
        found, said = compare(before, after), machines(before, after)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{' or '.join(arguments)} is no record of `bench` of this version ({error!r}): measure again"
        ) from error
    for line in said:
        say(line)
    if found.changes:
        rows = [
            (x.case, x.alternative, x.what, f"{x.before:.4g}", f"{x.after:.4g}", f"{x.ratio:.2f}x")
            for x in found.changes
        ]
        names = [pathlib.Path(path).name for path in arguments]
        print_table(table(("case", "", "figure", *names, "change"), rows, words=3))
    say(f"{found.compared} figures compared; {len(found.changes)} changed by more than noise and {SMALLEST:.0%}.")
    for line in found.unjudged:
        say(f"too few rounds to tell: {line}")
    for line in found.left_out:
        say(f"not compared: {line}")
