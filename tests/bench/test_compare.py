"""What changed between two records: figures beyond their noise, no others, and nothing is passed over."""

import copy
import json
import pathlib

import numpy as np
import pytest

from pixel_jax.bench import compare
from pixel_jax.bench.compare import Change, median
from pixel_jax.bench.timing import quartiles
from pixel_jax.cli import UserError

RECORD = json.loads((pathlib.Path(__file__).parents[2] / "docs" / "bench.json").read_text())


def record(**seconds) -> dict:
    """A record of a case of alternatives with these times; the first is ours."""
    ours = next(iter(seconds.values()))
    alternatives = {}
    for name, times in seconds.items():
        low, middle, high = quartiles(list(times))
        ratio_low, ratio, ratio_high = quartiles([a / b for a, b in zip(times, ours, strict=True)])
        alternatives[name] = {"seconds": middle, "low": low, "high": high, "rounds": len(times), "peak_bytes": 10**9}
        alternatives[name] |= {"ratio": ratio, "ratio_low": ratio_low, "ratio_high": ratio_high}
        alternatives[name] |= {"compilations": 1, "recompilations": 0}
    machine = {"device": "a", "devices": 1, "cores": 2, "versions": {}, "matmul": 1e9, "read": 1e9}
    return {"machine": machine, "cases": {"case": {"shapes": "?", "alternatives": alternatives}}}


def test_the_interval_of_a_median_is_that_of_a_notched_box_plot():
    cbook = pytest.importorskip("matplotlib.cbook")
    for count in (4, 5, 12, 31):
        times = np.random.default_rng(count).lognormal(size=count)
        low, middle, high = quartiles(times.tolist())
        expected = cbook.boxplot_stats(times)[0]
        found = median(middle, low, high, count)
        assert found[:3] == pytest.approx((expected["med"], expected["cilo"], expected["cihi"]))


def test_a_record_has_not_changed_from_itself():
    found = compare.compare(RECORD, RECORD)
    assert found.changes == found.unjudged == found.left_out == [] and found.compared > 100
    assert compare.machines(RECORD, RECORD) == []


def test_noise_is_no_change_and_a_change_is():
    """Of a hundred pairs of records of the same program, few differ; of one that takes a third more, all."""
    random, false, found = np.random.default_rng(0), 0, 0
    for _ in range(100):
        first, second = (1 + 0.1 * random.standard_normal(15) for _ in range(2))
        false += bool(compare.compare(record(ours=first), record(ours=second)).changes)
        found += bool(compare.compare(record(ours=first), record(ours=second * 4 / 3)).changes)
    assert false < 10 and found == 100


def test_what_changed_is_named():
    before = record(ours=[1.0, 1.1, 1.2, 1.3], theirs=[2.0, 2.2, 2.4, 2.6])
    after = record(ours=[1.0, 1.1, 1.2, 1.3], theirs=[4.0, 4.4, 4.8, 5.2])
    alternatives = after["cases"]["case"]["alternatives"]
    alternatives["ours"] |= {"recompilations": 1, "peak_bytes": 2 * 10**9}
    alternatives["theirs"]["peak_bytes"] += 10**6  # noise
    assert compare.compare(before, after).changes == [
        Change("case", "ours", "MB of memory", 1000.0, 2000.0),
        Change("case", "ours", "recompilations", 0, 1),
        Change("case", "theirs", "seconds", pytest.approx(2.3), pytest.approx(4.6)),
        Change("case", "theirs", "times ours", pytest.approx(2.0), pytest.approx(4.0)),
    ]


def test_what_cannot_be_compared_is_said():
    before = record(ours=[1.0, 1.0], theirs=[2.0, 2.0])
    after = copy.deepcopy(record(ours=[3.0, 3.0], others=[2.0, 2.0]))
    after["cases"]["newer"] = after["cases"]["case"]
    before["cases"]["longer"] = {**before["cases"]["case"], "shapes": "!"}
    after["cases"]["longer"] = after["cases"]["case"]
    after["cases"]["case"]["alternatives"]["ours"]["peak_bytes"] = None
    after["machine"] |= {"cores": 4, "read": 2e9}
    found = compare.compare(before, after)
    assert not found.changes and found.unjudged == ["case, ours: 1 and 3 seconds"]
    assert found.left_out == [
        "case, ours: MB of memory is only in the first",
        "case: theirs is only in the first",
        "case: others is only in the second",
        "case longer: other work, '!' and '?'",
        "case newer is only in the second",
    ]
    assert compare.machines(before, after) == [
        "the machines differ: cores 2 and 4",
        "the machine's speed differs: read 1 and 2 GB/s; seconds follow, times ours hardly",
    ]


def test_the_command(tmp_path, capsys):
    names = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for name, times in zip(names, ([1.0, 1.1, 1.2, 1.3], [2.0, 2.2, 2.4, 2.6]), strict=True):
        pathlib.Path(name).write_text(json.dumps(record(ours=times)))
    compare.main(names)
    said = capsys.readouterr().out
    assert "a.json" in said and "2.00x" in said and "4 figures compared; 1 changed by more than noise and 5%." in said
    with pytest.raises(UserError, match="compare needs two records"):
        compare.main(names[:1])
    pathlib.Path(names[0]).write_text("[]")
    with pytest.raises(UserError, match="a.json is no record of `bench`"):
        compare.main(names)
    pathlib.Path(names[0]).write_text('{"cases": {"case": {}}, "machine": {}}')
    with pytest.raises(UserError, match="'shapes'.*measure again"):
        compare.main(names)
