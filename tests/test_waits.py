"""What a person sees while a command works: one line on a terminal, plain lines elsewhere, nothing with --quiet."""

import json
import os
import pty
import re
import subprocess
import sys

import pytest
from PIL import Image

from tests.rollouts import scripted_model
from tests.test_cli import ENVIRONMENT, ROOT

# A wait is said at once, not only after two seconds: else what is seen would hang on the machine.
PROGRAM = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pixel_jax import terminal
terminal.Waiting.__init__.__kwdefaults__["after"] = 0.0
from pixel_jax.cli import main
main()
"""


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """A file of seeds, for `pixel-jax synth` with fixed sentences: a command that waits for something and compiles nothing."""
    folder = tmp_path_factory.mktemp("seeds")
    Image.fromarray(scripted_model.image(0, 120, 150)).save(folder / "a.png")
    seed = {"question": "Which digit?", "images": ["a.png"], "answer": "7", "cue": "the card", "box": [10, 10, 60, 60]}
    lines = [json.dumps({"id": str(i), **seed}) for i in range(3)]
    (folder / "seeds.jsonl").write_text("\n".join(lines))
    return folder / "seeds.jsonl"


def arguments(seeds, out, *more):
    line = ["synth", "--config=configs/pixel/synth.py", f"--config.seeds={seeds}", f"--config.out={out}", *more]
    return [sys.executable, "-c", PROGRAM, *line]


def on_a_terminal(line):
    """What a command writes where standard output and error are one terminal."""
    here, there = pty.openpty()
    with subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdin=there, stdout=there, stderr=there) as process:
        os.close(there)
        said = b""
        while True:
            try:
                said += os.read(here, 65536)
            except OSError:  # Linux: the other end is closed
                break
        os.close(here)
    assert process.returncode == 0, said
    return said.decode().replace("\r\n", "\n")


def test_on_a_terminal_it_is_one_line_that_goes(seeds, tmp_path):
    said = on_a_terminal(arguments(seeds, tmp_path / "out"))
    passing = re.findall(r"\r\x1b\[K([^\r\n]+)", said)
    assert any(re.fullmatch(r"starting \.\.\. \d+ s", line) for line in passing), said
    # What stays: the last state of the progress, and the results.
    stays = [line.rsplit("\r\x1b[K", 1)[-1] for line in said.split("\n")]
    assert not [line for line in stays if "..." in line]
    assert [line for line in stays if line.startswith("seeds 3/3  0:00 left")]
    assert any("The traces are in" in line for line in stays)


def test_elsewhere_it_is_plain_lines_on_standard_error(seeds, tmp_path):
    found = subprocess.run(
        arguments(seeds, tmp_path / "out"), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    said = found.stderr.splitlines()
    waits = ["reading the seeds", "making digests of the pictures", "the first of 3 seeds"]
    assert [said.index(f"{name} ...") for name in waits] == sorted(said.index(f"{name} ...") for name in waits)
    assert "starting ..." not in said  # which helps a person alone
    assert "\x1b" not in found.stderr + found.stdout and "\r" not in found.stderr + found.stdout
    assert "seeds 3/3" in found.stderr and "..." not in found.stdout and "seeds 3/3" not in found.stdout
    assert "3 traces of 3 seeds" in found.stdout
    quiet = subprocess.run(
        arguments(seeds, tmp_path / "quiet", "--quiet"), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (quiet.returncode, quiet.stderr) == (0, "")
    assert quiet.stdout == found.stdout.replace(str(tmp_path / "out"), str(tmp_path / "quiet"))
