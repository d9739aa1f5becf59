#!/usr/bin/env bash
# A run on a Cloud TPU slice, through queued resources.
#
# usage: launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE [options] [-- ARGS of python -m selfplay_jax.main]
#
# Commands, in their usual order
#   create    ask for the slice (a queued resource and its node, both called NAME)
#   wait      until it is ACTIVE
#   pack      pack this tree into --parcel=FILE
#   install   copy this tree to all workers and install it there (make setup TPU=1)
#   start     start the program on all workers, apart from the ssh connection; does nothing where it runs already
#   watch     print worker 0's log until the program has ended on all workers; end with its exit code
#   up        create, wait, install
#   run       start, watch
#   logs      the last lines of all workers' logs (--lines=N)
#   status    state of the slice and of the program on each worker
#   health    one word: healthy, waiting (in the queue), lost, refused (no permission) or unknown (network, login)
#   stop      SIGTERM to the program on all workers (it saves and ends with 75), wait until it has ended
#   delete    give the slice back; nothing is billed after that
#   cost      chips x hours x price (--hours=H --price=DOLLARS_PER_CHIP_HOUR)
#
# Which slice
#   --name=NAME              name of the slice
#   --zone=ZONE              default $CLOUDSDK_COMPUTE_ZONE
#   --project=PROJECT        default $CLOUDSDK_CORE_PROJECT
#   --accelerator-type=TYPE  v5litepod-16 (the default), v6e-16, v5p-16, v4-32, ...
#   --runtime-version=V      default by generation: v2-alpha-tpuv5-lite (v5e), v2-alpha-tpuv6e, v2-alpha-tpuv5 (v5p),
#                            tpu-ubuntu2204-base (v4)
#   --spot | --reserved      cheaper and taken away at any time | from your reservation
#   --service-account=EMAIL  what the VMs act as; --network=N --subnetwork=N --internal-ips: as gcloud has them
#   --wait-timeout=SECONDS   give the request up after that long in the queue (73); default 0, never
#
# Which run
#   --run-id=ID              default NAME; the same id resumes the same run
#   --bucket=gs://BUCKET     the run lives in gs://BUCKET/runs/ID, or
#   --workdir=PLACE          in PLACE (gs://..., or an absolute path on a file system that all workers mount)
#   --env=NAME=VALUE         environment of the program; repeatable
#   --secret=NAME=SECRET     the same from Secret Manager, read on the VM; the value is never seen here; repeatable
#   --revision=REV           git revision to install; default the tracked files as they are, changes included
#   --parcel=FILE            install what is packed in FILE (tar.gz); where there is no such file, it is made and kept
#
# Otherwise
#   --poll=SECONDS           between questions about state and logs; default 20
#   --grace=SECONDS          how long a stop may take, and how long workers may outlive one that failed; default 300
#   --unreachable=SECONDS    how long the workers of a healthy slice may be silent until it is given up; default 1800.
#                            While even its state cannot be read (network, login), nothing is: that is waited out
#   --lines=N                for logs; default 40
#   --force                  with stop: SIGKILL to what the grace did not end
#   --dry-run                print each command and run none
#
# Exit codes: the program's, over all workers (1 a user's error, before 75 again, before other failures, before 76 a peer
# died, before 0); of the launcher: 64 wrong options, 69 set-up failed or the slice is out of reach, 73 no capacity in
# time, 75 the slice was taken away, 77 stopped with `stop`.
set -Eeuo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=${launch%/*}
# shellcheck source=launch/common.sh
source "$launch/common.sh"
# shellcheck source=launch/tpu_vm_slice.sh
source "$launch/tpu_vm_slice.sh"
# shellcheck source=launch/tpu_vm_run.sh
source "$launch/tpu_vm_run.sh"
trap 'say "line $LINENO failed unexpectedly"; exit $EX_SETUP' ERR

command=${1-}
help_without "$command"
shift

name='' zone=${CLOUDSDK_COMPUTE_ZONE-} project=${CLOUDSDK_CORE_PROJECT-}
accelerator=v5litepod-16 runtime='' tier='' service_account='' network='' subnetwork='' internal_ips='' wait_timeout=0
run_id='' bucket='' workdir='' revision='' parcel=''
poll=20 grace=300 unreachable=1800 lines=40 force='' hours='' price=''
program_args=() worker_options=()

while (($#)); do
  option=$1 value='' used=1
  case $option in
    --)
      shift
      program_args=("$@")
      break
      ;;
    --spot | --reserved | --internal-ips | --force | --dry-run | --help) ;;
    --*=*) value=${option#*=} option=${option%%=*} ;;
    --*)
      (($# > 1)) || die "$option needs a value"
      value=$2 used=2
      ;;
    *) die "unexpected $(quoted "$option"): what goes to the program comes after --" ;;
  esac
  shift "$used"
  case $option in
    --name) name=$value ;;
    --zone) zone=$value ;;
    --project) project=$value ;;
    --accelerator-type) accelerator=$value ;;
    --runtime-version) runtime=$value ;;
    --spot | --reserved) tier=$option ;;
    --service-account) service_account=$value ;;
    --network) network=$value ;;
    --subnetwork) subnetwork=$value ;;
    --internal-ips) internal_ips=1 ;;
    --wait-timeout) check_count "$option" "$value" && wait_timeout=$value ;;
    --run-id) run_id=$value ;;
    --bucket) bucket=$value ;;
    --workdir) workdir=$value ;;
    --revision) revision=$value ;;
    --parcel) parcel=$value ;;
    --poll) check_number "$option" "$value" && poll=$value ;;
    --grace) check_count "$option" "$value" && grace=$value ;;
    --unreachable) check_count "$option" "$value" && unreachable=$value ;;
    --lines) check_count "$option" "$value" && lines=$value ;;
    --hours) check_number "$option" "$value" && hours=$value ;;
    --price) check_number "$option" "$value" && price=$value ;;
    --force) force=1 ;;
    --dry-run) DRY_RUN=1 ;;
    --env)
      check_env "$value"
      worker_options+=("--env=$value")
      ;;
    --secret)
      [[ $value == ?*=?* ]] || die "--secret=$(quoted "$value"): write --secret=HF_TOKEN=NAME_OF_THE_SECRET"
      check_variable --secret "${value%%=*}"
      worker_options+=("--secret=$value")
      ;;
    --help)
      help_of "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *) die "unknown option $option; see --help" ;;
  esac
done

slice_of "$accelerator"
accelerator=${accelerator/#v5e-/v5litepod-} # as Cloud TPU spells it
if [[ $command == cost ]]; then
  need --hours "$hours" "how many hours the slice stands"
  need --price "$price" "dollars per chip and hour, from the price list of your region and tier"
  awk -v type="$accelerator" -v chips="$CHIPS" -v hours="$hours" -v price="$price" \
    'BEGIN { printf "%s: %d chips x %g hours x $%g = $%.2f\n", type, chips, hours, price, chips * hours * price }'
  exit 0
fi
check_name "$name" 61
need --zone "$zone" "the zone that your quota is in, for example --zone=us-west4-a"
need --project "$project" "the Google Cloud project that pays"
case $command in
  start | run) check_program_args ${program_args[@]+"${program_args[@]}"} ;;
esac
case $command in
  # `up` too: what would refuse to start is refused before anything costs money.
  up | start | run) workdir=$(work_dir "$bucket" "${run_id:-$name}" "$workdir") || exit "$EX_USAGE" ;;
esac
case $command in
  up | pack | install) [[ -e $root/.git ]] || die "$root is no git checkout: what goes to the workers is what git tracks" ;;
esac
if [[ $command == pack ]]; then
  need --parcel "$parcel" "the file to pack into"
  pack
  exit 0
fi
if [[ -z $DRY_RUN ]]; then need_program gcloud "see https://cloud.google.com/sdk/docs/install"; fi

where=(--zone="$zone" --project="$project" --quiet)

case $command in
  create | wait | install | start | watch | logs | status | health | stop | delete) "do_$command" ;;
  up)
    do_create
    do_wait
    do_install
    ;;
  run)
    do_start
    do_watch
    ;;
  *) die "unknown command $(quoted "$command"); see --help" ;;
esac
