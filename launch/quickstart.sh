#!/usr/bin/env bash
# Set up and run the whole main job in miniature: instruction tuning, reinforcement learning twice, evaluation, report.
#
#   bash launch/quickstart.sh [--seeds N] [flags of `pixel-jax quickstart`]
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
prepare examples
exec pixel-jax quickstart "$@"
