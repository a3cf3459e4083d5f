"""Writes golden_runs.json: what the paper's reward, its advantages and three short runs came to.

    python tests/training/make_golden_runs.py

Run it only where numbers are meant to change.
"""

import importlib
import json
import pathlib
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE / "golden_runs.json"


def main():
    sys.path[:0] = [str(HERE), str(HERE.parent / "rollouts"), str(HERE.parents[1])]
    importlib.import_module("tests.conftest")  # the compiler's settings, which it reads when it starts
    from test_golden import measure

    with tempfile.TemporaryDirectory() as directory:
        GOLDEN.write_text(json.dumps(measure(pathlib.Path(directory)), indent=1) + "\n")


if __name__ == "__main__":
    main()
