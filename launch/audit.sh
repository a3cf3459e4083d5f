#!/usr/bin/env bash
# Look up every package that is installed for the project, extras included, in the advisory database (pip-audit).
#
#   bash launch/audit.sh [options of pip-audit]
#
# For networks that reach an advisory service. Fails when a package has a known hole, and also when one could not be looked up.
# pip-audit has an environment of its own, beside the one it looks at, whose versions it must not change.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
prepare examples,dev
tool=$VENV-audit
if [ ! -x "$tool/bin/pip-audit" ]; then
    python -m venv "$tool"
    "$tool/bin/python" -m pip install --quiet --disable-pip-version-check "pip-audit>=2.9"
fi
# A version such as 2.13.0+cpu is a build of 2.13.0, which the advisories are about.
python -m pip freeze --disable-pip-version-check --exclude pixel_jax | sed 's/+.*//' > "$VENV/installed.txt"
exec "$tool/bin/pip-audit" --strict --no-deps --disable-pip --requirement "$VENV/installed.txt" "$@"
