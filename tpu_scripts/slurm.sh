#!/usr/bin/env bash
# Trains in a Slurm job with one process for each GPU; when interrupted, it saves and queues itself again.
#
#   sbatch [OPTIONS OF sbatch] tpu_scripts/slurm.sh CONFIG [ARGUMENTS OF jaxtok train ...]
#   sbatch --nodes=2 --gpus-per-node=8 tpu_scripts/slurm.sh tokenformer_pile_150m --workdir runs/150m \
#       --train.save-deadline 100
#
# For machines with another number of GPUs, give --gpus-per-node=4 --ntasks-per-node=4, always both; for machines
# without GPUs, --gpus-per-node=0 --ntasks-per-node=1. The variable JAXTOK is the command (default: jaxtok).
# `bash tpu_scripts/slurm.sh --dry-run CONFIG ...` prints the commands and runs nothing.
#
# Slurm sends SIGTERM to the processes 120 seconds before the time limit; they save and end with exit code 75, and the
# job is queued again. Any other code ends the job, and so does scancel. Where Slurm preempts jobs, its GraceTime says
# how long they have.

#SBATCH --job-name=jaxtok
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append

# Slurm runs a copy of this file in another folder, from which common.sh cannot be found.
set -euo pipefail

fail() {
  printf 'slurm.sh: %s\n' "$*" >&2
  exit 2
}

quoted() {
  local word line=""
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
    line+="$word "
  done
  printf '%s\n' "${line% }"
}

dry_run=""
while [[ ${1-} == -* ]]; do
  case $1 in
    -h | --help) awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"; exit 0 ;;
    --dry-run) dry_run=1; shift ;;
    *) fail "there is no option $1 before CONFIG; see --help." ;;
  esac
done
[[ $# -gt 0 ]] || fail "say what to train: sbatch slurm.sh CONFIG ..."
gpus=${SLURM_GPUS_ON_NODE:-} tasks=${SLURM_NTASKS_PER_NODE:-}
[[ ! $gpus || ! $tasks || $gpus == "$tasks" || $gpus == 0 ]] ||
  fail "a node has $gpus GPUs and $tasks tasks; there must be one task for each GPU: sbatch --ntasks-per-node=$gpus."

read -ra jaxtok <<<"${JAXTOK:-jaxtok}"
# --wait: after one process has ended, the others have a minute. The exit code is the highest of all.
srun=(srun --kill-on-bad-exit=0 --wait=60 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"}
  "${jaxtok[@]}" train "$@")

if [[ $dry_run ]]; then
  quoted "${srun[@]}"
  echo "# if the exit code is 75:"
  quoted scontrol requeue "${SLURM_JOB_ID:-JOB_ID}"
  exit 0
fi
[[ ${SLURM_JOB_ID:-} ]] || fail "this runs in a Slurm job: start it with sbatch, or add --dry-run."
code=0
"${srun[@]}" || code=$?
[[ $code != 75 ]] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
