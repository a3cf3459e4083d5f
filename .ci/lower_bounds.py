"""Prints the lowest versions that `setup.py` allows, one a line, as pip's `--constraint` reads them.

python .ci/lower_bounds.py > lowest.txt
"""

import pathlib
import re
import runpy
import sys
import types
from unittest import mock

SETUP = pathlib.Path(__file__).parent.parent / "setup.py"
REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\w.]+)(?:,<[\w.]+)?")


def requirements(setup: pathlib.Path = SETUP) -> list[str]:
    """What `setup.py` asks for, extras included. It is read with a stand-in for setuptools, which may not be installed."""
    given = {}
    stand_in = types.ModuleType("setuptools")
    stand_in.find_packages, stand_in.setup = lambda **_: [], given.update
    with mock.patch.dict(sys.modules, setuptools=stand_in):
        runpy.run_path(str(setup))
    return [*given["install_requires"], *(line for extra in given["extras_require"].values() for line in extra)]


def constraints(lines: list[str]) -> list[str]:
    """NAME==LOWEST for each NAME>=LOWEST. A requirement of another form is a ValueError: its lowest version is unknown."""
    lowest = set()
    for line in lines:
        found = REQUIREMENT.fullmatch(line)
        if not found:
            raise ValueError(
                f"{line!r} in setup.py has no lower bound of the form NAME>=VERSION, which the tests can install"
            )
        lowest.add(f"{found[1]}=={found[2]}")
    return sorted(lowest)


if __name__ == "__main__":
    print("\n".join(constraints(requirements())))
