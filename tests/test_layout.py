"""The layout of both packages, read from their imports: the laboratory stays apart, and imports make no circle."""

import ast
import pathlib

import pytest

import pixel_jax
from pixel_jax.models import FAMILIES

ROOT = pathlib.Path(pixel_jax.__file__).parents[1]  # of both packages, which may be installed
# What measures and shows the library. Commands reach it by name (`cli.COMMANDS`).
LABORATORY = (
    "pixel_jax.bench",
    "pixel_jax.planning",
    "pixel_jax.quickstart",
    "pixel_jax.search_set",
    "unlearn_jax.bench",
    "unlearn_jax.experiment",
    "unlearn_jax.noisy_responses",
    "unlearn_jax.people",
    "unlearn_jax.planning",
    "unlearn_jax.quickstart",
    "unlearn_jax.recommendation",
    "unlearn_jax.studies",
)
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("pixel_jax", "unlearn_jax")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imports(name: str) -> set[str]:
    """The modules of both packages that a module imports, within its functions too, but for those of a type checker."""
    tree = ast.parse(MODULES[name].read_text())
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    checked = {inside for block in blocks for statement in block.body for inside in ast.walk(statement)}
    found = set()
    for node in set(ast.walk(tree)) - checked:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            modules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= modules or {str(node.module)}
    return (found & MODULES.keys()) - {name}


GRAPH = {name: imports(name) for name in MODULES}


def in_laboratory(name: str) -> bool:
    """Configs, which an installed package holds, belong to the commands that read them."""
    return f"{name}.".startswith(tuple(f"{part}." for part in (*LABORATORY, "pixel_jax.configs")))


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one import circle, in order; none where there is no circle."""
    finished: set[str] = set()

    def visit(name: str, above: list[str]) -> list[str]:
        if name in above:
            return [*above[above.index(name) :], name]
        if name not in finished:
            for other in sorted(graph.get(name, ())):
                if found := visit(other, [*above, name]):
                    return found
            finished.add(name)
        return []

    return next((found for name in graph if (found := visit(name, []))), [])


def test_the_search_finds_a_circle():
    assert circle({"a": {"b"}, "b": {"c", "d"}, "c": {"b"}, "d": set()}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_two_modules_import_each_other():
    assert circle(GRAPH) == []


@pytest.mark.parametrize("part", LABORATORY)
def test_nothing_of_the_library_imports_the_laboratory(part):
    assert part in MODULES
    users = {name for name, used in GRAPH.items() if any(f"{x}.".startswith(f"{part}.") for x in used)}
    assert {name for name in users if not in_laboratory(name)} == set()


def test_pixel_jax_does_not_know_unlearn_jax():
    assert {
        (name, x) for name, used in GRAPH.items() if name.startswith("pixel_jax") for x in used if "unlearn" in x
    } == set()


def test_the_files_of_tests_have_names_of_their_own():
    """Folders of tests without an `__init__.py` share one name space: of two files of a name pytest imports only one."""
    folders = [folder for folder in pathlib.Path(__file__).parent.rglob("*/") if not (folder / "__init__.py").exists()]
    names = [path.name for folder in folders for path in folder.glob("*.py") if path.name != "conftest.py"]
    assert sorted(set(names)) == sorted(names)


SHARED = {f"pixel_jax.models.{name}" for name in ("config", "decoder", "layers", "model", "vision")}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_at_most_three_files_and_some_600_lines(name):
    """Of its own: not what all families share, nor what it takes over from another."""
    config, tower = FAMILIES[name]
    classes = [config, config.text_class, getattr(config, "vision_class", None), tower]
    modules = {base.__module__ for kind in classes if isinstance(kind, type) for base in kind.__mro__} & MODULES.keys()
    others = {family.config.__module__ for family in FAMILIES.values()} - {config.__module__}
    own = modules - SHARED - others
    if "pixel_jax.models.hybrid" in own:
        own |= {"pixel_jax.models.delta_rule"}
    assert len(own) <= 3 and sum(len(MODULES[x].read_text().splitlines()) for x in own) <= 630, own
