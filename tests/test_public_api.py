"""`import pixel_jax` shows real functions with their signatures, and loads nothing until one is used."""

import ast
import inspect
import pathlib
import subprocess
import sys

import pytest

import pixel_jax


@pytest.mark.parametrize("name", pixel_jax.__all__)
def test_a_public_name_is_documented_and_has_a_signature(name):
    found = getattr(pixel_jax, name)
    assert found.__name__ == name and found.__doc__ and inspect.signature(found).parameters
    assert found.__module__.startswith("pixel_jax.") and not inspect.ismodule(found)


def test_what_a_type_checker_reads_is_what_is_loaded():
    tree = ast.parse(pathlib.Path(pixel_jax.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    read = {alias.name: f"pixel_jax.{pixel_jax._WHERE[alias.name]}" for x in block.body for alias in x.names}
    assert {alias.name: x.module for x in block.body for alias in x.names} == read
    assert sorted(read) == sorted(pixel_jax.__all__) == sorted(pixel_jax._WHERE)
    assert set(pixel_jax.__all__) <= set(dir(pixel_jax))


def test_import_is_fast():
    """Neither JAX nor anything else that is slow is loaded; unknown names fail as usual."""
    code = "import sys, pixel_jax; print(sorted({'jax', 'flax', 'numpy', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    with pytest.raises(AttributeError, match="'nonsense'"):
        _ = pixel_jax.nonsense


def test_no_subpackage_hides_a_function():
    folder = pathlib.Path(pixel_jax.__file__).parent
    names = {path.stem for path in folder.iterdir()}
    assert not names & set(pixel_jax.__all__)
