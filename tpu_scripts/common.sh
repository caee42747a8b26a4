# shellcheck shell=bash disable=SC2034
# What the scripts in this folder share. They source it (bash 4.4 or newer):
#
#   source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

dry_run=""     # set by --dry-run: `run` only prints
INTERRUPTED=75 # the exit code of `jaxtok train` for "saved, the same command resumes"

# Prints the comment at the top of the script.
usage() {
  awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"
}

say() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
}

# Prints one sentence, and exits with the code for wrong usage.
fail() {
  say "$*"
  exit 2
}

# Prints the arguments as one line that a shell reads back as the same arguments.
quoted() {
  local word line=""
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
    line+="$word "
  done
  printf '%s\n' "${line% }"
}

# Runs a command, or prints it.
run() {
  if [[ $dry_run ]]; then quoted "$@"; else "$@"; fi
}

# Fails unless the option (the first argument) has a value (the second).
need() {
  [[ ${2-} && $2 != --* ]] || fail "$1 needs a value."
}

# Fails unless the option's value is a whole number that is at least the third argument.
need_number() {
  need "$@"
  [[ $2 =~ ^[0-9]+$ && $2 -ge $3 ]] || fail "$1 is $2; it must be a whole number, at least $3."
}

# Reads NAME and the options of a TPU VM, in any order; the arguments after them go into `rest`. The first argument
# names the options with a value that a script adds ("--slices ..."); each sets the variable of its name (slices).
name="" zone="" project="" accelerator_type="" version="" spot="" rest=()
tpu_options() {
  local known=" --zone --project $1 " variable
  shift
  while [[ $# -gt 0 ]]; do
    case $1 in
      -h | --help) usage; exit 0 ;;
      --dry-run) dry_run=1; shift ;;
      --spot) spot=1; shift ;;
      --) shift; break ;;
      --*)
        [[ $known == *" $1 "* ]] || fail "there is no option $1; see --help."
        need "$1" "${2-}"
        variable=${1#--}
        printf -v "${variable//-/_}" '%s' "$2"
        shift 2 ;;
      *)
        [[ ! $name ]] || break
        name=$1
        shift ;;
    esac
  done
  rest=("$@")
  [[ $name ]] || fail "give the NAME of the TPU; see --help."
  [[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "NAME is $name; it must be lower-case letters, digits and dashes."
}

# Prints the software version of a TPU VM for JAX, by the type of its accelerator.
runtime_version() {
  case $1 in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-* | v5e-*) echo v2-alpha-tpuv5-lite ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}
