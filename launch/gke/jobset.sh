#!/usr/bin/env bash
# A run on GKE, as a JobSet.
#
# usage: launch/gke/jobset.sh COMMAND [options] [-- ARGS of python -m selfplay_jax.main]
#
# Commands
#   build     the image, from this checkout, and push it
#   pool      a node pool for the slice (--cluster, --location, --zone): NAME; for several slices NAME-0, NAME-1, ...
#   delete-pool   give the pool or pools back; nothing of the slices is billed after that (--cluster, --location)
#   render    print the manifest
#   apply     hand it to the cluster
#   status    the JobSet and its pods
#   logs      follow the workers' logs
#   stop      delete the JobSet: the workers get SIGTERM and save; it ends when they have; `apply` with the same run id
#             resumes. The pool stands and is billed until delete-pool
#
# Options
#   --name=NAME              of the JobSet and the node pool
#   --image=IMAGE            REGION-docker.pkg.dev/PROJECT/REPOSITORY/selfplay_jax:TAG
#   --accelerator-type=TYPE  v5litepod-16 (the default), v6e-16, v5p-16, v4-32, ...
#   --topology=T --chips-per-node=N   where the type's usual ones are not meant
#   --slices=N               default 1; more are joined over the data-centre network (config.mesh.replica)
#   --spot                   on Spot nodes
#   --service-account=NAME   Kubernetes service account with access to the bucket
#   --run-id=ID --bucket=gs://BUCKET | --workdir=PLACE   where the run lives, as in launch/tpu_vm.sh
#   --env=NAME=VALUE         environment of the program; repeatable
#   --secret=NAME=SECRET:KEY the same from a Kubernetes secret; repeatable
#   --max-restarts=N         failures answered with a restart (preemptions do not count); default 10
#   --grace=SECONDS          from SIGTERM to SIGKILL; default 300
#   --context=C --namespace=N   for kubectl
#   --cluster=C --location=L --zone=Z --project=P   for the node pool
#   --dry-run                print each command and run none
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/../common.sh"

command=${1-}
help_without "$command"
shift
original=("$@")

name='' image='' accelerator=v5litepod-16 topology='' chips_per_node='' slices=1 spot='' service_account=''
run_id='' bucket='' workdir='' max_restarts=10 grace=300 context='' namespace='' cluster='' location='' zone='' project=''
env_entries='' program_args=()

# json WORD: a string for YAML. Kubernetes expands $(NAME) in arguments and values: a doubled $ is a $.
json() {
  TEXT=$1 LC_ALL=C awk 'BEGIN {
    text = ENVIRON["TEXT"]
    for (i = 1; i <= length(text); i++) {
      c = substr(text, i, 1)
      if (c == "\\") c = "\\\\"
      else if (c == "\"") c = "\\\""
      else if (c == "\n") c = "\\n"
      else if (c == "\t") c = "\\t"
      else if (c == "\r") c = "\\r"
      else if (c ~ /[\001-\037\177]/) exit 1
      out = out c
    }
    printf "\"%s\"", out
  }' || die "$(quoted "$1") has control characters in it"
}

literal() { json "${1//\$/\$\$}"; }

add_env() { env_entries=${env_entries:+$env_entries, }$1; }

add_secret() {
  local pattern='^[A-Za-z_][A-Za-z0-9_]*=[a-z0-9]([-a-z0-9.]*[a-z0-9])?:[-._a-zA-Z0-9]+$' variable source
  [[ $1 =~ $pattern ]] || die "--secret=$(quoted "$1"): write --secret=HF_TOKEN=NAME_OF_THE_SECRET:KEY"
  variable=${1%%=*} source=${1#*=}
  add_env "{\"name\": \"$variable\", \"valueFrom\": {\"secretKeyRef\": {\"name\": \"${source%:*}\", \"key\": \"${source##*:}\"}}}"
}

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
    --spot) spot=1 ;;
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --accelerator-type=*) accelerator=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --chips-per-node=*) check_count "${1%%=*}" "${1#*=}" && chips_per_node=${1#*=} ;;
    --slices=*) check_count "${1%%=*}" "${1#*=}" && slices=${1#*=} ;;
    --service-account=*) service_account=${1#*=} ;;
    --run-id=*) run_id=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --env=*)
      check_env "${1#*=}"
      pair=${1#*=}
      value=$(literal "${pair#*=}") || exit "$EX_USAGE"
      add_env "{\"name\": \"${pair%%=*}\", \"value\": $value}"
      ;;
    --secret=*) add_secret "${1#*=}" ;;
    --max-restarts=*) check_count "${1%%=*}" "${1#*=}" && max_restarts=${1#*=} ;;
    --grace=*) check_count "${1%%=*}" "${1#*=}" && grace=${1#*=} ;;
    --context=*) context=${1#*=} ;;
    --namespace=*) namespace=${1#*=} ;;
    --cluster=*) cluster=${1#*=} ;;
    --location=*) location=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    *) die "unknown option $(quoted "$1"); options are written --name=VALUE, and what goes to the program comes after --" ;;
  esac
  shift
done

((slices > 0)) || die "--slices=0: at least one"

kubectl_with() {
  words=(kubectl)
  [[ -z $context ]] || words+=("--context=$context")
  [[ -z $namespace ]] || words+=("--namespace=$namespace")
  words+=("$@")
}

# The slice's place in GKE's vocabulary: node label, topology, chips and number of nodes, machine type.
node_shape() {
  slice_of "$accelerator"
  topology=${topology:-$TOPOLOGY} chips_per_node=${chips_per_node:-$CHIPS_PER_NODE}
  [[ $topology =~ ^[0-9]+x[0-9]+(x[0-9]+)?$ ]] || die "$accelerator has no usual topology: give one, --topology=AxB or AxBxC"
  local chips=$((${topology//x/*}))
  ((chips_per_node > 0 && chips % chips_per_node == 0)) || die "a topology of $topology does not divide into nodes of $chips_per_node chips"
  nodes=$((chips / chips_per_node))
  case $GENERATION in
    v5e) label=tpu-v5-lite-podslice machine=ct5lp-hightpu-${chips_per_node}t ;;
    v5p) label=tpu-v5p-slice machine=ct5p-hightpu-${chips_per_node}t ;;
    v6e) label=tpu-v6e-slice machine=ct6e-standard-${chips_per_node}t ;;
    v4) label=tpu-v4-podslice machine=ct4p-hightpu-${chips_per_node}t ;;
  esac
}

manifest() {
  local arg args='' place
  need --image "$image" "the image to run; launch/gke/jobset.sh build makes it"
  check_program_args ${program_args[@]+"${program_args[@]}"}
  place=$(work_dir "$bucket" "${run_id:-$name}" "$workdir") || exit "$EX_USAGE"
  for arg in "--workdir=$place" "${program_args[@]}"; do
    arg=$(literal "$arg") || exit "$EX_USAGE"
    args=${args:+$args, }$arg
  done
  NAME=$(json "$name") IMAGE=$(json "$image") SERVICE_ACCOUNT=${service_account:+$(json "$service_account")} \
    MAX_RESTARTS=$max_restarts SLICES=$slices NODES=$nodes CHIPS_PER_NODE=$chips_per_node GRACE=$grace SPOT=$spot \
    ACCELERATOR=$(json "$label") TOPOLOGY=$(json "$topology") ARGS="[$args]" ENV="[$env_entries]" \
    awk '/# @if [A-Z_]+$/ {
           condition = $NF
           if (ENVIRON[condition] == "") next
           sub(/ *# @if [A-Z_]+$/, "")
         }
         /^# Template|^# Needs/ { next }
         {
           while (match($0, /"@[A-Z_]+@"/)) {
             key = substr($0, RSTART + 2, RLENGTH - 4)
             printf "%s%s", substr($0, 1, RSTART - 1), ENVIRON[key]
             $0 = substr($0, RSTART + RLENGTH)
           }
           print
         }' "$here/jobset.yaml"
}

# each_pool SENTENCE WORD...: gcloud container node-pools WORD... for the pool of each slice; @ stands for its name.
each_pool() {
  local slice pool failed='' sentence=$1
  shift
  for ((slice = 0; slice < slices; slice++)); do
    pool=$name
    ((slices == 1)) || pool=$name-$slice
    run gcloud container node-pools "${@/#@/$pool}" --cluster="$cluster" --location="$location" --project="$project" --quiet ||
      failed="$failed $pool"
  done
  [[ -z $failed ]] || {
    say "$sentence:$failed; gcloud says why above"
    exit "$EX_SETUP"
  }
}

check_pool() {
  check_name "$name" "$((slices == 1 ? 40 : 37))"
  need --cluster "$cluster" "the GKE cluster"
  need --location "$location" "the cluster's region or zone"
  need --project "$project" "the Google Cloud project that pays"
}

case $command in
  build)
    need --image "$image" "where to push it, REGION-docker.pkg.dev/PROJECT/REPOSITORY/selfplay_jax:TAG"
    run docker build --platform=linux/amd64 --file="$here/Dockerfile" --tag="$image" "${here%/launch/gke}"
    run docker push "$image"
    ;;
  pool)
    check_pool
    need --zone "$zone" "the zone that has the TPUs"
    node_shape
    words=(create @ --node-locations="$zone" --machine-type="$machine" --num-nodes="$nodes")
    # A topology is for slices of several nodes; one node is its machine type.
    ((nodes == 1)) || words+=(--tpu-topology="$topology")
    [[ -z $spot ]] || words+=(--spot)
    each_pool "not made" "${words[@]}"
    ;;
  delete-pool)
    check_pool
    each_pool "not deleted, and may go on costing money" delete @
    ;;
  render)
    check_name "$name" 40
    node_shape
    manifest
    ;;
  apply)
    check_name "$name" 40
    node_shape
    text=$(manifest) || exit "$EX_USAGE"
    kubectl_with apply --filename=-
    if [[ $DRY_RUN ]]; then
      rendered=("$0" render)
      for word in "${original[@]}"; do [[ $word == --dry-run ]] || rendered+=("$word"); done
      printf '%s | ' "$(quoted "${rendered[@]}")"
      run "${words[@]}"
    else
      need_program kubectl "see https://kubernetes.io/docs/tasks/tools"
      run "${words[@]}" <<<"$text"
    fi
    ;;
  status)
    check_name "$name" 40
    kubectl_with get jobset "$name"
    run "${words[@]}"
    kubectl_with get pods "--selector=jobset.sigs.k8s.io/jobset-name=$name" --output=wide
    run "${words[@]}"
    ;;
  logs)
    check_name "$name" 40
    kubectl_with logs "--selector=jobset.sigs.k8s.io/jobset-name=$name" --container=main --follow --prefix --tail=100 --max-log-requests=512
    run "${words[@]}"
    ;;
  stop)
    check_name "$name" 40
    kubectl_with delete jobset "$name" --cascade=foreground # waits for the pods, and so for their saves
    run "${words[@]}"
    say "the node pool still stands and costs money until launch/gke/jobset.sh delete-pool"
    ;;
  *) die "unknown command $(quoted "$command"); see --help" ;;
esac
