#!/usr/bin/env bash
# Keeps a run on a Cloud TPU slice alive until it is done.
#
# usage: launch/babysit.sh --name=NAME --zone=ZONE --bucket=gs://BUCKET [options] -- ARGS of python -m selfplay_jax.main
#
# All options of launch/tpu_vm.sh (see its --help) and
#   --max-preemptions=N   how often capacity may be taken away, before or during the run; default 1000
#   --max-failures=N      how many failures of set-up or program are answered with another try; default 3
#   --good-run=SECONDS    a run that lasted this long sets the count of failures back; default 3600
#   --backoff=SECONDS     pause before the next try, doubled from try to try; default 15
#   --max-backoff=SECONDS longest pause; a run that lasts longer than this sets the pause back; default 600
#   --settle=SECONDS      after 75 and 76, before the slice is asked for its health: that news comes late; default 60
#   --keep                leave the slice standing at the end; it goes on costing money
#   --dry-run             print each command and run none
#
# Asks for the slice, installs, starts, watches. What happens next goes by how it ends:
#   0                     done: the slice is given back
#   1                     an error the user can mend: the end, no other try
#   64                    wrong options: the end
#   77                    somebody stopped the run with `launch/tpu_vm.sh stop`: the end; the same command resumes
#   75, 73                taken away, or no capacity in time: a preemption. Is the slice gone it is deleted and asked for
#                         again, is it healthy the program is started again where it is, is it in the queue it is waited for
#   others                a failure, also 76 (a peer died) on a slice that is healthy; started again in the same way. A
#                         healthy slice whose workers were silent for --unreachable seconds is deleted and asked for again
# While the slice's state cannot be read (this machine's network, an expired login) nothing is counted or deleted; babysit
# says so and waits. The code is packed once, at the start: a later change of the checkout reaches no worker.
# The run id and with it the workdir stay the same, so every start resumes. Running babysit itself again (another
# machine, a closed laptop) picks up the slice and the run that it finds.
# The exit code is the last one above, 75 after a stop. A signal ends babysit, not the run; it says what still runs.
set -Eeuo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$launch/common.sh"

max_preemptions=1000 max_failures=3 good_run=3600 backoff=15 max_backoff=600 settle=60 keep=''
passed=() program=()
while (($#)); do
  case $1 in
    -h | --help)
      help_of "${BASH_SOURCE[0]}"
      exit 0
      ;;
    --max-preemptions=*) check_count "${1%%=*}" "${1#*=}" && max_preemptions=${1#*=} ;;
    --max-failures=*) check_count "${1%%=*}" "${1#*=}" && max_failures=${1#*=} ;;
    --good-run=*) check_count "${1%%=*}" "${1#*=}" && good_run=${1#*=} ;;
    --backoff=*) check_number "${1%%=*}" "${1#*=}" && backoff=${1#*=} ;;
    --max-backoff=*) check_number "${1%%=*}" "${1#*=}" && max_backoff=${1#*=} ;;
    --settle=*) check_number "${1%%=*}" "${1#*=}" && settle=${1#*=} ;;
    --keep) keep=1 ;;
    --dry-run) DRY_RUN=1 passed+=("$1") ;;
    --)
      program=("$@")
      break
      ;;
    --max-preemptions | --max-failures | --good-run | --backoff | --max-backoff | --settle) die "$1: write $1=VALUE" ;;
    *) passed+=("$1") ;;
  esac
  shift
done

tpu_vm() {
  local what=$1
  shift
  "$launch/tpu_vm.sh" "$what" ${passed[@]+"${passed[@]}"} "$@" ${program[@]+"${program[@]}"}
}

# Wrong options end it here, before anything exists.
tpu_vm run --dry-run >/dev/null 2>&1 || tpu_vm run --dry-run >/dev/null

if [[ $DRY_RUN ]]; then
  tpu_vm up
  tpu_vm run
  printf '# on a preemption (at most %s) or a failure (at most %s), if the slice is gone: delete, and all of the above again\n' \
    "$max_preemptions" "$max_failures"
  [[ $keep ]] || printf '# at the end:\n'
  [[ $keep ]] || tpu_vm delete
  exit 0
fi

# Whatever runs is a child in a process group of its own, so that a signal gets through to gcloud at once.
child=''
in_background() {
  local code=0
  set -m
  "$@" </dev/null &
  child=$!
  set +m
  wait "$child" || code=$?
  child=''
  return "$code"
}

interrupted() {
  trap '' INT TERM HUP
  if [[ $child ]]; then
    kill -TERM -- "-$child" 2>/dev/null || true
    wait "$child" 2>/dev/null || true
  fi
  say "ended by a signal; what was started goes on without it:"
  tpu_vm status || true
  say "the same command picks it up again; launch/tpu_vm.sh stop (with the same options) ends the run, launch/tpu_vm.sh delete the costs"
  exit "$1"
}
trap 'interrupted 130' INT
trap 'interrupted 143' TERM HUP

own=$(mktemp -d "${TMPDIR:-/tmp}/selfplay_jax.XXXXXX")
trap 'rm -rf "$own"' EXIT
passed+=(--parcel="$own/selfplay_jax.tar.gz")

# finish CODE SENTENCE
finish() {
  say "$2"
  if [[ $keep ]]; then
    say "the slice was kept (--keep): if it stands, it costs money until launch/tpu_vm.sh delete"
  else
    in_background tpu_vm delete || true
  fi
  exit "$1"
}

wait_before_retry() {
  ((SECONDS - begun <= ${max_backoff%.*})) || pause=$backoff
  say "next try in $pause s"
  in_background sleep "$pause"
  pause=$(doubled "$pause" "$max_backoff")
}

# Sets `health`, and `blind` if it could not be learned at once.
look_at_health() {
  local nap=$backoff
  blind=''
  while :; do
    health=$(tpu_vm health) || health=unknown
    [[ $health == unknown ]] || return 0
    blind=1
    say "the slice's state cannot be read; looking again in $nap s, nothing is counted or deleted meanwhile"
    in_background sleep "$nap"
    nap=$(doubled "$nap" 300)
  done
}

in_background tpu_vm pack || exit "$EX_SETUP"
preemptions=0 failures=0 pause=$backoff phase=up
while :; do
  begun=$SECONDS code=0
  if [[ $phase == up ]]; then
    in_background tpu_vm up || code=$?
    ((code != 0)) || phase=run
  fi
  if [[ $phase == run ]]; then
    run_begun=$SECONDS
    in_background tpu_vm run || code=$?
    ((SECONDS - run_begun < good_run)) || failures=0
  fi

  case $code in
    0) finish 0 "done" ;;
    1) finish 1 "the program says what to mend (above); no other try would help" ;;
    "$EX_USAGE") exit "$EX_USAGE" ;;
    "$EX_STOPPED") finish "$EX_AGAIN" "the run was stopped on request; the same command resumes it" ;;
    "$EX_AGAIN" | "$EX_PEER") in_background sleep "$settle" ;;
  esac
  look_at_health
  if [[ $phase == up && $code == "$EX_SETUP" && $blind ]]; then
    continue
  elif [[ $code == "$EX_AGAIN" || $code == "$EX_NO_CAPACITY" || $code == "$EX_PEER" && $health == lost ]]; then
    preemptions=$((preemptions + 1))
    ((preemptions <= max_preemptions)) || finish "$EX_AGAIN" "preempted $preemptions times: giving up; the same command resumes"
    say "preemption $preemptions (at most $max_preemptions); the slice is $health"
  else
    failures=$((failures + 1))
    ((failures <= max_failures)) || finish "$code" "failure $failures with code $code: giving up; the same command resumes"
    say "failure $failures (at most $max_failures) with code $code; the slice is $health"
  fi

  # A healthy slice that does not answer is of no use either.
  if [[ $health == lost || $code == "$EX_NO_CAPACITY" ]] || [[ $phase == run && $code == "$EX_SETUP" ]]; then
    in_background tpu_vm delete || true
    phase=up
  fi
  wait_before_retry
done
