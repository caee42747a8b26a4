#!/usr/bin/env bash
# Creates a TPU VM or pod slice, installs this checkout on it, trains, and deletes it. It needs gcloud, logged in.
#
#   tpu_scripts/tpu_vm.sh create NAME --zone Z --accelerator-type T [--version V] [--spot] [--project P]
#   tpu_scripts/tpu_vm.sh setup  NAME --zone Z [--prepare COMMAND]    installs the commit HEAD on all workers
#   tpu_scripts/tpu_vm.sh train  NAME --zone Z CONFIG [ARGUMENTS OF jaxtok train ...]
#   tpu_scripts/tpu_vm.sh ssh    NAME --zone Z [--worker W] [COMMAND]
#   tpu_scripts/tpu_vm.sh stop   NAME --zone Z    sends SIGTERM to the training, which saves and ends
#   tpu_scripts/tpu_vm.sh delete NAME --zone Z
#
#   tpu_scripts/tpu_vm.sh create run1 --zone us-east5-b --accelerator-type v6e-16 --spot
#   tpu_scripts/tpu_vm.sh setup run1 --zone us-east5-b --prepare 'sudo mkdir -p /data && sudo mount SERVER:/share /data'
#   tpu_scripts/tpu_vm.sh train run1 --zone us-east5-b tokenformer_small --workdir /data/run1
#
#   --version V          the software of the VM (default: the version for JAX on this accelerator)
#   --prepare COMMAND    also run this command on all workers, before the installation
#   --worker W           the worker: 0, 1, ... or all (default: 0)
#   --dry-run            print the commands and run nothing
#
# On a slice with several workers, --workdir must be a folder that all share, such as one mounted by --prepare.
# `train` runs on all workers and starts again when they end with exit code 75 (interrupted and saved); any other code
# is returned. Ctrl-C ends the connection but not the training; `stop` ends the training.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

verb=${1-} worker=0 prepare=""
case $verb in
  -h | --help) usage; exit 0 ;;
  --dry-run) dry_run=1; shift; verb=${1-} ;;
esac
case $verb in
  create) options="--accelerator-type --version" ;;
  setup) options="--prepare" ;;
  ssh) options="--worker" ;;
  train | stop | delete) options="" ;;
  -h | --help) usage; exit 0 ;;
  *) fail "say what to do: create, setup, train, ssh, stop or delete; see --help." ;;
esac
tpu_options "$options" "${@:2}"
[[ $verb == create || ! $spot ]] || fail "--spot is an option of create."
[[ $verb == train || $verb == ssh || ${#rest[@]} == 0 ]] || fail "$verb takes a NAME only, not ${rest[*]}."
[[ $zone ]] || fail "$verb needs --zone."
where=("--zone=$zone")
[[ ! $project ]] || where+=("--project=$project")

on_all() {
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all "--command=$1"
}

case $verb in
  create)
    [[ $accelerator_type ]] || fail "create needs --accelerator-type, such as v6e-8."
    run gcloud compute tpus tpu-vm create "$name" "${where[@]}" "--accelerator-type=$accelerator_type" \
      "--version=${version:-$(runtime_version "$accelerator_type")}" ${spot:+--spot}
    ;;
  setup)
    archive=${TMPDIR:-/tmp}/jaxtok-$name.tar.gz
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    run git -C "$here" archive --format=tar.gz --prefix=jaxtok/ "--output=$archive" HEAD
    run gcloud compute tpus tpu-vm scp "$archive" "$name:jaxtok.tar.gz" "${where[@]}" --worker=all
    run rm "$archive"
    [[ ! $prepare ]] || on_all "$prepare"
    # The VM's own Python may be older than jaxtok needs; uv brings one.
    on_all "tar -xzf jaxtok.tar.gz && python3 -m pip install -q --user uv \
&& ~/.local/bin/uv venv -q --allow-existing --python 3.12 jaxtok-env \
&& ~/.local/bin/uv pip install -q --python jaxtok-env/bin/python --reinstall-package jaxtok './jaxtok[tpu]'"
    ;;
  train)
    [[ ${#rest[@]} -gt 0 ]] || fail "say what to train: tpu_vm.sh train NAME --zone Z CONFIG ..."
    while true; do
      code=0
      on_all "cd ~/jaxtok && exec ~/jaxtok-env/bin/jaxtok train $(quoted "${rest[@]}") --distributed" || code=$?
      if [[ $dry_run ]]; then echo "# again while the exit code is $INTERRUPTED"; fi
      if [[ $dry_run || $code != "$INTERRUPTED" ]]; then exit "$code"; fi
      say "interrupted; starting again."
      sleep 10
    done
    ;;
  ssh)
    command=()
    [[ ${#rest[@]} == 0 ]] || command=("--command=${rest[*]}")
    run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--worker=$worker" "${command[@]}"
    ;;
  stop)
    on_all "pkill -TERM -f '[j]axtok train'" # the brackets: not this command itself
    ;;
  delete)
    run gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
    ;;
esac
