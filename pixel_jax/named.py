"""Finds code of the user's own, named as `module:name`: a reward, a tool, a call format.

Such a name runs code. It is imported only where a command line, a config file or a caller names it: readers of model
directories, checkpoints, run directories and data never call `find`, and refuse such names with `is_name`. The current
directory is searched last, so that no file in it takes the place of a package.
"""

import contextlib
import hashlib
import importlib
import os
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

NAME = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*(?:\.[^\W\d]\w*)*")
_LOCK = threading.Lock()  # around the search path


class NamedError(ValueError):
    """Raised for a name for which nothing is found; the message has the name, and where it was looked for."""


def is_name(text: str) -> bool:
    """Whether a text is written as `module:name` (each may be dotted). Nothing is imported."""
    return NAME.fullmatch(text) is not None


def find(name: str) -> Any:
    """Imports the module of `module:name` and returns the object.

    Raises:
        NamedError: the name has another form, there is no such module, the module fails, or it has no such object.
    """
    if not is_name(name):
        raise NamedError(f"{name!r} is not written as module:name, such as my_rewards:iou")
    module, _, path = name.partition(":")
    with _LOCK, _current_directory_last():
        try:
            value = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise NamedError(f"{name!r}: {module} imports {error.name!r}, which is not installed") from error
            raise NamedError(
                f"{name!r}: there is no module {error.name!r} in {os.getcwd()!r} nor on the search path (PYTHONPATH)"
            ) from None
        except Exception as error:
            raise NamedError(f"{name!r}: importing {module} failed: {type(error).__name__}: {error}") from error
    for part in path.split("."):
        if not hasattr(value, part):
            known = ", ".join(x for x in dir(value) if not x.startswith("_"))
            raise NamedError(f"{name!r}: {module} ({_file(module)}) has no {part!r}; it has {known[:500]}")
        value = getattr(value, part)
    return value


def digest(name: str) -> str:
    """The first 32 digits of the SHA-256 of the file that defines `module:name`: other code is another experiment."""
    find(name)
    file = _file(name.partition(":")[0])
    if not os.path.isfile(file):
        return file
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:32]


def _file(module: str) -> str:
    return getattr(sys.modules[module], "__file__", None) or "built in"


@contextlib.contextmanager
def _current_directory_last() -> Iterator[None]:
    """Puts the current directory last on the search path of modules, however Python was started.

    It stays on the path afterwards: an imported module may import its neighbours later.
    """
    here = os.getcwd()
    before = list(sys.path)
    others = [path for path in before if os.path.realpath(path or here) != os.path.realpath(here)]
    sys.path[:] = [*others, here]
    importlib.invalidate_caches()  # a file may be younger than the process
    try:
        yield
    finally:
        known = any(os.path.realpath(path or here) == os.path.realpath(here) for path in before)
        sys.path[:] = before if known else [*before, here]
