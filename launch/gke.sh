#!/usr/bin/env bash
# Train on a TPU slice of a Google Kubernetes Engine cluster, as a JobSet that goes on after preemptions.
#
#   bash launch/gke.sh [--dry-run] COMMAND...      --dry-run prints the manifest and applies nothing
#
#   NAME         of the JobSet (required; it is deleted first if it exists)
#   IMAGE        container image with this repository installed as `.[tpu]` (required)
#   ACCELERATOR  for example tpu-v6e-slice, tpu-v5p-slice, tpu-v5-lite-podslice (required)
#   TOPOLOGY     for example 16x16, 4x4x4 (required)
#   CHIPS        of one machine (default 4)
#   RESTARTS     after failures other than a preemption, errors of the program too, at most (default 10; preemptions do not count)
#   NAMESPACE    default: default
#   CLAIM        a PersistentVolumeClaim that all pods may write, mounted at /data: Filestore, or a bucket by Cloud Storage FUSE
#
# For example:
#   NAME=pixel CLAIM=runs IMAGE=REGION-docker.pkg.dev/PROJECT/images/pixel_jax ACCELERATOR=tpu-v6e-slice TOPOLOGY=16x16 \
#       bash launch/gke.sh pixel-jax rl --config=configs/pixel/own_data.py --config.out=/data/rl
#
# The cluster has the JobSet controller (0.6 or newer). `out` must outlive the pods, and is a directory: a bucket has to be
# mounted.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

while [[ ${1:-} = -* ]]; do
    option "$1"
    shift
done
for needed in NAME IMAGE ACCELERATOR TOPOLOGY; do
    [ -n "${!needed:-}" ] || mistake "$needed is not set"
done
[ $# != 0 ] || mistake "COMMAND is missing"
chips=${CHIPS:-4}
namespace=${NAMESPACE:-default}
if ! [[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]]; then
    echo "gke.sh: NAME is lower-case letters, digits and dashes, 40 at most, not '$NAME'" >&2
    exit 2
fi
if ! [[ $TOPOLOGY =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]]; then
    echo "gke.sh: TOPOLOGY is 16x16 or 4x4x4 and the like, not '$TOPOLOGY'" >&2
    exit 2
fi
for number in "$chips" "${RESTARTS:-10}"; do
    if ! [[ $number =~ ^[0-9]+$ ]]; then
        echo "gke.sh: CHIPS and RESTARTS are numbers, not '$number'" >&2
        exit 2
    fi
done
total=$((${TOPOLOGY//x/ * }))
if ((chips == 0 || total % chips)); then
    echo "gke.sh: $total chips of TOPOLOGY=$TOPOLOGY are not machines of CHIPS=$chips" >&2
    exit 2
fi
machines=$((total / chips))

if ! [[ ${CLAIM:-none} =~ ^[a-z0-9]([-a-z0-9]*[a-z0-9])?$ ]]; then
    echo "gke.sh: CLAIM is lower-case letters, digits and dashes, not '$CLAIM'" >&2
    exit 2
fi

# quoted TEXT: as a YAML string.
quoted() {
    local text=${1//\\/\\\\}
    text=${text//\"/\\\"}
    text=${text//$'\n'/\\n}
    printf '"%s"' "${text//$'\t'/\\t}"
}

manifest() {
    cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  namespace: $(quoted "$namespace")
  annotations:
    # One slice, and nobody else on its machines.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: ${RESTARTS:-10}
    rules:
      - name: preempted
        action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: 1
      template:
        spec:
          completionMode: Indexed
          completions: $machines
          parallelism: $machines
          backoffLimit: 0
          podFailurePolicy:
            rules:
              # Training saved itself after SIGTERM, or its machine was taken away: the same run goes on. A process that was lost
              # (43, 134, 137) counts as a failure: 137 is also that of a program which is killed each time, for want of memory.
              - action: FailJob
                onExitCodes:
                  containerName: train
                  operator: In
                  values: [$PREEMPTED]
              - action: FailJob
                onPodConditions:
                  - type: DisruptionTarget
                    status: "True"
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 300
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $(quoted "$ACCELERATOR")
                cloud.google.com/gke-tpu-topology: $(quoted "$TOPOLOGY")
              containers:
                - name: train
                  image: $(quoted "$IMAGE")
                  command:
$(for word in "$@"; do echo "                    - $(quoted "$word")"; done)
                  env:
                    - name: JAX_NUM_PROCESSES
                      value: auto
                  ports:
                    - containerPort: 8471
                    - containerPort: 8482
                  resources:
                    requests:
                      google.com/tpu: $chips
                    limits:
                      google.com/tpu: $chips
YAML
    [ -n "${CLAIM:-}" ] || return 0
    cat <<YAML
                  volumeMounts:
                    - name: data
                      mountPath: /data
              volumes:
                - name: data
                  persistentVolumeClaim:
                    claimName: $CLAIM
YAML
}

if [ -n "$DRY_RUN" ]; then
    manifest "$@"
    exit
fi
kubectl delete jobset "$NAME" --namespace="$namespace" --ignore-not-found
manifest "$@" | kubectl apply --filename=-
echo "gke.sh: kubectl logs --namespace=$namespace --follow --selector=jobset.sigs.k8s.io/jobset-name=$NAME"
