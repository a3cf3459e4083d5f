"""Processes that JAX joins compute what one computes; they are told to go together, and none waits for a dead one."""

import json
import pathlib
import signal

import fleet
import numpy as np
import pytest
import shared_worker

from pixel_jax.parallel.processes import LOST
from pixel_jax.training.preemption import CODE
from pixel_jax.training.writers import read_metrics

WORKER = pathlib.Path(shared_worker.__file__)
GO_ON = """
import sys
import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from pixel_jax.parallel import make_mesh
from pixel_jax.parallel.processes import fail_together, initialize
from pixel_jax.training.checkpoint import Checkpoints
initialize()
place = NamedSharding(make_mesh({"fsdp": 2}), PartitionSpec("fsdp"))
def state(value):
    array = jax.make_array_from_callback((2000,), place, lambda index: value * np.arange(2000)[index])
    return {"x": nnx.Param(array, axes=("embed",))}
with fail_together(), Checkpoints(sys.argv[1]) as checkpoints:
    if checkpoints.latest is None:
        print("begins")
        for step in (2, 4):
            checkpoints.save(step, state(step))
    else:
        found = checkpoints.restore(state(0), mesh=place.mesh)
        x = np.asarray(found.state["x"][...].addressable_shards[0].data)
        print("goes on from", found.step, "with", x[1] - x[0])
"""


def start(count, directory, **settings):
    directory.mkdir(exist_ok=True)
    return fleet.start(count, WORKER, directory, json.dumps(settings))


def assert_same_run(one, several, directories):
    """Weights, and the numbers of every step, to 1e-5."""
    for a, b in zip(one, several, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    first, second = (read_metrics(directory / "metrics.jsonl") for directory in directories)
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in (name for name in a if "second" not in name):
            loose = 10 if name == "grad_norm" else 1  # which is what the weights' differences come from
            np.testing.assert_allclose(a[name], b[name], rtol=loose * 1e-5, atol=1e-5, err_msg=name)


def compare(tmp_path, count, **settings):
    fleet.expect(start(count, tmp_path / "several", **settings))
    alone = {name: value for name, value in settings.items() if "mesh" not in name}
    one = shared_worker.work(tmp_path / "one", **alone)
    assert_same_run(one, fleet.weights(tmp_path / "several"), (tmp_path / "one", tmp_path / "several"))


@pytest.mark.slow
def test_reinforcement_learning_by_two_processes_is_that_by_one(tmp_path):
    compare(tmp_path, 2, phase="rl", mesh={"data": 2}, steps=2)
    lines = read_metrics(tmp_path / "several" / "metrics.jsonl")
    assert sum(line["updates"] for line in lines) > 0
    assert all(0 < line["seconds_operations"] for line in lines)


def test_one_is_told_to_go_all_save_themselves_and_one_goes_on_alone(tmp_path):
    """Tuning by two processes, until the second gets SIGTERM; the rest by one, from the checkpoint of both."""
    event = {"signal": int(signal.SIGTERM), "victim": 1, "batch": 2}
    ended = fleet.wait(start(2, tmp_path / "several", mesh={"data": 2}, steps=12, **event))
    assert [code for code, _ in ended] == [CODE, CODE], ended
    assert "are done and saved" in ended[0][1] and 1 < len(read_metrics(tmp_path / "several" / "metrics.jsonl")) < 12
    several = shared_worker.work(tmp_path / "several", steps=12)
    one = shared_worker.work(tmp_path / "one", steps=12)
    assert_same_run(one, several, (tmp_path / "one", tmp_path / "several"))


@pytest.mark.slow
@pytest.mark.parametrize("count, number, code", [(2, signal.SIGTERM, CODE), (1, signal.SIGKILL, -signal.SIGKILL)])
def test_reinforcement_learning_goes_on_as_if_nothing_had_been(tmp_path, count, number, code):
    """With the same bits. The signal comes just before the second rollout: its iteration is given up by all, or lost."""
    settings = {"phase": "rl", "mesh": {"data": count}, "steps": 3}
    fleet.expect(start(count, tmp_path / "whole", **settings))
    event = {"signal": int(number), "victim": count - 1, "batch": 1}
    ended = fleet.wait(start(count, tmp_path / "parts", **settings, **event), 1200)
    assert [found for found, _ in ended] == [code] * count, ended
    assert code != CODE or "1 of 3 steps are done and saved" in ended[0][1]
    fleet.expect(start(count, tmp_path / "parts", **settings))
    for a, b in zip(fleet.weights(tmp_path / "whole"), fleet.weights(tmp_path / "parts"), strict=True):
        np.testing.assert_array_equal(a, b)
    whole, parts = (
        [{name: x for name, x in line.items() if "second" not in name} for line in read_metrics(path / "metrics.jsonl")]
        for path in (tmp_path / "whole", tmp_path / "parts")
    )
    assert whole == parts and len(whole) == 3


@pytest.mark.slow
def test_when_one_dies_the_others_say_so_and_end(tmp_path):
    event = {"signal": int(signal.SIGKILL), "victim": 1, "batch": 1}
    (code, said), (killed, _) = fleet.wait(start(2, tmp_path, mesh={"data": 2}, steps=12, **event))
    assert killed == -signal.SIGKILL and code == LOST
    assert "process 0 of 2 ends" in said and "most likely because one of them died" in said


@pytest.mark.slow
def test_when_one_dies_and_no_collective_tells_jax_aborts_the_others(tmp_path):
    script = tmp_path / "apart.py"
    lines = [
        "import os, signal, time",
        "from pixel_jax.parallel.processes import barrier, fail_together, initialize, is_main_process",
    ]
    lines += ["initialize(heartbeat=10)", "with fail_together():", "    barrier('here')"]
    lines += ["    time.sleep(100) if is_main_process() else os.kill(os.getpid(), signal.SIGKILL)"]
    script.write_text("\n".join(lines))
    ended = fleet.wait(fleet.start(2, script))
    assert [code for code, _ in ended] == [-signal.SIGABRT, -signal.SIGKILL], ended


def in_pools(directory, phase="pools", **settings):
    directory.mkdir(exist_ok=True)
    return fleet.start(2, WORKER, directory, json.dumps({"phase": phase, "steps": 3, **settings}), devices=4)


@pytest.mark.slow
def test_one_process_trains_while_another_rolls_out_ahead(tmp_path):
    """As one process does, to rounding; also when the one that rolls out is asked to stop, and both are started again."""
    settings = {"pools": "apart"}
    one = shared_worker.work(tmp_path / "one", "ahead", steps=3, **settings)
    event = {"signal": int(signal.SIGTERM), "victim": 1, "batch": 2}
    ended = fleet.wait(in_pools(tmp_path / "several", "ahead", **settings, **event), 600)
    assert [code for code, _ in ended] == [CODE] * 2, ended
    fleet.expect(in_pools(tmp_path / "several", "ahead", **settings))
    assert_same_run(one, fleet.weights(tmp_path / "several"), (tmp_path / "one", tmp_path / "several"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "pools, settings",
    [
        ("apart", {"staleness": 1, "lora": True}),
        ("apart", {"staleness": 1, "tokens": 14}),
        ("beside", {"staleness": 1}),
        ("beside", {"staleness": 1, "tokens": 14}),
        ("together", {"tokens": 14}),
    ],
)
def test_rows_written_ahead_or_carried_over_by_two_processes_are_those_of_one(tmp_path, pools, settings):
    """To rounding: sums over the devices of a process are formed in another order where there are several processes."""
    fleet.expect(in_pools(tmp_path / "several", pools=pools, **settings))
    one = shared_worker.work(tmp_path / "one", "pools", pools=pools, steps=3, **settings)
    assert_same_run(one, fleet.weights(tmp_path / "several"), (tmp_path / "one", tmp_path / "several"))
    lines = read_metrics(tmp_path / "several" / "metrics.jsonl")
    if "staleness" in settings:
        assert all(
            {"seconds_waiting", "rollouts_seconds_rollout", "rollouts_seconds_waiting"} <= x.keys() for x in lines
        )
    if "tokens" in settings:
        assert max(line["rows_carried"] for line in lines) > 0


@pytest.mark.slow
@pytest.mark.parametrize("pools, victim", [("apart", 0), ("apart", 1), ("beside", 1)])
def test_pools_of_two_processes_go_on_as_if_nothing_had_been(tmp_path, pools, victim):
    """One process is killed, or asked to stop, when it asks for questions: rows written ahead and carried over are saved."""
    settings = {"pools": pools, "staleness": 1, "tokens": 14}
    fleet.expect(in_pools(tmp_path / "whole", **settings))
    event = {"victim": victim, "batch": 2}
    killed = fleet.wait(in_pools(tmp_path / "parts", **settings, signal=int(signal.SIGKILL), **event), 600)
    assert killed[victim][0] == -signal.SIGKILL and killed[1 - victim][0] in (LOST, -signal.SIGABRT), killed
    told = fleet.wait(in_pools(tmp_path / "parts", **settings, signal=int(signal.SIGTERM), **event), 600)
    assert [code for code, _ in told] == [CODE] * 2, told
    fleet.expect(in_pools(tmp_path / "parts", **settings))
    for a, b in zip(fleet.weights(tmp_path / "whole"), fleet.weights(tmp_path / "parts"), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 2}, {"fsdp": 2, "tensor": 2}, {"data": 2, "sequence": 2}])
def test_tuning_by_four_processes_is_that_by_one(tmp_path, mesh):
    """Also where two processes have the same rows."""
    compare(tmp_path, 4, phase="sft", mesh=mesh)


@pytest.mark.slow
def test_reinforcement_learning_by_four_processes_is_that_by_one(tmp_path):
    compare(tmp_path, 4, phase="rl", mesh={"data": 2, "fsdp": 2}, rollout_mesh={"data": 4}, steps=3)


@pytest.mark.parametrize("count", [1, 2])
def test_on_cpus_several_processes_keep_no_compiled_programs(tmp_path, count):
    """Reinforcement learning by four, with programs read from a cache, ended in collectives that did not match."""
    script = tmp_path / "kept.py"
    lines = ["import jax", "from pixel_jax.parallel.processes import initialize", "initialize()"]
    script.write_text("\n".join([*lines, "print('kept', jax.config.jax_enable_compilation_cache)"]))
    ended = fleet.wait(fleet.start(count, script))
    assert all(code == 0 and f"kept {count == 1}" in said for code, said in ended), ended


@pytest.mark.slow
def test_processes_meet_however_far_apart(tmp_path):
    """A collective of gloo's gives up after 30 seconds."""
    script = tmp_path / "late.py"
    lines = [
        "import time",
        "from pixel_jax.parallel.processes import barrier, initialize, is_main_process",
        "initialize()",
    ]
    lines += ["time.sleep(0 if is_main_process() else 35)", "barrier('here')", "print('met')"]
    script.write_text("\n".join(lines))
    ended = fleet.wait(fleet.start(2, script))
    assert [code for code, _ in ended] == [0, 0] and all("met" in said for _, said in ended), ended


@pytest.mark.parametrize(
    "noted, torn",
    [
        # Killed before they noted their files. The second alone reads these:
        ([], "state/ocdbt.process_1/d/*"),
        ([0], "state/ocdbt.process_1/d/*"),
        # Both read this one, the second alone looks at its checksum.
        ([0, 1], "host/1.json"),
    ],
)
def test_a_torn_checkpoint_is_got_past_though_one_process_alone_sees_it(tmp_path, noted, torn):
    script, directory = tmp_path / "go_on.py", tmp_path / "checkpoints"
    script.write_text(GO_ON)
    ended = fleet.wait(fleet.start(2, script, directory))
    assert [code for code, _ in ended] == [0, 0] and all("begins" in said for _, said in ended), ended
    for process in {0, 1} - set(noted):
        (tmp_path / "checkpoints.checksums" / f"4.{process}.json").unlink()
    for path in (directory / "4").glob(torn):
        path.write_bytes(path.read_bytes()[:-100])
    ended = fleet.wait(fleet.start(2, script, directory))
    assert [code for code, _ in ended] == [0, 0] and all("goes on from 2 with 2" in said for _, said in ended), ended
    assert "Checkpoint 4 is damaged" in ended[0][1] and "It is set aside" in ended[0][1]
