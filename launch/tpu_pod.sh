#!/usr/bin/env bash
# Train on a Cloud TPU pod slice: request it, install on every worker, run on all of them, request it again if it is taken.
#
#   bash launch/tpu_pod.sh [--dry-run] COMMAND...
#
#   NAME      of the slice (required)
#   ZONE      for example us-east5-b (required)
#   TYPE      for example v6e-256, v5p-128, v5litepod-256 (required)
#   VERSION   of the TPU's software; by default the one of TYPE's generation
#   PROJECT   of Google Cloud; by default gcloud's own
#   SPOT      1 asks for a spot slice: cheaper, and taken away now and then
#   RESTARTS  how often training is started again, at most (default 50)
#
# For example:
#   NAME=pixel ZONE=us-east5-b TYPE=v6e-256 SPOT=1 bash launch/tpu_pod.sh \
#       pixel-jax rl --config=configs/pixel/own_data.py --config.model=/data/model --config.out=/data/rl
#
# What is committed in this repository is what runs. `out` must outlive the slice, and is a directory that all workers share
# (Filestore, or a bucket mounted by Cloud Storage FUSE). The slice is left running at the end;
# the last line says how to give it back.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

while [[ ${1:-} = -* ]]; do
    option "$1"
    shift
done
for needed in NAME ZONE TYPE; do
    [ -n "${!needed:-}" ] || mistake "$needed is not set"
done
[ $# != 0 ] || mistake "COMMAND is missing"
case $TYPE in
    v6e-*) default=v2-alpha-tpuv6e ;;
    v5p-*) default=v2-alpha-tpuv5 ;;
    v5litepod-*) default=v2-alpha-tpuv5-lite ;;
    v4-*) default=tpu-ubuntu2204-base ;;
    *) default= ;;
esac
VERSION=${VERSION:-$default}
if [ -z "$VERSION" ]; then
    echo "tpu_pod.sh: no software version is known for TYPE=$TYPE; set VERSION" >&2
    exit 2
fi
where=("--zone=$ZONE")
if [ -n "${PROJECT:-}" ]; then
    where+=("--project=$PROJECT")
fi

state() {
    gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)' 2>/dev/null || true
}

# on_all COMMAND: a shell command on every worker at once.
on_all() {
    run gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command="$1"
}

delete() {
    run gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
}

request() {
    local -a options=()
    if [ -n "${SPOT:-}" ]; then
        options+=(--spot)
    fi
    run gcloud compute tpus queued-resources create "$NAME" "${where[@]}" --node-id="$NAME" \
        --accelerator-type="$TYPE" --runtime-version="$VERSION" "${options[@]}"
}

# A slice that is there and at work: the one there is, or a new one, however long it takes.
have_slice() {
    while true; do
        case $(state) in
            ACTIVE) return ;;
            '') request ;;
            FAILED | SUSPENDED | SUSPENDING) delete ;;
            *) sleep "${POLL:-30}" ;;
        esac
    done
}

archive=${TMPDIR:-/tmp}/pixel_jax-$NAME.tar.gz
# The images come with Python 3.10.
python='python3.11 -c "import ensurepip" || (sudo apt-get update -q && sudo apt-get install -qy python3.11-venv)'
install='mkdir -p pixel_jax && tar -xzf pixel_jax.tar.gz -C pixel_jax && cd pixel_jax && source launch/setup.sh && prepare tpu'

# gcloud does not hand on which status a worker's command ended with: the workers say it in a line.
command=$(printf '%q ' "$@")
remote="cd pixel_jax && source .venv/bin/activate && { JAX_NUM_PROCESSES=auto ${command% }; status=\$?;"
remote+=" echo \"tpu_pod: ended with \$status\"; exit \$status; }"

# Puts the code on the slice and trains. The slice may be taken away at any point: the first step that fails is the last.
train() {
    run git archive --format=tar.gz --output="$archive" HEAD &&
        run gcloud compute tpus tpu-vm scp "$archive" "$NAME:pixel_jax.tar.gz" "${where[@]}" --worker=all &&
        on_all "$python" && on_all "$install" && on_all "$remote"
}

if [ -n "$DRY_RUN" ]; then
    request
    train
    exit
fi
left=${RESTARTS:-50}
log=$(mktemp)
trap 'rm -f "$log" "$archive"' EXIT
while true; do
    have_slice
    status=0
    train | tee "$log" || status=$?
    if [ "$status" = 0 ] || ((left == 0)); then
        break
    fi
    # Started again if what the workers said allows it, or if the slice was taken away, perhaps before they could say anything.
    mapfile -t ended < <(grep -Eo 'tpu_pod: ended with [1-9][0-9]*' "$log" | grep -Eo '[0-9]+')
    if [ "$(state)" = ACTIVE ] && { [ ${#ended[@]} = 0 ] || ! goes_on "${ended[@]}"; }; then
        break
    fi
    echo "tpu_pod.sh: preempted, or a process was lost; starting again, $left times more at most" >&2
    left=$((left - 1))
done
echo "tpu_pod.sh: the slice is yours until: gcloud compute tpus queued-resources delete $NAME ${where[*]} --force" >&2
exit "$status"
