#!/usr/bin/env bash
# Run a command as N processes of this machine that JAX joins into one computation on the CPU (Gloo over loopback).
#
#   bash launch/processes.sh [--dry-run] N COMMAND...
#
# For example: bash launch/processes.sh 2 unlearn-jax train. If a command of the project is not there yet, everything is set up
# first. All processes get the same arguments. The first that fails ends the others. The status of the script is that of the
# first that had an error, if one had. If none had, but processes were preempted (42) or lost (killed: 137; or gone because
# another was lost: 43, 134), all are started again, RESTARTS times at most (default 3). SIGTERM and SIGINT go to all processes,
# which save themselves; then nothing is started again.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

while [[ ${1:-} = -* ]]; do
    option "$1"
    shift
done
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || mistake "N is a number of processes, not '${1:-}'"
count=$1
shift
[ $# != 0 ] || mistake "COMMAND is missing"
[[ $1 != -* ]] || mistake "options come before N, not after it: '$1'"
if ! command -v "$1" >/dev/null; then
    case $1 in
        pixel-jax | unlearn-jax | python | python3) ;;
        *) mistake "there is no command '$1'" ;;
    esac
    if [ -z "$DRY_RUN" ]; then
        here=$PWD
        # shellcheck source=launch/setup.sh
        source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
        prepare examples
        cd "$here" # files that the command names are found from where it was typed
    fi
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

# all_of_them COMMAND...: runs the processes once; its status is that of the first that had an error, or else failed.
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
            [ -n "$stopped" ] || kill -TERM "${processes[@]}" 2>/dev/null || true # asked to stop once, not while they save
        elif [ "$one" != 0 ] && [ "$one" != 143 ] && goes_on "$status" && ! goes_on "$one"; then
            status=$one # and 143 is a process that went as it was told, before it could save itself
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
