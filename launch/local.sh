#!/usr/bin/env bash
# A run of several processes on this machine.
#
# usage: launch/local.sh -n N [options] -- ARGS of python -m selfplay_jax.main
#
#   -n N                       processes
#   --devices-per-process=D    CPU devices that each process simulates
#   --gpus=G                   share the machine's G GPUs out, G/N to each process (CUDA_VISIBLE_DEVICES)
#   --port=P                   of the coordinator; default a free one
#   --grace=SECONDS            how long the others may take to end after one has failed, then SIGKILL; default 60
#   --settle=SECONDS           how long after a 75 or 76, whose cause may be another process, the others go on; default 5
#   --program=COMMAND          another command line in place of `python -m selfplay_jax.main`, read by a shell
#   --dry-run                  print each command and run none
#
# Output lines carry the process's number. SIGTERM, SIGINT and Ctrl-C go to the processes as SIGTERM: they save and end
# with 75; a second one kills. PYTHON names the interpreter, default .venv/bin/python of this checkout.
# Exit code: 0 where all ended with 0; where one failed, its code; where none failed and one ended with 75 ("again"), 75.
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$launch/common.sh"

n='' devices='' gpus='' port='' grace=60 settle=5 program=''
while (($#)); do
  case $1 in
    -h | --help)
      help_of "${BASH_SOURCE[0]}"
      exit 0
      ;;
    -n)
      (($# > 1)) || die "-n needs a number of processes"
      n=$2
      shift
      ;;
    -n*) n=${1#-n} ;;
    --devices-per-process=*) devices=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --port=*) port=${1#*=} ;;
    --grace=*) grace=${1#*=} ;;
    --settle=*) settle=${1#*=} ;;
    --program=*) program=${1#*=} ;;
    --dry-run) DRY_RUN=1 ;;
    --)
      shift
      break
      ;;
    *) die "unexpected $(quoted "$1"): see --help; what goes to the program comes after --" ;;
  esac
  shift
done
need -n "$n" "how many processes, for example -n 2"
check_count -n "$n"
((n > 0)) || die "-n=0: at least one process"
check_count --grace "$grace"
check_count --settle "$settle"
[[ -z $devices ]] || check_count --devices-per-process "$devices"
[[ -z $port ]] || check_count --port "$port"
if [[ $gpus ]]; then
  check_count --gpus "$gpus"
  ((gpus >= n && gpus % n == 0)) || die "--gpus=$gpus cannot be shared out among $n processes"
fi
if [[ $program ]]; then
  eval "words=($program)"
else
  python=${PYTHON:-${launch%/*}/.venv/bin/python}
  [[ $DRY_RUN ]] || command -v "$python" >/dev/null || die "there is no $python: run \`make setup\`, or name one with PYTHON=..."
  words=("$python" -m selfplay_jax.main)
fi

# A port to which nobody answers, asked by bash itself.
free_port() {
  local candidate
  while :; do
    candidate=$((20000 + (RANDOM * 32768 + RANDOM) % 40000))
    (exec 3<>"/dev/tcp/127.0.0.1/$candidate") 2>/dev/null || break
  done
  printf '%s' "$candidate"
}
port=${port:-$(free_port)}

# command_of I ARG...: sets `line`, the command of process I.
command_of() {
  local i=$1 first last
  shift
  line=(env)
  if [[ $devices ]]; then
    line+=(JAX_PLATFORMS=cpu "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices")
  fi
  if [[ $gpus ]]; then
    first=$((i * gpus / n)) last=$(((i + 1) * gpus / n - 1))
    line+=("CUDA_VISIBLE_DEVICES=$(seq -s , "$first" "$last" | sed 's/,$//')")
  fi
  line+=(PYTHONUNBUFFERED=1 "${words[@]}" "--coordinator=localhost:$port" "--num_processes=$n" "--process_id=$i" "$@")
}

if [[ $DRY_RUN ]]; then
  for ((i = 0; i < n; i++)); do
    command_of "$i" "$@"
    run "${line[@]}"
  done
  exit 0
fi

scratch=$(mktemp -d "${TMPDIR:-/tmp}/selfplay_jax.XXXXXX")
pids=() readers=() state=() # state: running, or the exit code
asked=''

tell_all() { # tell_all SIGNAL: to those that still run, with their children
  local j
  for ((j = 0; j < ${#pids[@]}; j++)); do
    [[ ${state[j]} != running ]] || kill "-$1" -- "-${pids[j]}" 2>/dev/null || true
  done
}

# shellcheck disable=SC2329  # the trap calls it
asked_to_end() {
  if [[ $asked ]]; then
    say "killing all processes"
    tell_all KILL
  else
    asked=1
    say "passing SIGTERM on; once more kills"
    tell_all TERM
  fi
}
trap asked_to_end INT TERM HUP
trap 'tell_all KILL; rm -rf "$scratch"' EXIT

for ((i = 0; i < n; i++)); do
  mkfifo "$scratch/$i"
  # The reader ends when the last writer has closed the pipe; it must outlive Ctrl-C.
  (
    trap '' INT TERM HUP
    while IFS= read -r text || [[ $text ]]; do printf '[%d] %s\n' "$i" "$text"; done <"$scratch/$i"
  ) &
  readers[i]=$!
  command_of "$i" "$@"
  set -m # a process group of its own: signals reach it once, from here
  "${line[@]}" </dev/null >"$scratch/$i" 2>&1 &
  set +m
  pids[i]=$! state[i]=running
done

failed='' again='' tell_at='' deadline=''
# collect: notes who has ended since the last time, and ends the others when one has ended badly. 75 and 76 have causes
# elsewhere, which may show a moment later; what ends by our own signals is no cause.
collect() {
  local j code
  left=0
  for ((j = 0; j < n; j++)); do
    [[ ${state[j]} == running ]] || continue
    if kill -0 "${pids[j]}" 2>/dev/null; then
      left=$((left + 1))
      continue
    fi
    code=0
    wait "${pids[j]}" || code=$?
    state[j]=$code
    [[ $code != 0 ]] || continue
    say "process $j ended with code $code"
    if [[ $code == "$EX_AGAIN" ]]; then
      again=$code
    elif [[ $code == "$EX_PEER" ]]; then
      failed=${failed:-$code}
    elif [[ -z $deadline || $code != 137 && $code != 143 ]]; then
      if [[ -z $failed || $failed == "$EX_PEER" ]]; then failed=$code; fi
    fi
    tell_at=${tell_at:-$((SECONDS + settle))}
  done
  ((left > 0)) || return 0
  if [[ $failed && $failed != "$EX_PEER" ]]; then tell_at=$SECONDS; fi
  if [[ $tell_at && -z $deadline ]] && ((SECONDS >= tell_at)); then
    deadline=$((SECONDS + grace))
    say "telling the $left others to end; they have $grace s"
    tell_all TERM
  elif [[ $deadline ]] && ((SECONDS >= deadline)); then
    say "killing the $left that are left"
    tell_all KILL
    deadline=$((SECONDS + grace))
  fi
}

left=$n
while ((left > 0)); do
  collect
  ((left == 0)) || sleep 0.1 || true
done

# What they printed last. A grandchild that kept the pipe open does not keep us.
for ((tries = 0; tries < 20; tries++)); do
  kill -0 "${readers[@]}" 2>/dev/null || break
  sleep 0.05
done
kill -KILL "${readers[@]}" 2>/dev/null || true
exit "${failed:-${again:-0}}"
