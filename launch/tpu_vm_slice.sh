# shellcheck shell=bash
# shellcheck disable=SC2154  # tpu_vm.sh, which sources this, reads the options
# Each do_... ends the script where it fails. The slice: asking for it, waiting, its state, installing, giving it back.

queued() { gcloud compute tpus queued-resources "$@"; }

# state_by WORD...: what a describe command answers, or GONE, or UNKNOWN when the question could not be answered.
state_by() {
  local why
  "$@" 2>/dev/null && return
  why=$("$@" 2>&1 >/dev/null) || true
  if [[ $why == *NOT_FOUND* || $why == *"was not found"* ]]; then printf GONE; else printf UNKNOWN; fi
}

slice_state() { state_by queued describe "$name" "${where[@]}" --format='value(state.state)'; }

node_state() { state_by gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(state)'; }

# health: prints healthy, lost or unknown.
health() {
  local request node
  request=$(slice_state)
  case $request in
    ACTIVE) ;;
    UNKNOWN) printf unknown && return ;;
    *) printf lost && return ;;
  esac
  node=$(node_state)
  case $node in
    READY) printf healthy ;;
    PREEMPTED | TERMINATED | DELETING | GONE | STOPPED | STOPPING) printf lost ;;
    *) printf unknown ;; # UNKNOWN, REPAIRING, RESTARTING, ...
  esac
}

do_create() {
  local words=(gcloud compute tpus queued-resources create "$name" --node-id="$name" "${where[@]}"
    --accelerator-type="$accelerator" --runtime-version="$(runtime_version)"
    --scopes=https://www.googleapis.com/auth/cloud-platform)
  [[ -z $tier ]] || words+=("$tier")
  [[ -z $service_account ]] || words+=(--service-account="$service_account")
  [[ -z $network ]] || words+=(--network="$network")
  [[ -z $subnetwork ]] || words+=(--subnetwork="$subnetwork")
  [[ -z $internal_ips ]] || words+=(--internal-ips)
  # Then the request lapses by itself, though this machine may be asleep.
  ((wait_timeout == 0)) || words+=(--valid-until-duration="${wait_timeout}s")
  if [[ -z $DRY_RUN ]]; then
    local state
    state=$(slice_state)
    case $state in
      GONE | UNKNOWN) ;;
      SUSPENDING | SUSPENDED | FAILED | DELETING)
        say "$name exists and is $state: delete it first (launch/tpu_vm.sh delete)"
        exit "$EX_AGAIN"
        ;;
      *)
        say "$name exists already and is $state: going on with it"
        return 0
        ;;
    esac
  fi
  run "${words[@]}" || {
    say "the slice was not accepted; gcloud says why above (quota, zone, accelerator type or permissions)"
    exit "$EX_SETUP"
  }
}

runtime_version() {
  if [[ $runtime ]]; then
    printf '%s' "$runtime"
    return
  fi
  case $GENERATION in
    v5e) printf v2-alpha-tpuv5-lite ;;
    v5p) printf v2-alpha-tpuv5 ;;
    v6e) printf v2-alpha-tpuv6e ;;
    v4) printf tpu-ubuntu2204-base ;;
  esac
}

do_wait() {
  if [[ $DRY_RUN ]]; then
    printf '# every %s s until ACTIVE:\n' "$poll"
    ask gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)'
    return
  fi
  local state='' before='' unanswered=0 begun=$SECONDS
  while :; do
    state=$(slice_state)
    [[ $state == "$before" ]] || say "$name is $state ($((SECONDS - begun)) s)"
    before=$state
    case $state in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING | GONE)
        say "the request for $name came to nothing: $state$(reason)"
        exit "$EX_AGAIN"
        ;;
      UNKNOWN)
        unanswered=$((unanswered + 1))
        if ((unanswered >= unreachable)); then
          say "the state of $name could not be read $unanswered times in a row: is gcloud logged in?"
          exit "$EX_SETUP"
        fi
        ;;
      *) unanswered=0 ;;
    esac
    if ((wait_timeout > 0 && SECONDS - begun >= wait_timeout)); then
      say "no capacity within $wait_timeout s; the request still stands: launch/tpu_vm.sh delete takes it back"
      exit "$EX_NO_CAPACITY"
    fi
    sleep "$poll"
  done
}

reason() {
  local text
  text=$(queued describe "$name" "${where[@]}" --format='value(state.failedData.error.message)' 2>/dev/null) || text=
  [[ -z $text ]] || printf ', %s' "$text"
}

# on WORKERS COMMAND_LINE: ssh. The command line is read by a shell on the VM; build it with `quoted`.
on() {
  local words=(gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2")
  [[ -z $internal_ips ]] || words+=(--internal-ip)
  "${SHOW:-ask}" "${words[@]}" </dev/null
}

do_install() {
  local parcel folder words
  [[ $DRY_RUN ]] || ask_workers
  if [[ ${running-} ]]; then
    say "the program runs on worker(s)$running: nothing is installed over it"
    return
  fi
  if [[ $DRY_RUN ]]; then folder=${TMPDIR:-/tmp}/selfplay_jax.XXXXXX; else folder=$(mktemp -d "${TMPDIR:-/tmp}/selfplay_jax.XXXXXX"); fi
  parcel=$folder/selfplay_jax.tar.gz
  words=(gcloud compute tpus tpu-vm scp "$parcel" "$name:selfplay_jax.tar.gz" "${where[@]}" --worker=all)
  [[ -z $internal_ips ]] || words+=(--internal-ip)
  # -m: make goes by time, and the archive's times are the commit's.
  local unpack='mkdir -p selfplay_jax && tar -xzmf selfplay_jax.tar.gz -C selfplay_jax && bash selfplay_jax/launch/worker.sh install'
  local code=0
  {
    run git -C "$root" archive --format=tar.gz --output="$parcel" "$(source_revision)" &&
      run "${words[@]}" </dev/null &&
      SHOW=run on all "$unpack"
  } || code=$?
  [[ $DRY_RUN ]] || rm -rf "$folder"
  ((code != 0)) || return 0
  if [[ $(health) == lost ]]; then
    say "$name was taken away during the installation"
    exit "$EX_AGAIN"
  fi
  say "the installation failed with code $code; if ssh was refused: eval \$(ssh-agent); ssh-add ~/.ssh/google_compute_engine"
  exit "$EX_SETUP"
}

# The tracked files as they are, or the revision asked for.
source_revision() {
  local changed=''
  if [[ $revision ]]; then
    printf '%s' "$revision"
  elif [[ $DRY_RUN ]]; then
    printf HEAD
  else
    # A commit of the files as they are, on no branch; nothing in the checkout changes.
    changed=$(git -C "$root" stash create) || say "the changes in this checkout could not be packed: HEAD is installed"
    [[ -z $(git -C "$root" ls-files --others --exclude-standard) ]] || say "files that git does not track stay here"
    printf '%s' "${changed:-HEAD}"
  fi
}

do_delete() {
  run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force || {
    if [[ $(slice_state) == GONE ]]; then
      say "there is no $name"
      return 0
    fi
    say "$name was not deleted and may go on costing money"
    exit "$EX_SETUP"
  }
}
