"""Files inside installed packages."""

import importlib.util
import pathlib

from pixel_jax.config import ConfigError

PACKAGE = "package:"


def located(path: str) -> pathlib.Path:
    """Resolves a path; "package:NAME/PATH" is one inside an installed package, which is not imported.

    Raises:
        ConfigError: the package is not installed.
    """
    if not path.startswith(PACKAGE):
        return pathlib.Path(path)
    name, _, inside = path.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"{path!r}: there is no package {name!r}; install it (docs/unlearning.md names it)")
    return pathlib.Path(spec.submodule_search_locations[0]) / inside
