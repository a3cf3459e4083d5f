"""Ctrl-C, in real processes: one line, no traceback, wherever the program is."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

from pixel_jax.signals import INTERRUPTED

ROOT = pathlib.Path(__file__).parent.parent
PLACES = {
    "a loop": "while True: pass",
    "a lock": "import threading; threading.Lock().acquire() and threading.Event().wait()",
    "compiled code": "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)",
    "a destructor": "\nclass A:\n  def __del__(self): time.sleep(600)\nA()",
    "the end, with a thread that waits": "import threading; threading.Thread(target=time.sleep, args=(600,)).start()",
    "a handler of all exceptions": "\nwhile True:\n  try: time.sleep(600)\n  except BaseException: pass",
}


def start(code, place):
    words = f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from pixel_jax.signals import SIGNALS; {code}"
    process = subprocess.Popen(
        [
            sys.executable,
            "-Wignore",
            "-c",
            f"{words}; print('kept', end=''); print('ready', file=sys.stderr, flush=True)\n{place}",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr.readline() == "ready\n"
    time.sleep(0.1)
    return process


@pytest.mark.parametrize("place", PLACES)
def test_the_first_one_ends_a_command(place):
    process = start("SIGNALS.listen('pixel-jax eval')", PLACES[place])
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=30)
    assert process.returncode == INTERRUPTED and error == "pixel-jax eval: interrupted\n" and out == "kept"


def test_commands_listen():
    """Wherever a command is: the module's own code stands for it."""
    work = "lambda *words: print('kept', end='') or print('works', file=sys.stderr, flush=True) or time.sleep(600)"
    code = f"from pixel_jax import cli, view; view.main = {work}; sys.argv = ['pixel-jax', 'view', 'a.json']"
    process = start(code, "cli.main()")
    assert process.stderr.readline() == "works\n"
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=30)
    assert process.returncode == INTERRUPTED and error == "pixel-jax view: interrupted\n" and out == "keptkept"


@pytest.mark.parametrize("place", ["compiled code", "a handler of all exceptions"])
def test_the_second_one_ends_a_run_that_saves_first(place):
    process = start("SIGNALS.listen('pixel-jax sft'); SIGNALS.save_first()", PLACES[place])
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n" and "It saves and ends; Ctrl-C again" in process.stderr.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=30)
    assert process.returncode == INTERRUPTED and error == "pixel-jax sft: interrupted\n" and out == "kept"


@pytest.mark.parametrize(
    ("work", "code", "said"),
    [("print('!')", 0, ""), ("sys.exit(42)", 42, ""), ("sys.exit('no')", 1, "no\n"), ("1 / 0", 1, "ZeroDivisionError")],
)
def test_a_program_ends_although_a_thread_waits(work, code, said):
    waits = "import atexit, threading; threading.Thread(target=threading.Event().wait).start()"
    tidies = "atexit.register(lambda: print('tidied'))"
    process = start("from pixel_jax.signals import leaving", f"{waits}\n{tidies}\nwith leaving(): {work}")
    out, error = process.communicate(timeout=30)
    assert process.returncode == code and said in error and out.startswith("kept") and out.endswith("tidied\n")


def test_what_has_to_be_tidied_up_is():
    code = "SIGNALS.listen('x'); tidy = SIGNALS.at_end(lambda: print('tidied', file=sys.stderr)); tidy.__enter__()"
    process = start(code, PLACES["a lock"])
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "tidied\nx: interrupted\n"


def test_a_forked_child_is_not_heard_twice():
    code = (
        "import os; SIGNALS.listen('x'); SIGNALS.save_first(); child = os.fork(); child or (time.sleep(1), os._exit(0))"
    )
    process = start(
        code, "time.sleep(0.3); os.kill(child, 2); os.waitpid(child, 0); print(SIGNALS.requested, file=sys.stderr)"
    )
    assert process.communicate(timeout=30)[1] == "False\n"


def test_one_stops_what_is_stoppable_and_the_next_ends_the_command():
    code = """
SIGNALS.listen("pixel-jax chat")
for _ in range(2):
    with SIGNALS.stoppable("It is stopped."):
        print("works", file=sys.stderr, flush=True)
        while not SIGNALS.requested: time.sleep(0.01)
        time.sleep(0.2)
    assert not SIGNALS.requested
print("goes on", file=sys.stderr, flush=True)
time.sleep(600)
"""
    process = start("pass", code)
    for _ in range(2):
        assert process.stderr.readline() == "works\n"
        process.send_signal(signal.SIGINT)
        assert [process.stderr.readline() for _ in range(2)] == ["\n", "It is stopped.\n"]
    assert process.stderr.readline() == "goes on\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == INTERRUPTED and error == "pixel-jax chat: interrupted\n"
