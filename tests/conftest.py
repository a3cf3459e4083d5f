"""Shared by all tests: eight virtual CPU devices, a persistent compilation cache, and seven markers.

`slow` runs with `--all` only; `torch`, `torchvision` and `libtpu` are deselected where the package of that name is not installed,
`docs` where zensical is not, `cuda` where JAX's CUDA plugin is not, and `chromium` where the browser is not.
"""

import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import shutil

from hypothesis import HealthCheck, settings

# Compiling is most of a test's time; programs this small do not repay what the compiler's last passes take.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
# Halves the time of compiling a rollout. Later compilers, and libtpu's, have no such switch and end at it.
if importlib.metadata.version("jaxlib").startswith("0.10.") and importlib.util.find_spec("libtpu") is None:
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# How long an example takes says how busy the machine is, not whether it is right.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# marker -> what its tests import
PACKAGES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "libtpu": "libtpu",
    "cuda": "jax_cuda12_plugin",
    "docs": "zensical",
}

MOST_MAPS = 30_000  # of memory; Linux allows a process 65,530


def pytest_runtest_teardown(item, nextitem):
    """Every compiled program maps memory of its own: with a thousand tests in one process the compiler dies of it."""
    maps = pathlib.Path("/proc/self/maps")
    if nextitem is None or nextitem.path == item.path or not maps.exists():
        return
    if maps.read_bytes().count(b"\n") > MOST_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


# Named parts of the suite, `--all --part=NAME`: the beginnings of paths. A test belongs to the first that fits, or to "rest".
PARTS = {
    "data": ("data/", "ops/", "evaluation/", "synthesis/"),
    "models": ("models/", "test_families_commands.py"),
    "rollouts": ("rollouts/", "tools/", "dialog/"),
    "serving": ("serving/", "viewer/", "test_endpoint.py", "launch/"),
    "training": ("training/", "parallel/", "test_interrupts.py"),
    "quickstart": ("quickstart/", "search_set/", "test_first_run.py", "test_own_data.py"),
    "planning": ("planning/", "bench/"),
    "unlearn-models": ("unlearn/vision_language/", "unlearn/test_smollm2.py"),
    "unlearn-experiment": ("unlearn/experiment/", "unlearn/test_same_recipe.py", "unlearn/test_verdict.py"),
    "unlearn": ("unlearn/",),
    "rest": ("",),
}


def part_of(path: pathlib.Path) -> str:
    """The part to which a file of tests belongs."""
    name = path.relative_to(pathlib.Path(__file__).parent).as_posix()
    return next(part for part, beginnings in PARTS.items() if name.startswith(beginnings))


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also run the tests marked slow")
    parser.addoption("--part", choices=sorted(PARTS), help="only the tests of this part (CONTRIBUTING.md)")


def pytest_collection_modifyitems(config, items):
    part = config.getoption("--part")
    unwanted = set() if config.getoption("--all") else {"slow"}
    unwanted |= {mark for mark, package in PACKAGES.items() if importlib.util.find_spec(package) is None}
    unwanted |= set() if shutil.which("chromium") else {"chromium"}
    out = [
        item
        for item in items
        if unwanted & {mark.name for mark in item.iter_markers()} or (part and part_of(item.path) != part)
    ]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in set(out)]
