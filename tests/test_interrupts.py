"""Ctrl-C at random moments of the commands: nothing is lost, nothing hangs, and nobody sees a traceback."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from pixel_jax.signals import INTERRUPTED
from pixel_jax.training.preemption import CODE
from tests.rollouts import scripted_model
from tests.test_cli import CONFIG, ENVIRONMENT, ROOT, model  # noqa: F401

INTERRUPTS = 20
STEPS = 60
HUNG = """
import threading
from pixel_jax.data.example import Example
Example.query = lambda example: print("waits", flush=True) or threading.Event().wait()
"""


@pytest.fixture(scope="module")
def place(model, tmp_path_factory):  # noqa: F811
    """A directory with traces and a config for one device."""
    folder = tmp_path_factory.mktemp("interrupts")
    limits = json.loads((model / "rollout.json").read_text())
    limits = {name: value for name, value in limits.items() if value is not None}
    config = CONFIG.format(own_data=str(ROOT / "configs/pixel/own_data.py"), limits=limits)
    (folder / "config.py").write_text(config.replace("return config", "config.mesh = {}\n    return config"))
    call = scripted_model.CROP + "0.05, 0.11, 0.71, 0.82" + '], "target_image": 1' + scripted_model.CLOSE
    lines = []
    for i in range(6):
        Image.fromarray(scripted_model.image(i, 120, 150)).save(folder / f"{i}.png")
        turns = [call, "\\boxed{7}"]
        lines.append({"question": "Which digit?", "images": [f"{i}.png"], "answer": "7", "turns": turns})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def begin(place, model, out, *, before=""):  # noqa: F811
    """`pixel-jax sft` in a process of its own, after the Python code `before`."""
    paths = {"config": place / "config.py", "config.model": model, "config.data": place / "data.jsonl"}
    settings = {"out": out, "sft.steps": STEPS, "sft.save_every": 10}
    flags = [f"--{name}={x}" for name, x in paths.items()] + [f"--config.{name}={x}" for name, x in settings.items()]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{before}\nfrom pixel_jax.cli import main; main()"
    environment = {**ENVIRONMENT, "JAX_COMPILATION_CACHE_DIR": str(place / "compiled")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(
        [sys.executable, "-c", code, "sft", *flags],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def weights(out: pathlib.Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_interrupted_at_twenty_random_moments(place, model, tmp_path):  # noqa: F811
    def finish(out):
        process = begin(place, model, out)
        said, _ = process.communicate(timeout=900)
        assert process.returncode == 0, said

    finish(tmp_path / "whole")
    began = time.monotonic()
    finish(tmp_path / "again")
    longest, random = time.monotonic() - began, np.random.default_rng(0)
    assert weights(tmp_path / "again") == weights(tmp_path / "whole")
    codes, runs = [], 0
    while len(codes) < INTERRUPTS:
        process = begin(place, model, tmp_path / f"run-{runs}")
        # Python itself has to have started, and to have come to our code.
        time.sleep(random.uniform(min(1.5, longest / 10), longest))
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=300)
        codes.append(process.returncode)
        assert process.returncode in (0, CODE, INTERRUPTED) and "Traceback" not in said, said
        if process.returncode == 0:
            assert weights(tmp_path / f"run-{runs}") == weights(tmp_path / "whole")
            runs += 1
    finish(tmp_path / f"run-{runs}")
    assert weights(tmp_path / f"run-{runs}") == weights(tmp_path / "whole")
    print(
        f"{len(codes)} interrupts: {codes.count(CODE)} saved, {codes.count(INTERRUPTED)} before there was anything to save"
    )
    assert codes.count(CODE) > 3


@pytest.mark.slow
@pytest.mark.parametrize(("number", "times", "code"), [(signal.SIGTERM, 1, CODE), (signal.SIGINT, 2, INTERRUPTED)])
def test_a_picture_that_never_comes(number, times, code, place, model, tmp_path):  # noqa: F811
    """Grain's threads wait for ever, and neither the step nor the end of the process does."""
    process = begin(place, model, tmp_path / "run", before=HUNG)
    said = ""
    while "waits\n" not in said:
        said += process.stdout.readline()
    for _ in range(times):
        time.sleep(0.02)
        process.send_signal(number)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode in {code, CODE} and "Traceback" not in said + rest
    assert ("asked to stop; 0 of 60 steps are done and saved" in rest) is (process.returncode == CODE)
