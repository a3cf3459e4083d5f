"""Under what circumstances a program was started: the command line, the versions of what it is made of, the devices."""

import importlib.metadata
import pathlib
import platform
import shlex
import sys
from typing import Any

# What decides the numbers of a run, besides the Python that runs it.
PACKAGES = (
    "pixel_jax",
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "pillow",
    "av",
)


def versions() -> dict[str, str]:
    """Of Python, and of those `PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def devices() -> dict[str, Any]:
    """Those that JAX computes on, in all processes."""
    import jax

    kinds = sorted({device.device_kind for device in jax.devices()})
    return {
        "platform": jax.default_backend(),
        "kind": ", ".join(kinds),
        "count": jax.device_count(),
        "processes": jax.process_count(),
    }


def circumstances() -> dict[str, Any]:
    """All of it, as JSON takes it. `command` can be given to a shell."""
    command = shlex.join([pathlib.PurePath(sys.argv[0]).name, *sys.argv[1:]])
    return {"command": command, "versions": versions(), "devices": devices()}
