#!/usr/bin/env bash
# A run as a managed spot job of SkyPilot, launch/skypilot.yaml: SkyPilot finds capacity and recovers the job.
#
# usage: launch/sky.sh COMMAND [options] [-- ARGS of python -m selfplay_jax.main]
#
# Commands
#   launch    submit the job (--name --bucket, ARGS)
#   status    all managed jobs
#   logs      follow the job's log (--name)
#   stop      cancel the job (--name); it gets SIGTERM, `launch` with the same run id resumes
#
# Options
#   --name=NAME            of the job
#   --run-id=ID            default NAME; the same id resumes the same run
#   --bucket=gs://BUCKET   the run lives in gs://BUCKET/runs/ID
#   --accelerators=A       another slice or GPUs, as sky has them: tpu-v5p-32, H100:8, ...
#   --num-nodes=N          machines, with GPUs; --infra=I: another cloud than GCP
#   --on-demand            no spot capacity
#   --secret=NAME          pass a variable of this shell's environment as a secret; its value is on no command line
#   --dry-run              print each command and run none
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$launch/common.sh"

command=${1-}
help_without "$command"
shift

name='' run_id='' bucket='' program_args=() options=() secrets=()
while (($#)); do
  case $1 in
    --)
      shift
      program_args=("$@")
      break
      ;;
    --help)
      help_of "${BASH_SOURCE[0]}"
      exit 0
      ;;
    --dry-run) DRY_RUN=1 ;;
    --on-demand) options+=(--no-use-spot) ;;
    --name=*) name=${1#*=} ;;
    --run-id=*) run_id=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --accelerators=*) options+=("--gpus=${1#*=}") ;;
    --infra=*) options+=("$1") ;;
    --num-nodes=*) check_count "${1%%=*}" "${1#*=}" && options+=("$1") ;;
    --secret=*)
      check_variable --secret "${1#*=}"
      [[ -n $(printenv "${1#*=}") ]] || die "--secret=${1#*=}: this shell's environment has no ${1#*=}; export it first"
      secrets+=("--secret" "${1#*=}")
      ;;
    *) die "unknown option $(quoted "$1"); options are written --name=VALUE, and what goes to the program comes after --" ;;
  esac
  shift
done
[[ $command == status ]] || check_name "$name" 61
[[ $DRY_RUN ]] || need_program sky "pip install 'skypilot[gcp]', see https://docs.skypilot.co"

case $command in
  launch)
    check_program_args ${program_args[@]+"${program_args[@]}"}
    work_dir "$bucket" "${run_id:-$name}" '' >/dev/null
    config='' rest=()
    for arg in "${program_args[@]}"; do
      case $arg in
        --config=* | -config=*) config=${arg#*=} ;;
        *) rest+=("$arg") ;;
      esac
    done
    words=''
    ((${#rest[@]} == 0)) || words=$(quoted "${rest[@]}")
    run cd "${launch%/*}" # skypilot.yaml sends the folder that sky runs in
    run sky jobs launch launch/skypilot.yaml --yes --detach-run --name="$name" ${options[@]+"${options[@]}"} \
      --env "RUN_ID=${run_id:-$name}" --env "BUCKET=gs://${bucket#gs://}" --env "CONFIG=$config" --env "ARGS=$words" \
      ${secrets[@]+"${secrets[@]}"}
    ;;
  status) run sky jobs queue ;;
  logs) run sky jobs logs --name="$name" ;;
  stop) run sky jobs cancel --yes --name="$name" ;;
  *) die "unknown command $(quoted "$command"); see --help" ;;
esac
