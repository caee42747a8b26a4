#!/usr/bin/env bash
# Starts N processes of one run on this machine.
#
#   tpu_scripts/local.sh [OPTIONS] N ARGUMENTS OF jaxtok ...
#   tpu_scripts/local.sh --devices 2 2 train tokenformer_small --workdir runs/two --train.steps 20
#
#   --devices D     simulate D CPU devices in each process
#   --port PORT     the port on which process 0 listens for the others (default: a free one)
#   --logs DIR      write what processes 1, 2, ... print to DIR/1.log, DIR/2.log, ... (default: to stderr, as "[1] ...")
#   --restarts R    start all again, at most R times, when they end with exit code 75: interrupted, saved (default: 0)
#   --grace S       when one ends with an error, send SIGTERM to the others and, S seconds later, SIGKILL (default: 10)
#   --dry-run       print the commands and run nothing
#
# The exit code is that of the first process that ended with an error; otherwise 75 if one was interrupted; otherwise 0.
# SIGTERM and SIGINT are passed on as SIGTERM, and nothing is started again after them. The command is `jaxtok`, or that
# of the variable JAXTOK, such as JAXTOK="python -m jaxtok.cli".
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

count="" devices="" port="" logs="" restarts=0 grace=10
while [[ $# -gt 0 ]]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry_run=1; shift ;;
    --devices) need_number "$1" "${2-}" 1; devices=$2; shift 2 ;;
    --port) need_number "$1" "${2-}" 1; port=$2; shift 2 ;;
    --logs) need "$1" "${2-}"; logs=$2; shift 2 ;;
    --restarts) need_number "$1" "${2-}" 0; restarts=$2; shift 2 ;;
    --grace) need_number "$1" "${2-}" 0; grace=$2; shift 2 ;;
    --*) fail "there is no option $1; see --help." ;;
    *)
      [[ ! $count ]] || break
      need_number N "$1" 1
      count=$1
      shift ;;
  esac
done
[[ $count ]] || fail "say how many processes, and what they are to do: local.sh N train CONFIG ..."
[[ $# -gt 0 ]] || fail "say what the processes are to do: local.sh $count train CONFIG ..."

read -ra jaxtok <<<"${JAXTOK:-jaxtok}"
processes=() # the ids of the running processes, by number
printers=()  # the ids of the processes that write "[1] ..."
stopped=""   # whether this script got a signal
result=0

free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])'
}

prefixed() {
  local line
  trap '' INT TERM
  while IFS= read -r line || [[ $line ]]; do printf '[%s] %s\n' "$1" "$line"; done
}

start() {
  local i settings address
  address="localhost:${port:-$(free_port)}"
  [[ ! $logs ]] || run mkdir -p "$logs"
  for ((i = 0; i < count; i++)); do
    settings=("JAX_COORDINATOR_ADDRESS=$address" "JAX_NUM_PROCESSES=$count" "JAX_PROCESS_ID=$i")
    if [[ $devices ]]; then
      settings+=(JAX_PLATFORMS=cpu)
      settings+=("XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices")
    fi
    if [[ $dry_run ]]; then
      local redirect=""
      [[ ! $logs || $i == 0 ]] || redirect=" >>$(quoted "$logs/$i.log") 2>&1"
      printf '%s%s &\n' "$(quoted env "${settings[@]}" "${jaxtok[@]}" "$@")" "$redirect"
      continue
    fi
    if [[ $i == 0 ]]; then
      env "${settings[@]}" "${jaxtok[@]}" "$@" &
    elif [[ $logs ]]; then
      env "${settings[@]}" "${jaxtok[@]}" "$@" >>"$logs/$i.log" 2>&1 &
    else
      exec 3> >(prefixed "$i" >&2)
      printers+=("$!")
      env "${settings[@]}" "${jaxtok[@]}" "$@" >&3 2>&1 3>&- &
    fi
    processes[i]=$!
    exec 3>&-
  done
}

send() {
  ((${#processes[@]} == 0)) || kill -s "$1" "${processes[@]}" 2>/dev/null || true
}

# Waits for all processes; leaves the exit code in `result`.
finish() {
  local i code kill_at="" failed=""
  result=0
  while ((${#processes[@]})); do
    for i in "${!processes[@]}"; do
      ! kill -0 "${processes[i]}" 2>/dev/null || continue
      code=0
      wait "${processes[i]}" 2>/dev/null || code=$?
      unset "processes[i]"
      [[ ! $failed && $code != 0 ]] || continue
      result=$code
      if [[ $code != "$INTERRUPTED" ]]; then
        failed=1
        say "process $i ended with exit code $code; ending the others."
        send TERM
        kill_at=$((SECONDS + grace))
      fi
    done
    if [[ $kill_at && $SECONDS -ge $kill_at ]]; then send KILL; fi
    sleep 0.1 || true
  done
  for ((i = 0; i < 20; i++)); do # their last lines
    if ((${#printers[@]} == 0)) || ! kill -0 "${printers[@]}" 2>/dev/null; then break; fi
    sleep 0.1 || true
  done
  printers=()
}

if [[ $dry_run ]]; then
  start "$@"
  echo "wait"
  [[ $restarts == 0 ]] || echo "# all again while the exit code is $INTERRUPTED, at most $restarts times"
  exit 0
fi

trap 'stopped=1; send TERM' TERM INT
for ((attempt = 1; ; attempt++)); do
  start "$@"
  [[ ! $stopped ]] || send TERM # a signal that came while they were being started
  finish
  if [[ $result != "$INTERRUPTED" || $stopped || $attempt -gt $restarts ]]; then exit "$result"; fi
  say "interrupted; starting again ($attempt of $restarts)."
done
