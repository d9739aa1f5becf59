# shellcheck shell=bash
# What the launchers share; sourced, not run. For bash 3.2 (macOS) and newer: no associative arrays, no ${x,,}, no wait -n,
# and an array that may be empty is written ${a[@]+"${a[@]}"}.

# Exit codes of the launchers, beside the program's own (0 done, 1 a user's error, 75 again, 76 a peer died).
# shellcheck disable=SC2034
readonly EX_USAGE=64 EX_SETUP=69 EX_NO_CAPACITY=73 EX_AGAIN=75 EX_PEER=76 EX_STOPPED=77

DRY_RUN=${DRY_RUN:-}
PROGRAM_NAME=${0##*/}

say() { printf '%s: %s\n' "$PROGRAM_NAME" "$*" >&2; }

# die SENTENCE: ends with what the user did wrong.
die() {
  say "error: $*"
  exit "$EX_USAGE"
}

# quoted WORD...: the words as a shell would have to read them, on one line.
quoted() {
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}

# run WORD...: runs a command and shows it; with --dry-run shows it only.
run() {
  if [[ $DRY_RUN ]]; then
    quoted "$@"
    printf '\n'
  else
    printf '+ %s\n' "$(quoted "$@")" >&2
    "$@"
  fi
}

# ask WORD...: a query, not shown because it is asked again and again; with --dry-run shown and not run.
ask() {
  if [[ $DRY_RUN ]]; then run "$@"; else "$@"; fi
}

# help_of FILE: the comment at the top of a script is its --help.
help_of() { sed -n '2,/^[^#]/{/^#/{s/^# \{0,1\}//;p;};}' "$1"; }

# help_without COMMAND: the help of the script that calls it, and the end, where no command is given or help is asked for.
help_without() {
  case $1 in
    '' | -h | --help | help)
      help_of "${BASH_SOURCE[1]}"
      exit 0
      ;;
  esac
}

need_program() { command -v "$1" >/dev/null 2>&1 || die "$1 is not installed or not on PATH: $2"; }

need() { [[ -n $2 ]] || die "$1 is missing: $3"; }

# doubled SECONDS MOST: for pauses that grow.
doubled() { awk -v now="$1" -v most="$2" 'BEGIN { now *= 2; print (now > most) ? most : now }'; }

# Google Cloud's rule for names of slices and jobs; $2 says how long they may be.
check_name() {
  local pattern='^[a-z]([-a-z0-9]*[a-z0-9])?$'
  if ! [[ $1 =~ $pattern ]] || ((${#1} > $2)); then
    die "--name=$(quoted "$1") is no resource name: lower-case letters, digits and hyphens, first a letter, last no hyphen, at most $2 characters (the run's own name, --run-id, may be anything)"
  fi
}

check_number() { [[ $2 =~ ^[0-9]+(\.[0-9]+)?$ ]] || die "$1=$(quoted "$2") is no number"; }

check_count() { [[ $2 =~ ^[0-9]+$ ]] || die "$1=$(quoted "$2") is no whole number"; }

# check_variable FLAG NAME: a name of an environment variable.
check_variable() { [[ $2 =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || die "$1: $(quoted "$2") is no name of an environment variable"; }

# Values given with --env are visible to whoever reads the command line: what looks like a credential is refused there.
check_env() {
  [[ $1 == *=* ]] || die "--env=$(quoted "$1") has no value: write --env=NAME=VALUE"
  check_variable --env "${1%%=*}"
  local upper
  upper=$(printf '%s' "${1%%=*}" | tr '[:lower:]' '[:upper:]')
  case $upper in
    *TOKEN* | *SECRET* | *PASSWORD* | *API_KEY* | *CREDENTIAL*)
      die "--env=${1%%=*}=... would show a credential on command lines: use --secret, see launch/README.md"
      ;;
  esac
}

# work_dir BUCKET RUN_ID WORKDIR: where the run lives: a place that all workers share and that outlives them.
work_dir() {
  local place=$3
  if [[ -z $place ]]; then
    [[ -n $1 ]] || die "say where the run lives, on storage that outlives the machines: --bucket=gs://BUCKET (then it is gs://BUCKET/runs/RUN_ID) or --workdir=gs://BUCKET/FOLDER"
    case $2 in
      '' | . | .. | */* | *$'\n'* | *$'\r'*) die "--run-id=$(quoted "$2") must be one name without slashes and line ends" ;;
    esac
    place=gs://${1#gs://}
    place=${place%/}/runs/$2
  fi
  case $place in
    gs://?* | /*) ;;
    *) die "--workdir=$(quoted "$place") is neither gs://BUCKET/FOLDER nor an absolute path on a file system that all workers mount" ;;
  esac
  printf '%s' "$place"
}

# check_program_args ARG...: what goes to `python -m selfplay_jax.main`, apart from what the launcher itself passes.
check_program_args() {
  local arg config=
  for arg in "$@"; do
    case $arg in
      --config=?* | -config=?*) config=1 ;;
      --workdir | --workdir=* | -workdir=*) die "give --workdir to the launcher, before the --, not to the program: resuming depends on it" ;;
      --dry-run) die "write --dry-run before the --; after it, it would go to the program and the run would be real" ;;
      --coordinator* | --num_processes* | --process_id*) die "$arg is the launcher's business: leave it out" ;;
    esac
  done
  [[ $config ]] || die "say what to run after --, for example: -- --config=configs/tpaw.py:gsm8k_qwen2.5_1.5b"
}

# slice_of TYPE: sets CHIPS, TOPOLOGY, CHIPS_PER_NODE and GENERATION of an accelerator type such as v5litepod-16 or v5p-32.
# The number in the name counts chips for v5e and v6e, cores (two per chip) for v4 and v5p.
slice_of() {
  local family=${1%-*} size=${1##*-}
  CHIPS=0 TOPOLOGY='' CHIPS_PER_NODE=4 GENERATION=''
  [[ $1 == *-* && $size =~ ^[0-9]+$ ]] || die "--accelerator-type=$(quoted "$1") is not like v5litepod-16, v6e-8, v5p-32 or v4-32"
  case $family in
    v5litepod | v5e) GENERATION=v5e CHIPS=$size ;;
    v6e) GENERATION=v6e CHIPS=$size ;;
    v5p | v4) GENERATION=$family CHIPS=$((size / 2)) ;;
    *) die "--accelerator-type=$(quoted "$1"): known are v5litepod-N (v5e), v6e-N, v5p-N and v4-N" ;;
  esac
  case $GENERATION:$CHIPS in
    v5e:1 | v6e:1) TOPOLOGY=1x1 CHIPS_PER_NODE=1 ;;
    v5e:4 | v6e:4) TOPOLOGY=2x2 ;;
    v5e:8 | v6e:8) TOPOLOGY=2x4 CHIPS_PER_NODE=8 ;;
    v5e:16 | v6e:16) TOPOLOGY=4x4 ;;
    v5e:32 | v6e:32) TOPOLOGY=4x8 ;;
    v5e:64 | v6e:64) TOPOLOGY=8x8 ;;
    v5e:128 | v6e:128) TOPOLOGY=8x16 ;;
    v5e:256 | v6e:256) TOPOLOGY=16x16 ;;
    v4:4 | v5p:4) TOPOLOGY=2x2x1 ;;
    v4:8 | v5p:8) TOPOLOGY=2x2x2 ;;
    v4:16 | v5p:16) TOPOLOGY=2x2x4 ;;
    v4:32 | v5p:32) TOPOLOGY=2x4x4 ;;
    v4:64 | v5p:64) TOPOLOGY=4x4x4 ;;
    v4:128 | v5p:128) TOPOLOGY=4x4x8 ;;
    v4:256 | v5p:256) TOPOLOGY=4x8x8 ;;
    v4:512 | v5p:512) TOPOLOGY=8x8x8 ;;
  esac
  case $GENERATION in
    v5e | v6e) [[ $TOPOLOGY ]] || die "--accelerator-type=$1: v5e and v6e come in 1, 4, 8, 16, 32, 64, 128 and 256 chips" ;;
    *) ((size > 0 && size % 8 == 0)) || die "--accelerator-type=$1: the number of a v4 or v5p counts cores and is a multiple of 8" ;;
  esac
}
