"""Whatever ends a run, and whatever becomes of its newest checkpoint: started again it ends with the bits of one undisturbed."""

import itertools
import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from resumable_worker import SAVE_EVERY

from pixel_jax.training.preemption import CODE

HERE = pathlib.Path(__file__).parent
STEPS = 9
KILLS = 50


def begin(directory, *moment, steps=STEPS):
    """One worker process."""
    paths = f"import sys; sys.path[:0] = {[str(HERE), str(HERE.parent.parent)]!r}; "
    arguments = [str(x) for x in (directory, directory / "weights.npz", steps, *moment)]
    code = paths + f"import resumable_worker; resumable_worker.main(*{arguments!r})"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start(directory, *moment, steps=STEPS):
    """(exit code, output) of one worker process."""
    process = begin(directory, *moment, steps=steps)
    said, _ = process.communicate(timeout=600)
    return process.returncode, said


def result(directory):
    """The weights a run ended with, and its metrics but for the times."""
    with np.load(directory / "weights.npz") as arrays:
        weights = [arrays[name].tobytes() for name in arrays.files]
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return weights, [{name: x for name, x in line.items() if "second" not in name} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    code, said = start(directory)
    assert code == 0, said
    return result(directory)


def finish(undisturbed, directory):
    """Lets the run end, and compares; what it said."""
    assert not (directory / "weights.npz").exists()
    code, said = start(directory)
    assert code == 0, said
    assert result(directory) == undisturbed
    return said


def newest(directory):
    """The newest checkpoint that is named as whole; None if there is none yet."""
    whole = [path for path in (directory / "checkpoints").glob("*") if path.name.isdigit()]
    return max(whole, key=lambda path: int(path.name), default=None)


def spoil(checkpoint, random):
    """One file of a checkpoint, cut, gone or (if its checksum is noted, which happens when it is written) changed."""
    noted = any(checkpoint.parent.with_name("checkpoints.checksums").glob(f"{checkpoint.name}.*.json"))
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
    path = files[random.integers(len(files))]
    content = bytearray(path.read_bytes())
    match random.integers(3 if noted else 2):
        case 0:
            path.write_bytes(content[: len(content) // 2])
        case 1:
            path.unlink()
        case 2:
            content[random.integers(len(content))] ^= 1 << int(random.integers(8))
            path.write_bytes(content)


def test_killed_between_and_in_a_save(undisturbed, tmp_path):
    for moment in (("next", SAVE_EVERY + 1), ("save", 2 * SAVE_EVERY, 0.02)):
        assert start(tmp_path, *moment)[0] == -signal.SIGKILL
    finish(undisturbed, tmp_path)


def test_told_to_go_then_damaged_then_out_of_space(undisturbed, tmp_path):
    code, said = start(tmp_path, "term", 5)
    assert code == CODE and "asked to stop; 5 of 9 steps are done and saved" in said and newest(tmp_path).name == "5"
    spoil(newest(tmp_path), np.random.default_rng(0))
    code, said = start(tmp_path, "full", 7)  # at step 4 again
    # Checkpoint 6 may still be on its way when the disk is full.
    found = re.search(r"checkpoint (\d) cannot be written to .* The newest whole one is (\d)", said)
    assert code == 1 and found and found.groups() in (("8", "6"), ("6", "4"), ("6", "2")), said
    assert "Checkpoint 5 is damaged" in said and "set aside" in said
    finish(undisturbed, tmp_path)


def test_a_run_that_waits_for_data_hears_that_it_is_to_go(undisturbed, tmp_path):
    for step, number in ((1, signal.SIGTERM), (3, signal.SIGINT)):
        process = begin(tmp_path, "stuck", step)
        said = ""
        while "waits\n" not in said:
            said += process.stdout.readline()
        process.send_signal(number)
        assert process.wait(300) == CODE
        assert f"asked to stop; {step} of 9 steps are done and saved" in process.stdout.read()
        assert newest(tmp_path).name == str(step)
    finish(undisturbed, tmp_path)


@pytest.mark.slow
def test_killed_fifty_times_at_random(tmp_path):
    """Every fifth time the newest checkpoint is spoiled as well. A run needs many lives; one that ends all the same, because
    the machine has become faster, is followed by another."""
    steps, random, kills, spoiled, said = 240, np.random.default_rng(0), 0, 0, ""
    (tmp_path / "undisturbed").mkdir()
    began = time.monotonic()
    assert start(tmp_path / "undisturbed", steps=steps)[0] == 0
    # A save takes most of it. A life that ended sooner, on a busy machine, would never leave a checkpoint.
    longest = (time.monotonic() - began) / (steps // SAVE_EVERY)
    runs = (tmp_path / f"killed_{i}" for i in itertools.count())
    directory = next(runs)
    directory.mkdir()
    while kills < KILLS:
        last = newest(directory)
        reached = int(last.name) if last else 0
        moment = ("next", min(reached + random.integers(0, 4), steps - 2), random.uniform(0, longest))
        if random.random() < 0.5:
            moment = ("save", reached + 1, random.uniform(0, longest))
        code, words = start(directory, *moment, steps=steps)
        said += words
        if code == 0:
            assert result(directory) == result(tmp_path / "undisturbed")
            directory = next(runs)
            directory.mkdir()
            continue
        assert code == -signal.SIGKILL, (moment, code, words)
        kills += 1
        last = newest(directory)
        if kills % 5 == 0 and last and int(last.name) > SAVE_EVERY:
            spoil(last, random)
            spoiled += 1
    code, words = start(directory, steps=steps)
    assert code == 0, words
    assert result(directory) == result(tmp_path / "undisturbed")
    assert spoiled > 3 and (said + words).count("is set aside") >= 1, spoiled
