#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster: prints a JobSet and gives it to kubectl. The cluster needs JobSet 0.6 or newer.
#
#   tpu_scripts/gke_jobset.sh NAME --image I --accelerator A --topology T [OPTIONS] CONFIG [ARGUMENTS ...]
#   tpu_scripts/gke_jobset.sh run1 --image IMAGE --accelerator tpu-v6e-slice --topology 4x4 --claim data \
#       tokenformer_small --workdir /data/run1 --train.save-deadline 100
#
#   --image I           the container image, with `jaxtok` and jax[tpu] installed
#   --accelerator A     the node pool's cloud.google.com/gke-tpu-accelerator, such as tpu-v5-lite-podslice
#   --topology T        the node pool's cloud.google.com/gke-tpu-topology, such as 4x4 or 2x2x2
#   --chips-per-pod C   the number of TPU chips of one machine (default: 4)
#   --slices S          the number of slices of this topology (default: 1)
#   --spot              run on Spot machines
#   --claim CLAIM       a PersistentVolumeClaim that all pods can write, mounted at /data for --workdir
#   --grace S           the seconds between SIGTERM and SIGKILL (default: 120); --train.save-deadline should be less
#   --max-restarts R    the limit of restarts after errors (default: 3); restarts after interruptions have no limit
#   --dry-run           print the JobSet and do nothing else
#
# A pod that ends with exit code 75 (interrupted and saved), or whose machine is taken away, fails its Job with the
# reason PodFailurePolicy; the JobSet then starts all pods again, and they resume.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name="" image="" accelerator="" topology="" chips=4 slices=1 spot="" claim="" grace=120 max_restarts=3
while [[ $# -gt 0 ]]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry_run=1; shift ;;
    --spot) spot=1; shift ;;
    --image) need "$1" "${2-}"; image=$2; shift 2 ;;
    --accelerator) need "$1" "${2-}"; accelerator=$2; shift 2 ;;
    --topology) need "$1" "${2-}"; topology=$2; shift 2 ;;
    --claim) need "$1" "${2-}"; claim=$2; shift 2 ;;
    --chips-per-pod) need_number "$1" "${2-}" 1; chips=$2; shift 2 ;;
    --slices) need_number "$1" "${2-}" 1; slices=$2; shift 2 ;;
    --grace) need_number "$1" "${2-}" 0; grace=$2; shift 2 ;;
    --max-restarts) need_number "$1" "${2-}" 0; max_restarts=$2; shift 2 ;;
    --*) fail "there is no option $1; see --help." ;;
    *)
      [[ ! $name ]] || break
      name=$1
      shift ;;
  esac
done
[[ $name ]] || fail "give the NAME of the JobSet; see --help."
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "NAME is $name; it must be lower-case letters, digits and dashes."
[[ $image ]] || fail "give the --image."
[[ $accelerator ]] || fail "give the --accelerator, such as tpu-v6e-slice."
[[ $topology =~ ^[0-9]+(x[0-9]+)+$ ]] || fail "--topology is '$topology'; it must be of the form 4x4 or 2x2x2."
[[ $# -gt 0 ]] || fail "say what to train: gke_jobset.sh NAME ... CONFIG ..."
all=$((${topology//x/*}))
((all > 0 && all % chips == 0)) ||
  fail "--topology $topology has $all chips, which --chips-per-pod $chips does not divide."
pods=$((all / chips))

# A string for YAML, and for Kubernetes, which reads $(NAME) in arguments.
string() {
  local text=$1
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  text=${text//$'\t'/\\t}
  text=${text//\$/\$\$}
  printf '"%s"' "$text"
}

jobset() {
  local argument
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool # a slice each
spec:
  failurePolicy:
    maxRestarts: $max_restarts
    rules:
      - name: interrupted
        action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $slices
      template:
        spec:
          parallelism: $pods
          completions: $pods
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: jaxtok
                  operator: In
                  values: [$INTERRUPTED]
              - action: FailJob
                onPodConditions:
                  - type: DisruptionTarget
                    status: "True"
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: $grace
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $(string "$accelerator")
                cloud.google.com/gke-tpu-topology: $(string "$topology")
YAML
  [[ ! $spot ]] || echo '                cloud.google.com/gke-spot: "true"'
  cat <<YAML
              containers:
                - name: jaxtok
                  image: $(string "$image")
                  command: [jaxtok, train]
                  args:
YAML
  for argument; do printf '                    - %s\n' "$(string "$argument")"; done
  cat <<YAML
                  ports:
                    - containerPort: 8471 # between the TPU machines of a slice
                    - containerPort: 8080 # between slices
                    - containerPort: 8482 # between the processes
                  resources:
                    limits:
                      google.com/tpu: $chips
YAML
  [[ $claim ]] || return 0
  cat <<YAML
                  volumeMounts:
                    - name: data
                      mountPath: /data
              volumes:
                - name: data
                  persistentVolumeClaim:
                    claimName: $(string "$claim")
YAML
}

if [[ $dry_run ]]; then
  echo "# to be given to: kubectl apply -f -"
  jobset "$@"
else
  jobset "$@" | tee /dev/stderr | kubectl apply -f -
fi
