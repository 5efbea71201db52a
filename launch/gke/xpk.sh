#!/usr/bin/env bash
# dsad on a GKE cluster through xpk, which writes and queues the JobSet itself.
#
#   launch/gke/xpk.sh create -- pretrain --config=configs/ds2.py --config.data.root=/data/mvtec
#   launch/gke/xpk.sh list
#   launch/gke/xpk.sh delete
#
# --dry-run before the command prints what would be executed and executes nothing.
#
# Variables (export them once):
#   PROJECT ZONE CLUSTER   of the cluster, made with xpk cluster create; always needed
#   NAME                   of the workload (create, delete)
#   IMAGE                  container with dsad, see launch/Dockerfile (create)
#   TPU_TYPE               v5litepod-256, v6e-256, v5p-8, as the cluster has it (create)
#   WORKDIR                of the run, in a bucket: gs://BUCKET/RUN (create)
#   NUM_SLICES             1
#   MAX_RESTARTS           after preemptions, stops and crashes together (20)
#   GRACE                  seconds to save in after SIGTERM (300)
#
# Needs: xpk, gcloud and kubectl, logged in. Costs what the cluster costs, also while nothing runs.
set -euo pipefail
PROJECT=${PROJECT:-} ZONE=${ZONE:-} CLUSTER=${CLUSTER:-} NAME=${NAME:-}
IMAGE=${IMAGE:-} TPU_TYPE=${TPU_TYPE:-} WORKDIR=${WORKDIR:-}

dry_run=no

die() {
  echo "xpk.sh: $*" >&2
  exit 2
}

usage() {
  sed -n '2,/^set -e/p' "$0" | sed -n 's/^# \{0,1\}//p' >&2
  exit 2
}

need() {
  local name
  for name in "$@"; do
    [[ -n ${!name} ]] || die "$name is not set; see the top of launch/gke/xpk.sh."
  done
}

workload() {
  local line=(xpk workload "$@" --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE")
  if [[ $dry_run == yes ]]; then
    printf '%q ' "${line[@]}"
    echo
  else
    "${line[@]}"
  fi
}

create() {
  need NAME IMAGE TPU_TYPE WORKDIR
  [[ $# -gt 0 ]] || die "the dsad command is missing: create -- pretrain --config=..."
  local argument arguments
  for argument in "${@:2}"; do
    case $argument in
      --workdir* | --distributed* | --continue* | --resume* | --overwrite)
        die "${argument%%=*} is set by this script; WORKDIR names the directory." ;;
    esac
  done
  arguments=("$@" --distributed "--workdir=$WORKDIR")
  [[ $1 != pretrain ]] || arguments+=(--continue)
  # exec: xpk passes SIGTERM on to the process that it started, which must not be another shell.
  workload create --workload="$NAME" --tpu-type="$TPU_TYPE" --num-slices="${NUM_SLICES:-1}" \
    --docker-image="$IMAGE" --max-restarts="${MAX_RESTARTS:-20}" --restart-on-user-code-failure \
    --termination-grace-period-seconds="${GRACE:-300}" \
    --command="exec bash launch/run.sh $(printf '%q ' "${arguments[@]}")"
}

if [[ ${1:-} == --dry-run ]]; then
  dry_run=yes
  shift
fi
[[ $# -gt 0 ]] || usage
command=$1
shift
[[ ${1:-} != -- ]] || shift
case $command in
  create | list | delete) need PROJECT ZONE CLUSTER ;;
  *) usage ;;
esac
case $command in
  create) create "$@" ;;
  list) workload list ;;
  delete)
    need NAME
    workload delete --workload="$NAME" ;;
esac
