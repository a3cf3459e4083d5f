"""The circumstances of a program's start: the command line, the versions of packages, and the devices."""

import importlib.metadata
import pathlib
import platform
import shlex
import subprocess
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


def commit() -> str | None:
    """The commit of the checkout that this package lies in, with "+changes" where tracked files differ from it.

    None: the package is installed, or there is no git.
    """

    def git(*words: str) -> str:
        root = pathlib.Path(__file__).parents[1]
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not git("ls-files", "--", str(pathlib.Path(__file__).resolve())):
            return None  # of another project, such as one whose environment holds this package
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


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
