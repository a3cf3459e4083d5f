"""The circumstances of a program's start: the command line, the versions of packages, and the devices."""

import importlib.metadata
import pathlib
import platform
import shlex
import sys
from typing import Any

# The packages that decide the numbers of a run, besides Python itself.
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
    """The versions of Python and of those `PACKAGES` that are installed."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def devices() -> dict[str, Any]:
    """The devices that JAX computes on, in all processes."""
    import jax

    kinds = sorted({device.device_kind for device in jax.devices()})
    return {
        "platform": jax.default_backend(),
        "kind": ", ".join(kinds),
        "count": jax.device_count(),
        "processes": jax.process_count(),
    }


def circumstances() -> dict[str, Any]:
    """The command line (for a shell), the versions and the devices, as values for JSON."""
    command = shlex.join([pathlib.PurePath(sys.argv[0]).name, *sys.argv[1:]])
    return {"command": command, "versions": versions(), "devices": devices()}
