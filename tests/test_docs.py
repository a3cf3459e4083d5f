"""What the pages name is there: modules and their names, files, commands, flags, and settings of configs."""

import importlib.util
import itertools
import pathlib
import re
import typing

import pytest
from absl import flags

import pixel_jax.cli
import unlearn_jax.cli
from pixel_jax.settings import settings
from tests.conftest import PARTS, part_of

ROOT = pathlib.Path(__file__).parents[1]
INSTALLED = pathlib.Path(pixel_jax.cli.__file__).parents[
    1
]  # the packages may be installed, without their sources beside the tests
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = {"pixel-jax": pixel_jax.cli.COMMANDS, "unlearn-jax": unlearn_jax.cli.COMMANDS}

IMPORT = r"from ((?:pixel_jax|unlearn_jax)[\w.]*) import ([\w, ]+)"

# Of other programs and of scripts, which declare no flags of absl.
OTHER_FLAGS = {
    "quiet": "pixel_jax/cli.py",
    "all": "tests/conftest.py",
    "part": "tests/conftest.py",
    "dry-run": "launch/gke.sh",
    "nodes": "launch/slurm.sh",
    "rows": "pixel_jax/bench/host_memory.py",
    "batch": "pixel_jax/bench/host_memory.py",
    "phase": "pixel_jax/bench/host_memory.py",
    "seeds": "tests/unlearn/smollm2.py",
    "photographs": "pixel_jax/search_set/__main__.py",
    "tiers": "pixel_jax/search_set/__main__.py",
}


def code(page: pathlib.Path) -> list[str]:
    """The code of a page: fenced lines, those that a backslash continues joined, and spans in backticks."""
    text = page.read_text()
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    lines += [
        f"{module}.{name.strip()}" for module, many in re.findall(IMPORT, "\n".join(lines)) for name in many.split(",")
    ]
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    return lines + [" ".join(span.split()) for span in spans]


def names(pattern: str) -> list:
    """A test case for each page and each match of the pattern in its code."""
    found = {(page.name, match) for page in PAGES for line in code(page) for match in re.findall(pattern, line)}
    return sorted(found)


def braces(name: str) -> list[str]:
    """`a/{b,c}` as the shell expands it."""
    parts = [part[1:-1].split(",") if part.startswith("{") else [part] for part in re.split(r"(\{[^}]*\})", name)]
    return ["".join(choice) for choice in itertools.product(*parts)]


@pytest.fixture(scope="module")
def declared() -> dict[tuple[str, str], set[str]]:
    """The flags of each command."""
    found = {}
    for program, commands in COMMANDS.items():
        for command, (module, _) in commands.items():
            before = set(flags.FLAGS)
            importlib.import_module(module).define_flags(command)
            new = set(flags.FLAGS) - before
            for name in new:
                delattr(flags.FLAGS, name)
            found[program, command] = new | {f"no{name}" for name in new} | {"help", "traceback"}
    return found


def keys(module_name: str) -> set[str]:
    """The settings of a command's config and its sections, dotted."""
    module = importlib.import_module(module_name)
    classes = [module.SETTINGS] if hasattr(module, "SETTINGS") else []
    classes += [task.config for task in getattr(module, "TASKS", {}).values()]
    found = set()
    for where, _, name in (text.partition(":") for text in classes):
        found |= {setting.key for setting in settings(getattr(importlib.import_module(where), name))}
    return {".".join(key.split(".")[:size]) for key in found for size in range(2, key.count(".") + 2)}


@pytest.mark.parametrize(("page", "name"), names(r"\b(?<![\w./-])((?:pixel_jax|unlearn_jax)(?:\.[A-Za-z_]\w*)+)"))
def test_a_dotted_name_exists(page, name):
    words = name.split(".")
    size = next(size for size in range(len(words), 0, -1) if is_module(words[:size]))
    if size < len(words):  # a module alone is not imported: scripts declare flags
        found: typing.Any = importlib.import_module(".".join(words[:size]))
        for word in words[size:]:
            found = getattr(found, word)


def is_module(words: list[str]) -> bool:
    """Whether `a.b.c` is a module; one that is no package has none below it."""
    try:
        return importlib.util.find_spec(".".join(words)) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize(
    ("page", "name"),
    names(r"(?<![\w./-])((?:pixel_jax|unlearn_jax|docs|configs|tests|launch|\.ci)/[\w./{},-]*[\w}])"),
)
def test_a_path_exists(page, name):
    for path in braces(name):
        assert located(path).exists(), path


@pytest.mark.parametrize(
    ("page", "name"),
    names(r"^((?!(?:pixel_jax|unlearn_jax|configs|tests|launch)/)[a-z][\w/]*\.(?:py|sh))(?::[\w,]+)?$"),
)
def test_a_file_exists(page, name):
    """Files are also named by the end of their path; those that readers write begin with `my_`."""
    assert name.startswith("my_") or any(path.as_posix().endswith(f"/{name}") for path in tracked())


def located(path: str) -> pathlib.Path:
    """A path of the repository."""
    return (INSTALLED if path.startswith(("pixel_jax", "unlearn_jax")) else ROOT) / path


def tracked() -> list[pathlib.Path]:
    """The Python files and scripts of the repository."""
    folders = ("pixel_jax", "unlearn_jax", "configs", "tests", "launch")
    return [path for folder in folders for path in located(folder).rglob("*.[ps][yh]")]


@pytest.mark.parametrize(("page", "name"), names(r"--config=([\w/]+)(?:\.py)?"))
def test_a_config_exists(page, name):
    name = name.removeprefix("configs/")
    assert name.startswith("my_") or (ROOT / "configs" / f"{name}.py").is_file()


@pytest.mark.parametrize(("page", "call"), names(r"\b((?:pixel-jax|unlearn-jax) [a-z|]+)"))
def test_a_command_exists(page, call):
    program, _, commands = call.partition(" ")
    assert set(commands.split("|")) <= set(COMMANDS[program])


def test_the_flags_exist(declared):
    """Of the command that is named beside them; elsewhere of any command, or of a script that has it."""
    anywhere = set().union(*declared.values()) | set(OTHER_FLAGS)
    for page in PAGES:
        for line in code(page):
            if line.startswith(("pip install", "docker ", "zensical ")):
                continue
            call = re.search(r"\b(pixel-jax|unlearn-jax) ([a-z|]+)", line)
            known = anywhere
            if call:
                known = set().union(*(declared[call[1], command] for command in call[2].split("|")))
            used = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", line[call.start() :] if call else line))
            assert used <= known, f"{page.name}: {line}"
    for name, script in OTHER_FLAGS.items():
        assert name in located(script).read_text()


def test_the_settings_exist():
    """`--config.KEY` is a setting of the command that is named beside it, elsewhere of any."""
    of = {
        (program, command): keys(module)
        for program, commands in COMMANDS.items()
        for command, (module, _) in commands.items()
    }
    anywhere = set().union(*of.values())
    for page in PAGES:
        for line in code(page):
            call = re.search(r"\b(pixel-jax|unlearn-jax) ([a-z|]+)", line)
            known = set().union(*(of[call[1], command] for command in call[2].split("|"))) if call else anywhere
            for key in re.findall(r"--(config\.[\w.]+)", line):
                if ".benchmarks." in key:
                    key = re.sub(r"(\.benchmarks)\.\w+.*", r"\1", key)
                assert key in known, f"{page.name}: {line}"


def test_the_parts_of_the_suite():
    """CONTRIBUTING.md names them all, and no folder of tests is left to the rest."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    named = page.partition("is run in parts")[2].partition("which is everything else")[0]
    assert set(re.findall(r"`([\w-]+)`", named)) == set(PARTS)
    folders = [path for path in (ROOT / "tests").glob("*/") if any(path.rglob("test_*.py"))]
    assert {part_of(path / "test_x.py") for path in folders} <= set(PARTS) - {"rest"}
