# shellcheck shell=bash
# shellcheck disable=SC2154  # tpu_vm.sh, which sources this, reads the options
# Each do_... ends the script where it fails. The slice: asking for it, waiting, its state, installing, giving it back.

queued() { gcloud compute tpus queued-resources "$@"; }

# state_by WORD...: sets `state` to what a describe command answers, to GONE, to REFUSED when Google says no, or to UNKNOWN
# when the question could not be answered, and `why`.
state_by() {
  why=''
  state=$("$@" 2>/dev/null) && [[ $state ]] && return
  why=$("$@" 2>&1 >/dev/null) || true
  state=UNKNOWN
  case $why in
    *"gcloud auth login"* | *"auth tokens"*) why='gcloud is not logged in: run "gcloud auth login" on this machine' ;;
    *NOT_FOUND* | *"was not found"*) state=GONE ;;
    *PERMISSION_DENIED* | *INVALID_ARGUMENT*) state=REFUSED ;;
  esac
  why=${why//$'\n'/ }
  why=${why:0:300}
}

slice_state() { state_by queued describe "$name" "${where[@]}" --format='value(state.state)'; }

node_state() { state_by gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(state)'; }

# health: sets `how` to healthy, waiting (in the queue), lost, refused or unknown, and `why` for the last two.
health() {
  slice_state
  case $state in
    ACTIVE) node_state ;;
    CREATING | ACCEPTED | PROVISIONING | WAITING_FOR_RESOURCES) how=waiting && return ;;
    SUSPENDING | SUSPENDED | FAILED | DELETING | GONE) how=lost && return ;;
  esac
  case $state in
    READY) how=healthy ;;
    PREEMPTED | TERMINATED | DELETING | GONE | STOPPED | STOPPING) how=lost ;;
    REFUSED) how=refused ;;
    *) # UNKNOWN, REPAIRING, RESTARTING, ...
      how=unknown
      why=${why:-it is $state}
      ;;
  esac
}

do_health() {
  if [[ $DRY_RUN ]]; then
    ask_states
    return
  fi
  health
  [[ -z $why ]] || say "$name: $why"
  printf '%s\n' "$how"
}

ask_states() {
  ask gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)'
  ask gcloud compute tpus tpu-vm describe "$name" "${where[@]}" '--format=value(state)'
}

# blind: what to do while nothing can be learned about the slice, because of this machine's network or login more often
# than not: wait, longer each time. Nothing follows from it.
blind_since=''
sighted() { blind_since=''; }
blind() {
  if [[ -z $blind_since ]]; then
    blind_since=$SECONDS blind_said=-600 blind_pause=$poll
  else
    blind_pause=$(doubled "$blind_pause" 300)
  fi
  if ((SECONDS - blind_said >= 600)); then
    say "the state of $name cannot be read since $((SECONDS - blind_since)) s ($why); waiting, nothing is counted or deleted"
    blind_said=$SECONDS
  fi
  sleep "$blind_pause"
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
    slice_state
    case $state in
      GONE) check_agent ;;
      UNKNOWN | REFUSED)
        say "the state of $name cannot be read: $why"
        exit "$EX_SETUP"
        ;;
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

# With several workers gcloud refuses to ssh when there is an agent with keys and its own key is not among them: said here,
# before anything costs money.
check_agent() {
  local key=$HOME/.ssh/google_compute_engine keys print=''
  ((CHIPS > CHIPS_PER_NODE)) && keys=$(ssh-add -l 2>/dev/null) || return 0
  print=$(ssh-keygen -lf "$key" 2>/dev/null | awk '{ print $2 }') || print=
  [[ $print && $keys == *"$print"* ]] || die "your ssh agent does not hold gcloud's key: test -f $key || ssh-keygen -t rsa -N '' -f $key; ssh-add $key"
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
  local before='' begun=$SECONDS
  while :; do
    slice_state
    [[ $state == "$before" ]] || say "$name is $state ($((SECONDS - begun)) s)"
    before=$state
    case $state in
      ACTIVE) return 0 ;;
      SUSPENDING | SUSPENDED | DELETING | GONE)
        say "the request for $name came to nothing: $state"
        exit "$EX_AGAIN"
        ;;
      FAILED)
        say "the request for $name came to nothing: FAILED$(reason)"
        if lapsed; then exit "$EX_NO_CAPACITY"; else exit "$EX_SETUP"; fi
        ;;
      UNKNOWN | REFUSED)
        blind
        continue
        ;;
    esac
    sighted
    if ((wait_timeout > 0 && SECONDS - begun >= wait_timeout)); then
      say "no capacity within $wait_timeout s; the request still stands: launch/tpu_vm.sh delete takes it back"
      exit "$EX_NO_CAPACITY"
    fi
    sleep "$poll"
  done
}

# Whether a FAILED request is older than --wait-timeout: then it lapsed (--valid-until-duration), and nothing was wrong
# with it. The clocks may differ: a tenth less will do.
lapsed() {
  ((wait_timeout > 0)) || return 1
  local made at
  at=$(($(date +%s) - wait_timeout * 9 / 10))
  at=$(date -u -d "@$at" +%Y-%m-%dT%H:%M:%S 2>/dev/null || date -u -r "$at" +%Y-%m-%dT%H:%M:%S) # GNU, macOS
  made=$(queued describe "$name" "${where[@]}" --format='value(createTime)' 2>/dev/null) || made=
  [[ $made && ! ${made%%[.Z]*} > $at ]]
}

reason() {
  local text
  text=$(queued describe "$name" "${where[@]}" --format='value(state.failedData.error.message)' 2>/dev/null) || text=
  [[ -z $text ]] || printf ', %s' "$text"
}

# gcloud tries each worker ten times: without an end to each try, a dead worker would hold up every question for hours.
ssh_limits=(-oConnectTimeout=15 -oServerAliveInterval=30 -oServerAliveCountMax=4)

# on WORKERS COMMAND_LINE: ssh. The command line is read by a shell on the VM; build it with `quoted`.
on() {
  local words=(gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2" "${ssh_limits[@]/#/--ssh-flag=}")
  [[ -z $internal_ips ]] || words+=(--internal-ip)
  "${SHOW:-ask}" "${words[@]}" </dev/null
}

# The sources as one file: --parcel, packed where it does not exist, else packed for this once.
pack() {
  [[ $DRY_RUN || ! -s $parcel ]] || return 0
  run git -C "$root" archive --format=tar.gz --output="$parcel" "$(source_revision)"
}

do_install() {
  local words unpack status code=0
  [[ $DRY_RUN ]] || ask_workers
  if [[ ${running-} ]]; then
    say "the program runs on worker(s)$running: nothing is installed over it"
    return
  fi
  if [[ -z $parcel ]]; then
    own_folder
    parcel=$scratch/selfplay_jax.tar.gz
  fi
  words=(gcloud compute tpus tpu-vm scp "$parcel" "$name:selfplay_jax.tar.gz" "${where[@]}" --worker=all "${ssh_limits[@]/#/--scp-flag=}")
  [[ -z $internal_ips ]] || words+=(--internal-ip)
  # A worker that did not answer just now may still run the program; files of an older revision must not be left; and -m:
  # make goes by time, and the archive's times are the commit's.
  status=$(remote status "$name")
  unpack="if $status 2>/dev/null | grep -q ' running '; then echo 'the program runs here' >&2; exit 1; fi"
  unpack+=' && mkdir -p selfplay_jax && find selfplay_jax -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +'
  unpack+=' && tar -xzmf selfplay_jax.tar.gz -C selfplay_jax && bash selfplay_jax/launch/worker.sh install'
  {
    pack &&
      run "${words[@]}" </dev/null &&
      SHOW=run on all "$unpack"
  } || code=$?
  ((code != 0)) || return 0
  health
  if [[ $how == lost ]]; then
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
    slice_state
    if [[ $state == GONE ]]; then
      say "there is no $name"
      return 0
    fi
    say "$name was not deleted and may go on costing money"
    exit "$EX_SETUP"
  }
}
