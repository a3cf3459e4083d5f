"""The package as a whole: what importing it loads, which way its imports run, and what tools see of its public names."""

import ast
import inspect
import json
import pathlib
import subprocess
import sys

import pytest

import unlearn_jax

ROOT = pathlib.Path(unlearn_jax.__file__).parent
# Commands, experiments and measurements, and what joins the library to the models of pixel_jax.
LABORATORY = (
    "bench",
    "cli",
    "commands",
    "experiment",
    "own_run",
    "people",
    "planning",
    "quickstart",
    "noisy_responses",
    "recommendation",
    "studies",
    "requests",
    "vision_language",
)
WITHIN = ("jax", "numpy", "unlearn_jax")  # all that the library needs to be imported
LATER = ("optax", "scipy")  # what functions of it import when they are called


def modules():
    """The source of every module, by its dotted name."""
    for path in sorted(ROOT.rglob("*.py")):
        yield ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"), path


def imports(nodes):
    """The dotted names that some statements import, but for those of a type checker."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_laboratory(name):
    return any(f"{name}.".startswith(f"unlearn_jax.{part}.") for part in LABORATORY)


def third_party(names):
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


@pytest.mark.parametrize(("name", "path"), [pair for pair in modules() if not is_laboratory(pair[0])])
def test_the_library_needs_jax_and_numpy_and_nothing_of_the_laboratory(name, path):
    code = ast.parse(path.read_text())
    checked = [node for node in code.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    everything = list(imports(set(ast.walk(code)) - {inside for node in checked for inside in ast.walk(node)}))
    assert third_party(imports(code.body)) <= set(WITHIN)
    assert third_party(everything) <= {*WITHIN, *LATER}
    assert [found for found in everything if is_laboratory(found)] == []


def test_the_library_is_all_but_the_laboratory():
    names = {name for name, _ in modules()}
    assert all(f"unlearn_jax.{part}" in names for part in LABORATORY)
    assert {"unlearn_jax.erase", "unlearn_jax.baselines.training", "unlearn_jax.metrics.tokens"} <= {
        name for name in names if not is_laboratory(name)
    }


def test_imports_run_one_way():
    """pixel_jax never imports unlearn_jax, and no two modules of unlearn_jax import each other, however far round."""
    for path in (ROOT.parent / "pixel_jax").rglob("*.py"):
        assert "unlearn_jax" not in third_party(imports(ast.walk(ast.parse(path.read_text())))), path
    known = dict(modules())
    graph = {
        name: [x for x in imports(ast.parse(path.read_text()).body) if x in known and not name.startswith(f"{x}.")]
        for name, path in known.items()
        if path.name != "__init__.py"
    }
    done = set()

    def visit(name, above):
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for other in graph.get(name, []):
                visit(other, [*above, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_importing_it_loads_jax_and_numpy_only():
    code = "import sys, json, unlearn_jax; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    environment = {"PYTHONPATH": str(ROOT.parent), "PATH": "", "JAX_PLATFORMS": "cpu"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    loaded = set(json.loads(found.stdout))
    assert {"jax", "numpy", "unlearn_jax"} <= loaded
    absent = {"absl", "flax", "grain", "ml_collections", "optax", "orbax", "pixel_jax", "safetensors", "scipy", "torch"}
    assert loaded & {*absent, "transformers"} == set()


@pytest.mark.parametrize("name", unlearn_jax.__all__)
def test_tools_see_every_public_name(name):
    found = getattr(unlearn_jax, name)
    assert inspect.getdoc(found)
    parameters = inspect.signature(found).parameters.values()
    assert all(x.annotation is not inspect.Parameter.empty for x in parameters)
    assert not any(x.kind in (x.VAR_POSITIONAL, x.VAR_KEYWORD) for x in parameters)


def test_types_are_shipped():
    assert (ROOT / "py.typed").exists() and (ROOT.parent / "pixel_jax" / "py.typed").exists()
