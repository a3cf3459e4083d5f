"""One run at a time in a directory, and no lock that a person has to take away."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from pixel_jax import run_lock
from pixel_jax.run_lock import LOCK, Holder, LockError, hold

ROOT = pathlib.Path(__file__).parent.parent
HOLDS = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pixel_jax import run_lock
run_lock.BEAT = 0.05
with run_lock.hold(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def other(directory):
    """Another process that has the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(directory)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def leave(directory, **fields):
    """A lock as some process has left it; by default one of this very process."""
    directory.mkdir(exist_ok=True)
    (directory / LOCK).write_text(json.dumps(Holder.me()._replace(**fields)._asdict()))


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(run_lock, "SILENCE", 0.3)
    monkeypatch.setattr(run_lock, "LOOK", 0.02)


def test_one_run_at_a_time(tmp_path):
    with hold(tmp_path / "new"):
        assert json.loads((tmp_path / "new" / LOCK).read_text())["pid"] == os.getpid()
        with pytest.raises(LockError, match=f"in use by process {os.getpid()} on .*choose another directory"):
            with hold(tmp_path / "new"):
                pass
        with hold(tmp_path / "new", first=False):  # of several processes of one run, the first has it
            pass
    assert not (tmp_path / "new" / LOCK).exists()
    with hold(tmp_path / "new"):
        pass


def test_a_dead_process_has_no_lock(tmp_path, capsys):
    with other(tmp_path) as process:
        with pytest.raises(LockError, match=f"process {process.pid} "), hold(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet waited for by its parent
        began = time.monotonic()
        with hold(tmp_path):
            assert time.monotonic() - began < 5
    assert f"was in use by process {process.pid}" in capsys.readouterr().err


def test_a_pid_that_was_given_again(tmp_path, capsys):
    leave(tmp_path, started="1")
    with hold(tmp_path):
        pass
    assert "which has ended: its lock is taken over" in capsys.readouterr().err


@pytest.mark.parametrize("fields", [{"host": "elsewhere"}, {"space": "another container"}])
def test_of_another_machine_only_silence_tells(fields, tmp_path, capsys, impatient):
    leave(tmp_path, **fields)
    began = time.monotonic()
    with hold(tmp_path):
        assert time.monotonic() - began >= 0.3
    said = capsys.readouterr().err
    assert "if that gives no sign for 0 s, its lock is taken over" in said and "has given no sign" in said


def test_a_heartbeat_of_another_machine_is_heard(tmp_path, impatient):
    leave(tmp_path, host="elsewhere")
    beat = threading.Timer(0.1, os.utime, [tmp_path / LOCK])
    beat.start()
    with pytest.raises(LockError, match=f"in use by process {os.getpid()} on elsewhere"), hold(tmp_path):
        pass
    beat.join()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"host": 1, "space": "", "pid": 1, "started": "", "token": ""}']
)
def test_a_lock_that_cannot_be_read_does_not_block_for_ever(content, tmp_path, capsys, impatient):
    (tmp_path / LOCK).write_bytes(content)
    with hold(tmp_path):
        pass
    assert "a process that its lock does not name" in capsys.readouterr().err


def test_of_many_that_take_over_one_succeeds(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "LOOK", 0.02)
    for _ in range(20):
        leave(tmp_path, started="1")
        together, inside, most = threading.Barrier(4), [], []

        def take():
            together.wait()  # noqa: B023
            with contextlib.suppress(LockError), hold(tmp_path):
                inside.append(1)  # noqa: B023
                time.sleep(0.05)
                most.append(len(inside))  # noqa: B023
                inside.pop()  # noqa: B023

        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(most) == {1} and not list(tmp_path.iterdir())


def test_who_loses_the_lock_while_it_stands_still_ends(tmp_path):
    with other(tmp_path) as process:
        beats = set()
        while len(beats) < 3:
            beats.add((tmp_path / LOCK).stat().st_mtime_ns)
        process.send_signal(signal.SIGSTOP)
        leave(tmp_path, host="elsewhere")
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 1
        assert "was taken over by another run" in process.stderr.read()
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "elsewhere"
