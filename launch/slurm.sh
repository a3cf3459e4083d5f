#!/usr/bin/env bash
# Train on a Slurm cluster, one process a GPU; the job goes on after preemption, at its time limit and after a lost node.
#
#   sbatch [OPTIONS of sbatch] launch/slurm.sh COMMAND...
#   bash launch/slurm.sh --dry-run COMMAND...      prints what a job would run
#
# From the root of the repository; for example, on two nodes of eight GPUs (the default below, which options override):
#   sbatch --nodes=2 --partition=gpu launch/slurm.sh pixel-jax rl --config=configs/pixel/own_data.py --config.out=runs/rl
#
# The repository lies on a file system that all nodes share; on the node that submits, `bash launch/test.sh` or
# `pip install -e .[cuda12]` has made its environment (VENV, default .venv). RESTARTS: starts of one job, at most (default 50),
# also of a program that is killed each time.
#SBATCH --job-name=pixel-jax
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --signal=TERM@300
set -euo pipefail
root=$(dirname "${BASH_SOURCE[0]}")/..
if [ ! -f "$root/launch/common.sh" ]; then # Slurm runs a job's script as a copy, in a directory of its own
    root=${SLURM_SUBMIT_DIR:-}
fi
if [ ! -f "$root/launch/common.sh" ]; then
    echo "slurm.sh: '$root' is not the root of the repository, from which jobs are submitted" >&2
    exit 2
fi
# shellcheck source=launch/common.sh
source "$root/launch/common.sh"
cd "$root"

while [[ ${1:-} = -* ]]; do
    option "$1"
    shift
done
[ $# != 0 ] || mistake "COMMAND is missing"
if [ -z "$DRY_RUN" ] && [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "slurm.sh: this is the script of a job: sbatch launch/slurm.sh $*" >&2
    exit 2
fi

VENV=${VENV:-.venv}
if [ -f "$VENV/bin/activate" ]; then
    # shellcheck disable=SC1091
    source "$VENV/bin/activate"
fi
export JAX_NUM_PROCESSES=auto # JAX asks Slurm who is there

# When one process has ended, the others have two minutes to end as well.
training=(srun --label --wait=120 env JAX_NUM_PROCESSES=auto "$@")
if [ -n "$DRY_RUN" ]; then
    run "${training[@]}"
    # shellcheck disable=SC2016
    echo 'if processes were preempted or lost, and none had an error of its own: scontrol requeue $SLURM_JOB_ID'
    exit
fi
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
# A signal to the job reaches the processes through srun, while this script goes on waiting for them.
trap : TERM
status=0
exec 3>&1 # for standard output: only standard error goes through the pipe
"${training[@]}" 2>&1 >&3 | (trap '' TERM; tee "$errors" >&2 || true) || status=$?
# srun's status is the highest of all: that of a process with an error is hidden by what the others leave with, as they have
# lost it. But srun also says on standard error what each ended with.
mapfile -t ended < <(sed -n 's/^srun: error: .*: Exited with exit code //p' "$errors")
if goes_on "$status" "${ended[@]}" && ((${SLURM_RESTART_COUNT:-0} < ${RESTARTS:-50})); then
    echo "slurm.sh: ended with $status; back into the queue" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
