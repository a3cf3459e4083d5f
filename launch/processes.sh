#!/usr/bin/env bash
# Run a command as N processes of this machine that JAX joins into one computation on the CPU (Gloo over loopback).
#
#   bash launch/processes.sh [--dry-run] N COMMAND...
#
# For example: bash launch/processes.sh 2 unlearn-jax train. If the command is not there yet, everything is set up first.
# All processes get the same arguments. The first that fails ends the others, and its status is that of the script.
# A run that was preempted (42) or lost a process (43) is started again, RESTARTS times at most (default 3). SIGTERM and
# SIGINT go to all processes, which save themselves; then nothing is started again.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [ "${1:-}" = --dry-run ]; then
    DRY_RUN=1
    shift
fi
if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
    usage
    exit 2
fi
count=$1
shift
if [ -z "$DRY_RUN" ] && ! command -v "$1" >/dev/null; then
    # shellcheck source=launch/setup.sh
    source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
    prepare examples
fi

free_port() {
    local port
    while true; do
        port=$((RANDOM % 20000 + 20000))
        (: </dev/tcp/127.0.0.1/$port) 2>/dev/null || { echo "$port"; return; }
    done
}

processes=()
stopped=
stop() {
    stopped=1
    kill -TERM "${processes[@]}" 2>/dev/null || true
}
trap 'kill "${processes[@]}" 2>/dev/null || true' EXIT

# all_of_them COMMAND...: runs the processes once; its status is that of the first that failed.
all_of_them() {
    local i status=0 ended=0 address
    address=127.0.0.1:$(free_port)
    local -a environment=(
        "JAX_COORDINATOR_ADDRESS=$address" "JAX_COORDINATOR_BIND_ADDRESS=$address" "JAX_NUM_PROCESSES=$count"
        JAX_PLATFORMS=cpu JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo
    )
    processes=()
    trap - TERM INT # a signal that finds a process forked but not yet itself would be taken by a trap of ours and lost
    for ((i = 0; i < count; i++)); do
        if [ -n "$DRY_RUN" ]; then
            run env "${environment[@]}" "JAX_PROCESS_ID=$i" "$@"
        else
            env "${environment[@]}" "JAX_PROCESS_ID=$i" "$@" &
            processes+=($!)
        fi
    done
    trap stop TERM INT
    while ((ended < ${#processes[@]})); do
        local one=0 finished=
        wait -n -p finished || one=$?
        [ -n "${finished:-}" ] || continue # a signal interrupted the waiting
        ended=$((ended + 1))
        if [ "$one" != 0 ] && [ "$status" = 0 ]; then
            status=$one
            [ -n "$stopped" ] || kill -TERM "${processes[@]}" 2>/dev/null || true # told to go once, not while they save
        fi
    done
    return "$status"
}

left=${RESTARTS:-3}
while true; do
    status=0
    all_of_them "$@" || status=$?
    if [ -n "$stopped" ] || ! goes_on "$status" || ((left == 0)); then
        exit "$status"
    fi
    echo "processes.sh: ended with $status; starting again, $left times more at most" >&2
    left=$((left - 1))
done
