#!/usr/bin/env bash
# Waits in Google's queue for a TPU, trains on it, and asks for another when it was preempted. It needs gcloud.
#
#   tpu_scripts/queued_resource.sh train  NAME --zone Z --accelerator-type T [OPTIONS] CONFIG [ARGUMENTS ...]
#   tpu_scripts/queued_resource.sh delete NAME --zone Z [--project P]
#
#   tpu_scripts/queued_resource.sh train run1 --zone us-east5-b --accelerator-type v6e-16 --spot \
#       --prepare 'sudo mkdir -p /data && sudo mount SERVER:/share /data' \
#       tokenformer_small --workdir /data/run1
#
#   --version V                 the software of the VM (default: the version for JAX on this accelerator)
#   --spot                      ask for a Spot TPU, which is cheaper and can be preempted
#   --valid-until-duration D    how long the request stays in the queue, such as 6h (default: no limit)
#   --prepare COMMAND           run this command on all workers of every new TPU, before the installation
#   --project P                 the Google Cloud project (default: that of gcloud)
#   --dry-run                   print the commands and run nothing
#
# The request and its TPU are both called NAME. When the TPU is there (state ACTIVE), tpu_vm.sh installs this checkout
# and trains. When the training ends because the TPU was taken away (SUSPENDED or FAILED), the request is deleted and
# made again; --workdir must be a folder that outlives the TPU. At the end the TPU stays; `delete` deletes it.
# This script can be stopped and started again; it then continues with the request of this NAME.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

verb=${1-} valid_until_duration="" prepare=""
case $verb in
  -h | --help) usage; exit 0 ;;
  --dry-run) dry_run=1; shift; verb=${1-} ;;
esac
case $verb in
  train) options="--accelerator-type --version --valid-until-duration --prepare" ;;
  delete) options="" ;;
  -h | --help) usage; exit 0 ;;
  *) fail "say what to do: train or delete; see --help." ;;
esac
tpu_options "$options" "${@:2}"
[[ $zone ]] || fail "$verb needs --zone."
where=("--zone=$zone")
[[ ! $project ]] || where+=("--project=$project")
tpu_vm=$(dirname "${BASH_SOURCE[0]}")/tpu_vm.sh
place=(--zone "$zone" ${project:+--project "$project"})

create() {
  run gcloud compute tpus queued-resources create "$name" "${where[@]}" "--node-id=$name" \
    "--accelerator-type=$accelerator_type" "--runtime-version=${version:-$(runtime_version "$accelerator_type")}" \
    ${spot:+--spot} ${valid_until_duration:+"--valid-until-duration=$valid_until_duration"}
}

# Prints the state of the request; nothing if there is none.
state() {
  run gcloud compute tpus queued-resources list "${where[@]}" "--filter=name ~ /$name\$" "--format=value(state.state)"
}

delete() {
  run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

setup_and_train() {
  "$tpu_vm" ${dry_run:+--dry-run} setup "$name" "${place[@]}" ${prepare:+--prepare "$prepare"} || return
  "$tpu_vm" ${dry_run:+--dry-run} train "$name" "${place[@]}" -- "${rest[@]}"
}

if [[ $verb == delete ]]; then
  [[ ${#rest[@]} == 0 ]] || fail "delete takes a NAME only, not ${rest[*]}."
  delete
  exit 0
fi
[[ $accelerator_type ]] || fail "train needs --accelerator-type, such as v6e-8."
[[ ${#rest[@]} -gt 0 ]] || fail "say what to train: queued_resource.sh train NAME ... CONFIG ..."

if [[ $dry_run ]]; then
  create
  echo "# until this says ACTIVE:"
  state
  setup_and_train
  echo "# if the TPU was preempted (SUSPENDED or FAILED), this, and all again:"
  delete
  exit 0
fi

had_it="" # whether this request got its TPU
while true; do
  now=$(state) || now=UNKNOWN # no connection, perhaps
  case $now in
    "")
      had_it=""
      create
      ;;
    ACTIVE)
      had_it=1
      code=0
      setup_and_train || code=$?
      if [[ $code == 0 ]]; then
        say "done; the TPU is still there: $(quoted "$0" delete "$name" "${place[@]}")"
        exit 0
      fi
      sleep 60 # the state follows a preemption with a delay
      now=$(state) || now=UNKNOWN
      if [[ $now == ACTIVE ]]; then
        say "training ended with exit code $code, and not because of a preemption."
        exit "$code"
      fi
      ;;
    SUSPENDED | FAILED)
      if [[ $now == FAILED && ! $had_it ]]; then
        say "the request failed before it got a TPU; see: $(quoted gcloud compute tpus queued-resources describe \
          "$name" "${where[@]}")"
        exit 1
      fi
      say "the TPU was taken away ($now); asking for another."
      delete
      ;;
    *)
      say "$now"
      sleep 30
      ;;
  esac
done
