#!/usr/bin/env bash
# Runs on a TPU VM, in the home directory, started by tpu_vm.sh through ssh; not for people.
#
#   worker.sh install                  Python and the locked packages, for TPU
#   worker.sh start NAME WORKDIR [--env=NAME=VALUE ...] [--secret=NAME=SECRET ...] -- ARGS of the program
#   worker.sh status NAME              one line: selfplay-worker INDEX running|exited|stopped|lost|absent CODE
#   worker.sh log NAME OFFSET          what the program printed, from byte OFFSET on
#   worker.sh tail NAME LINES          the last lines, each with the worker's number
#   worker.sh stop NAME [KILL]         SIGTERM: the program saves and ends with 75
#
# The program runs apart from the ssh session, under `supervise`, and its exit code is left in a file.
set -euo pipefail

EX_AGAIN=75
UV_VERSION=0.13.9 # brings a Python where the image has none that is new enough
tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
index=$(hostname)
index=${index##*-w-}

state_of() { state=$HOME/.selfplay_jax/$1; }

python_with_venv() {
  local candidate
  for candidate in python3.12 python3.11 python3; do
    if "$candidate" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  if python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then # new enough, without its venv module
    apt_install python3-venv >&2
    command -v python3
    return
  fi
  python3 -m pip --version >/dev/null 2>&1 || apt_install python3-pip >&2
  python3 -m pip -q install --user "uv==$UV_VERSION" >&2
  python3 -m uv python install 3.12 >&2
  python3 -m uv python find 3.12
}

# A fresh VM installs updates of its own: wait for its lock.
apt_install() {
  sudo apt-get -o DPkg::Lock::Timeout=600 update -qq
  sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 install -qq -y "$@"
}

install() {
  command -v make >/dev/null || apt_install make
  local python
  python=$(python_with_venv)
  make -C "$tree" setup TPU=1 "PYTHON=$python"
  echo "worker $index: installed"
}

alive() { [[ -s $state/pid && ! -e $state/exit_code ]] && kill -0 "$(cat "$state/pid")" 2>/dev/null; }

start() {
  state_of "$1"
  mkdir -p "$state"
  if alive; then
    echo "worker $index: already running"
    return
  fi
  rm -f "$state/exit_code" "$state/stop_asked" "$state/program"
  [[ ! -e $state/log ]] || mv "$state/log" "$state/log.previous"
  : >"$state/log"
  # A session of its own and no descriptor of ssh's: a dropped connection neither kills the run nor keeps ssh waiting.
  setsid bash "${BASH_SOURCE[0]}" supervise "$@" </dev/null >>"$state/log" 2>&1 &
  echo $! >"$state/pid"
  echo "worker $index: started"
}

# supervise NAME WORKDIR OPTIONS -- ARGS: the program's parent. Secrets exist from here on and nowhere else: in the
# environment of the program, read from Secret Manager with the VM's own service account.
supervise() {
  state_of "$1"
  local workdir=$2 code=0 asked='' value
  # systemd counts all of this to the ssh session it was started from: at a shutdown every process of it gets SIGTERM and,
  # at once, SIGHUP. The program saves on the first; this one has to outlive it. `stop` signals the program alone.
  trap 'asked=1' TERM INT HUP
  shift 2
  while [[ $1 != -- ]]; do
    case $1 in
      --env=*) export "${1#--env=}" ;;
      --secret=*)
        value=${1#--secret=}
        echo "reading ${value%%=*} from the secret ${value#*=}"
        if ! value="${value%%=*}=$(gcloud secrets versions access latest --secret="${value#*=}" --quiet)"; then
          trap '' TERM INT HUP
          if [[ $asked ]]; then
            record "$EX_AGAIN"
          else
            echo "error: the VM's service account cannot read it (it needs roles/secretmanager.secretAccessor)"
            record 1
          fi
          exit 0
        fi
        export "${value?}"
        ;;
    esac
    shift
  done
  shift
  cd "$tree"
  export PYTHONUNBUFFERED=1
  # In the foreground: a signal to this shell waits until the program has ended and its code is safe. SIGHUP would end the
  # program in the middle of the save that SIGTERM asks for. A `stop` that found no program yet has left its mark.
  # shellcheck disable=SC2016 # for the inner shell
  bash -c 'echo $$ >"$1/program"; [[ ! -e $1/stop_asked ]] || exit 75; shift; trap "" HUP; exec "$@"' program "$state" \
    .venv/bin/python -m selfplay_jax.main --workdir="$workdir" "$@" || code=$?
  trap '' TERM INT HUP # nor may a late one end what is left to do, mv and gcloud
  # Ended by the signal itself: it had hardly begun, nothing is lost.
  if [[ ($asked || -e $state/stop_asked) && $code == 143 ]]; then code=$EX_AGAIN; fi
  echo "worker $index: the program ended with code $code"
  # Where the VM goes down the code comes before the log, whose copy may take too long; else babysit may delete the VM then.
  if [[ $asked && ! -e $state/stop_asked ]]; then
    record "$code"
    keep_log "$workdir"
  else
    keep_log "$workdir"
    record "$code"
  fi
}

record() {
  echo "$1" >"$state/exit_code.new"
  mv "$state/exit_code.new" "$state/exit_code"
}

# The VM's disk goes with the VM: the log is kept beside the run, as far as that works.
keep_log() {
  [[ $1 == gs://* ]] || return 0
  timeout 120 gcloud storage cp --quiet "$state/log" "$1/logs/$(date -u +%Y%m%dT%H%M%SZ)-worker-$index.log" >/dev/null 2>&1 || true
}

status() {
  state_of "$1"
  local what=absent code=-
  if [[ -e $state/exit_code ]]; then
    what=exited code=$(cat "$state/exit_code")
    if [[ $code != 0 && $code != 1 && -e $state/stop_asked ]]; then what=stopped; fi
  elif alive; then
    what=running
  elif [[ -e $state/stop_asked ]]; then
    what=stopped # by force
  elif [[ -e $state/pid ]]; then
    what=lost # the VM was restarted, or the supervisor was killed
  fi
  echo "selfplay-worker $index $what $code"
}

stop() {
  state_of "$1"
  alive || {
    echo "worker $index: nothing runs"
    return
  }
  touch "$state/stop_asked"
  if [[ ${2:-TERM} == KILL ]]; then
    kill -KILL -- "-$(cat "$state/pid")"
  elif [[ -s $state/program ]]; then
    kill -TERM "$(cat "$state/program")" 2>/dev/null || true # it may just have ended
  fi
  echo "worker $index: told to stop"
}

log() {
  state_of "$1"
  tail -c "+$(($2 + 1))" "$state/log"
}

tail_of() {
  state_of "$1"
  tail -n "$2" "$state/log" | sed "s/^/[worker $index] /"
}

case ${1-} in
  install | start | supervise | status | log | stop) "$@" ;;
  tail) tail_of "$2" "$3" ;;
  *)
    echo "worker.sh is started by tpu_vm.sh" >&2
    exit 64
    ;;
esac
