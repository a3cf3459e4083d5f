#!/usr/bin/env bash
# Set up and check this machine's GPU in at most 8 minutes: kernels against dense attention, crops against Pillow bit for bit,
# decoding, updates at the shapes of a 3B and a 7B, planned against real memory. Everything is written to runs/check.json.
#
#   bash launch/gpu_check.sh [flags of `pixel-jax check`]
#
# One GPU is used. Without one it runs on the CPU, with tiny shapes. Setting up comes first and does not count.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
driver=$(nvidia-smi 2> /dev/null | sed -n 's/.*CUDA Version: \([0-9]*\).*/\1/p' || true)
case $driver in
    "") prepare examples ;;
    12) prepare examples,cuda12 ;;
    *) prepare examples,cuda13 ;;
esac
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92} # of a GPU that is ours alone
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
exec pixel-jax check "$@"
