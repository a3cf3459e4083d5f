#!/usr/bin/env bash
# Set up and run the tests.
#
#   bash launch/test.sh          the fast ones
#   bash launch/test.sh --all    all of them; with --part=NAME those of one part (CONTRIBUTING.md)
#   bash launch/test.sh ARGS...  passed to pytest
#
# Files are shared among WORKERS processes (default 2): compiling keeps a core busy each.
# TORCH=1 (the default on Python 3.11) also installs torch and peft, which some tests compare with; TORCH=0 leaves it out.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
prepare examples,dev
if [ "${TORCH:-$(python -c 'import sys; print(int(sys.version_info < (3, 12)))')}" = 1 ]; then
    python -c 'import torch, peft' 2>/dev/null || python -m pip install --quiet --disable-pip-version-check torch==2.13.0 peft==0.21.2
fi
ruff check .
pyright
exec python -m pytest -n "${WORKERS:-2}" --dist loadfile "$@"
