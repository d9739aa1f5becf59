# shellcheck shell=bash
# shellcheck disable=SC2154  # tpu_vm.sh, which sources this, reads the options
# The program on the workers: start, watch, logs, status, stop.

remote() { quoted bash selfplay_jax/launch/worker.sh "$@"; }

# Workers on which the program runs already do nothing, so that a start may be repeated.
do_start() {
  local tries=0 code line silent_since='' silences=0 workers=''
  line=$(remote start "$name" "$workdir" ${worker_options[@]+"${worker_options[@]}"} -- "${program_args[@]}")
  say "$name: run in $workdir"
  while :; do
    code=0
    SHOW=run on all "$line" || code=$?
    ((code != 0)) || return 0
    if ((code == 127)); then
      say "the program is not installed on $name: launch/tpu_vm.sh install"
      exit "$EX_SETUP"
    fi
    ask_workers
    if all_answer; then
      tries=$((tries + 1)) silent_since=
      say "the program could not be started on all workers (code $code, try $tries of 3)"
      ((tries < 3)) || exit "$EX_SETUP"
      sleep "$poll"
    else
      unanswered "$name was taken away before the program started"
    fi
  done
}

# Whether the question before was answered by all workers. Sets `workers`.
all_answer() {
  [[ $workers =~ ^[1-9][0-9]*$ ]] ||
    workers=$(gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(networkEndpoints.len())' 2>/dev/null) || workers=
  [[ $workers =~ ^[1-9][0-9]*$ ]] && ((answered >= workers))
}

# unanswered SENTENCE: after a question that not all workers answered. Ends with 75 and SENTENCE if the slice is gone; with
# 69 if it is healthy and was silent for --unreachable seconds; waits otherwise. A laptop that slept counts too, so three
# questions at least.
unanswered() {
  health
  if [[ $how == healthy && $ssh_trouble ]]; then how=unknown why=$ssh_trouble; fi
  case $how in
    lost)
      say "$1"
      exit "$EX_AGAIN"
      ;;
    healthy)
      sighted
      if [[ -z $silent_since ]]; then
        silent_since=$SECONDS silences=0
        say "$answered of ${workers:-?} workers answer although $name is healthy; it is given up after $unreachable s of that"
      fi
      silences=$((silences + 1))
      if ((silences >= 3 && SECONDS - silent_since >= unreachable)); then
        say "$answered of ${workers:-?} workers answer since $((SECONDS - silent_since)) s: $name is out of reach"
        exit "$EX_SETUP"
      fi
      sleep "$poll"
      ;;
    *)
      silent_since='' why=${why:-it is $how}
      blind
      ;;
  esac
}

# A folder of this process's own, `scratch`.
scratch=''
own_folder() {
  if [[ $DRY_RUN ]]; then
    scratch=${TMPDIR:-/tmp}/selfplay_jax.XXXXXX
  elif [[ -z $scratch ]]; then
    scratch=$(mktemp -d "${TMPDIR:-/tmp}/selfplay_jax.XXXXXX")
    # shellcheck disable=SC2064  # this folder, now
    trap "rm -rf $(quoted "$scratch")" EXIT
  fi
}

# One question to all workers. Sets how many answered and, per kind, lists of workers' numbers or number:code.
ask_workers() {
  local answer word index what code
  own_folder
  answer=$(on all "$(remote status "$name")" 2>"$scratch/ssh") || true
  ssh_trouble=
  if grep -q 'not present in the SSH agent' "$scratch/ssh"; then
    ssh_trouble='your ssh agent does not hold gcloud'\''s key: ssh-add ~/.ssh/google_compute_engine'
  fi
  answered=0 running='' codes='' failed='' stopped='' lost='' absent=''
  while read -r word index what code; do
    [[ $word == selfplay-worker ]] || continue
    answered=$((answered + 1))
    case $what in
      running) running="$running $index" ;;
      stopped) stopped="$stopped $index" codes="$codes $index:$code" ;;
      exited)
        codes="$codes $index:$code"
        [[ $code == 0 ]] || failed="$failed $index:$code"
        ;;
      absent) absent="$absent $index" ;;
      *) lost="$lost $index" ;;
    esac
  done <<<"$answer"
}

# The one code for all workers' codes, "0:76 1:139".
one_code() {
  local pair code other='' again='' peer='' done_=''
  for pair in $1; do
    code=${pair#*:}
    case $code in
      0) done_=0 ;;
      1)
        printf 1
        return
        ;;
      "$EX_AGAIN") again=$code ;;
      "$EX_PEER") peer=$code ;;
      *) other=${other:-$code} ;;
    esac
  done
  printf '%s' "${again:-${other:-${peer:-${done_:-$EX_SETUP}}}}"
}

# Prints what worker 0 has logged since the last time.
show_log() {
  local part=$scratch/log
  if on 0 "$(remote log "$name" "$offset")" >"$part" 2>/dev/null; then
    cat "$part"
    offset=$((offset + $(wc -c <"$part")))
  fi
}

do_watch() {
  if [[ $DRY_RUN ]]; then
    printf '# every %s s until the program has ended on all workers:\n' "$poll"
    on all "$(remote status "$name")"
    on 0 "$(remote log "$name" 0)"
    return
  fi
  local workers='' silent_since='' silences=0 offset=0 first_failure='' failed_at=0
  while :; do
    ask_workers
    if ! all_answer; then
      unanswered "$name was taken away"
      continue
    fi
    silent_since=
    sighted
    show_log
    if [[ -z $running$codes$lost ]]; then
      say "no run was started on $name: launch/tpu_vm.sh start"
      exit "$EX_SETUP"
    elif [[ $lost$absent ]]; then
      say "the program is gone from worker(s)$lost$absent without an exit code: the VM was restarted"
      kill_rest
      exit "$EX_AGAIN"
    elif [[ -z $running ]]; then
      conclude
    elif [[ $failed && -z $first_failure ]]; then
      first_failure=$failed failed_at=$SECONDS
      say "ended (worker:code)$failed while$running still run; they get $grace s to notice"
    elif [[ $first_failure ]] && ((SECONDS - failed_at >= grace)); then
      say "worker(s)$running did not end by themselves: ending them"
      kill_rest
      codes=$first_failure stopped=''
      conclude
    fi
    sleep "$poll"
  done
}

kill_rest() { on all "$(remote stop "$name" KILL)" >/dev/null 2>&1 || true; }

# All workers have ended: say how, and end with the run's code.
conclude() {
  local code
  code=$(one_code "$codes")
  say "ended (worker:code)$codes"
  case $code in
    0 | "$EX_AGAIN") ;;
    *) on all "$(remote tail "$name" "$lines")" 2>/dev/null || true ;;
  esac
  if [[ $stopped && $code != 1 ]]; then
    say "stopped on request; start with the same run id goes on"
    exit "$EX_STOPPED"
  fi
  # The end of a slice has many faces: a bucket out of reach, a dead peer, a kill.
  [[ $code != 0 ]] || exit 0
  health
  if [[ $how == lost ]]; then
    say "$name was taken away"
    exit "$EX_AGAIN"
  fi
  exit "$code"
}

do_logs() { on all "$(remote tail "$name" "$lines")"; }

do_status() {
  if [[ $DRY_RUN ]]; then
    ask_states
    on all "$(remote status "$name")"
    return
  fi
  slice_state
  printf 'slice %s: %s\n' "$name" "$state${why:+ ($why)}"
  [[ $state == ACTIVE ]] || return 0
  node_state
  printf 'node %s: %s, billed until launch/tpu_vm.sh delete\n' "$name" "$state"
  on all "$(remote status "$name")" 2>/dev/null || say "not all workers answer"
}

do_stop() {
  SHOW=run on all "$(remote stop "$name")" || true
  if [[ $DRY_RUN ]]; then
    [[ -z $force ]] || on all "$(remote stop "$name" KILL)"
    return
  fi
  local begun=$SECONDS answered running codes failed stopped lost
  while ask_workers && [[ $running ]] || ((answered == 0)); do
    if ((SECONDS - begun >= grace)); then
      if [[ -z $force ]]; then
        say "still running on worker(s)$running after $grace s; --force ends them without a save"
        exit "$EX_SETUP"
      fi
      SHOW=run on all "$(remote stop "$name" KILL)" || true
      break
    fi
    if ((answered == 0)); then
      health
      if [[ $how == lost ]]; then
        say "$name was taken away"
        return
      fi
    fi
    sleep "$poll"
  done
  say "the program has ended; the slice $name still stands and costs money until launch/tpu_vm.sh delete"
}
