"""Code that a user names: found, last of all in the current directory, and refused by name where there is none."""

import os
import pathlib
import subprocess
import sys

import pytest

import pixel_jax
from pixel_jax.named import NamedError, digest, find, is_name


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_name_leads_to_what_it_names(here):
    (here / "own_things.py").write_text(
        "class A:\n    b = 3\n\ndef f():\n    import own_neighbour\n    return own_neighbour.x"
    )
    (here / "own_neighbour.py").write_text("x = 5")
    assert find("own_things:A.b") == 3 and find("own_things:f")() == 5  # imported after `find` has returned
    assert find("os.path:join") is __import__("os").path.join
    (here / "own_package").mkdir()
    (here / "own_package" / "part.py").write_text("y = 7")
    assert find("own_package.part:y") == 7


def test_the_current_directory_is_searched_last(here, monkeypatch):
    installed = here / "installed"
    installed.mkdir()
    (installed / "own_twice.py").write_text("where = 'installed'")
    (here / "own_twice.py").write_text("where = 'here'")
    (here / "colorsys.py").write_text("where = 'here'")  # of the standard library, imported by nobody
    for first in ("", str(here)):  # as with `python -c` and `python script.py`
        monkeypatch.setattr(sys, "path", [first, str(installed), *sys.path])
        before = list(sys.path)
        assert find("own_twice:where") == "installed"
        assert not hasattr(find("colorsys:rgb_to_hsv"), "where")
        assert sys.path == before
        for name in ("own_twice", "colorsys"):
            sys.modules.pop(name, None)
    code = "from pixel_jax.named import find; print(find('own_twice:where'))"
    paths = os.environ | {"PYTHONPATH": str(pathlib.Path(pixel_jax.__file__).parents[1])}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=paths)
    assert said.stdout == "here\n"  # where it is nowhere else


@pytest.mark.parametrize("name", ["a:b", "a.b:c.d", "_x:y1"])
def test_names(name):
    assert is_name(name)


@pytest.mark.parametrize(
    "name", ["a", "a:", ":b", "a:b:c", "a/b:c", "../a:b", "a b:c", "1a:b", "a:b()", "a:b\n", "a..b:c"]
)
def test_what_is_no_name(name):
    assert not is_name(name)
    with pytest.raises(NamedError, match="not written as module:name"):
        find(name)


def test_errors_say_what_is_missing(here):
    (here / "own_bad.py").write_text("1 / 0")
    (here / "own_lacking.py").write_text("import no_such_package_anywhere")
    (here / "own_good.py").write_text("good = 1")
    (here / "own_loud.py").write_text("raise SystemError('loud')")
    for name, words in [
        ("own_none:x", "there is no module 'own_none' in .*search path"),
        ("own_good.part:x", "there is no module 'own_good.part'"),
        ("own_bad:x", "importing own_bad failed: ZeroDivisionError"),
        ("own_loud:x", "SystemError: loud"),
        ("own_lacking:x", "own_lacking imports 'no_such_package_anywhere', which is not installed"),
        ("own_good:x", "own_good .*own_good.py. has no 'x'; it has good"),
    ]:
        with pytest.raises(NamedError, match=words):
            find(name)


def test_other_code_has_another_digest(here):
    (here / "own_code.py").write_text("x = 1")
    first = digest("own_code:x")
    assert first == digest("own_code:x") and len(first) == 32
    (here / "own_code.py").write_text("x = 2")
    assert digest("own_code:x") != first
    assert digest("sys:path") == "built in"
