#!/usr/bin/env bash
# dsad on a Cloud TPU slice through queued resources; run it on your own machine, in the checkout.
#
#   launch/tpu_vm.sh create                    ask for the slice; costs nothing until it is ACTIVE
#   launch/tpu_vm.sh wait                      until it is ACTIVE; from here on it is paid for
#   launch/tpu_vm.sh install                   dsad on all workers
#   launch/tpu_vm.sh run -- pretrain --config=configs/ds2.py --config.data.root='~/mvtec'
#                                              start on all workers; goes on without you
#   launch/tpu_vm.sh status                    the slice, and one line per worker
#   launch/tpu_vm.sh logs [WORKER [LINES]]     the end of a worker's log (0 or all; 20 lines)
#   launch/tpu_vm.sh stop                      dsad saves and exits; the slice is still paid for
#   launch/tpu_vm.sh resume -- pretrain ...    all of the above in a loop, until the run is complete:
#                                              makes the slice anew after a preemption, continues
#                                              the run, deletes the slice at the end
#   launch/tpu_vm.sh delete                    give the slice back; nothing is paid any more
#
# --dry-run before the command prints what would be executed and executes nothing.
#
# Variables (export them once):
#   PROJECT ZONE NAME   of the slice; always needed
#   TOPOLOGY            as for dsad plan: v5e:16x16, v6e:16x16, v5p:2x2x1, v4:2x2x4 (create)
#   ACCELERATOR         instead of it, in Google's names: v5litepod-256, v6e-256, v5p-8 (4 chips)
#   RUNTIME             software version of the machines; follows from the generation
#   CAPACITY            spot (default), on-demand or reserved
#   VALID_UNTIL         give up waiting in the queue after this time, for example 6h
#   CREATE_FLAGS        more flags for gcloud, separated by spaces, for example
#                       "--service-account=NAME@PROJECT.iam.gserviceaccount.com --internal-ips"
#   WORKDIR             of the run, in a bucket: gs://BUCKET/RUN (run, resume)
#   SSH_FLAGS           more flags for gcloud's ssh and scp, for example --internal-ip
#   REPOSITORY          where the workers clone dsad from; without it this checkout is copied
#   REVISION            commit, tag or branch of either (HEAD)
#   EXTRAS              pip extras (tpu,gcs)
#   PYTHON_VERSION      Python on the workers (3.12)
#   SETUP               command line that every worker runs after the installation, to bring data:
#                       "mkdir -p ~/mvtec && gcloud storage rsync -r gs://BUCKET/mvtec ~/mvtec"
#   POLL                seconds between two looks (60)
#   MAX_FAILURES        crashes, or failed requests, after which resume gives up (3); the slice that
#                       is there then stays, and costs until it is deleted
#   KEEP                1: resume leaves the slice running when the run is complete
#
# Needs: bash 4.4 or newer (macOS: brew install bash); gcloud, logged in, with the TPU API and quota
# in ZONE; ssh-add ~/.ssh/google_compute_engine for slices of several workers; an account on the
# workers that may write to the bucket.
set -euo pipefail
PROJECT=${PROJECT:-} ZONE=${ZONE:-} NAME=${NAME:-} WORKDIR=${WORKDIR:-}

root=$(cd "$(dirname "$0")/.." && pwd)
stopped=75 # exit code of run.sh for a run that saved and stopped before its end
dry_run=no
read -ra ssh_flags <<<"${SSH_FLAGS:-}"

die() {
  echo "tpu_vm.sh: $*" >&2
  exit 2
}

usage() {
  sed -n '2,/^set -e/p' "$0" | sed -n 's/^# \{0,1\}//p' >&2
  exit 2
}

say() { echo "$(date '+%F %T') $*"; }

[[ ${BASH_VERSINFO[0]}${BASH_VERSINFO[1]} -ge 44 ]] || die "needs bash 4.4, this is $BASH_VERSION."

need() {
  local name
  for name in "$@"; do
    [[ -n ${!name:-} ]] || die "$name is not set; see the top of launch/tpu_vm.sh."
  done
}

# Executes a command, or prints it in a form that a shell reads back.
do_() {
  if [[ $dry_run == yes ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

tpus() { do_ gcloud compute tpus "$@" --zone="$ZONE" --project="$PROJECT"; }

# A command line on one worker or on all.
on_worker() { tpus tpu-vm ssh "$NAME" "${ssh_flags[@]}" --worker="$1" --command="$2"; }

# ---- what to ask for ----

# The flags of a slice from TOPOLOGY or ACCELERATOR.
slice_flags() {
  if [[ -n ${ACCELERATOR:-} && -n ${TOPOLOGY:-} ]]; then
    die "TOPOLOGY and ACCELERATOR are both set; unset one of them."
  elif [[ -n ${ACCELERATOR:-} ]]; then
    slice=(--accelerator-type="$ACCELERATOR")
    generation=${ACCELERATOR%%-*}
  else
    need TOPOLOGY
    [[ $TOPOLOGY =~ ^(v4|v5e|v5p|v6e):[0-9]+(x[0-9]+){1,2}$ ]] ||
      die "TOPOLOGY=$TOPOLOGY: expected v4, v5e, v5p or v6e, a colon and a shape: v5e:16x16."
    generation=${TOPOLOGY%%:*}
    local shape=${TOPOLOGY#*:} chips
    chips=$((${shape//x/*}))
    # The names count chips for v5e and v6e, and the two cores of a chip for v5p. gcloud takes the
    # shape itself for v4 only; of several v5p shapes with as many chips it gives its usual one.
    case $generation in
      v4) slice=(--type=v4 --topology="$shape") ;;
      v5e) slice=(--accelerator-type="v5litepod-$chips") generation=v5litepod ;;
      v5p) slice=(--accelerator-type="v5p-$((2 * chips))") ;;
      v6e) slice=(--accelerator-type="v6e-$chips") ;;
    esac
  fi
}

runtime() {
  if [[ -n ${RUNTIME:-} ]]; then
    echo "$RUNTIME"
    return
  fi
  case $1 in
    v5litepod) echo v2-alpha-tpuv5-lite ;;
    v5p) echo v2-alpha-tpuv5 ;;
    v6e) echo v2-alpha-tpuv6e ;;
    v2 | v3 | v4) echo tpu-ubuntu2204-base ;;
    *) die "RUNTIME is not set, and no software version is known for $1; name one." ;;
  esac
}

create() {
  local slice generation capacity=() more=() version
  slice_flags
  version=$(runtime "$generation") || exit # set -e does not hold where resume calls this
  case ${CAPACITY:-spot} in
    spot) capacity=(--spot) ;;
    reserved) capacity=(--reserved) ;;
    on-demand) ;;
    *) die "CAPACITY=$CAPACITY: expected spot, on-demand or reserved." ;;
  esac
  [[ -z ${VALID_UNTIL:-} ]] || more+=(--valid-until-duration="$VALID_UNTIL")
  local words=()
  read -ra words <<<"${CREATE_FLAGS:-}"
  tpus queued-resources create "$NAME" --node-id="$NAME" "${slice[@]}" \
    --runtime-version="$version" "${capacity[@]}" "${more[@]}" "${words[@]}"
}

delete() { tpus queued-resources delete "$NAME" --force --quiet; }

# State of the request: ACTIVE, SUSPENDED, ...; empty when there is none of this name.
slice_state() {
  # Not describe: it fails alike for a request that does not exist and for a network that is down.
  tpus queued-resources list --filter="name~/$NAME\$" --format='value(state.state)'
}

wait_() {
  local state
  while :; do
    state=$(slice_state)
    if [[ $dry_run == yes ]]; then
      echo "$state"
      return
    fi
    say "$NAME is ${state:-absent}"
    case $state in
      ACTIVE) return ;;
      "") die "there is no request $NAME in $ZONE; create it." ;;
      FAILED | SUSPENDING | SUSPENDED) die "$NAME is $state; delete it and create it anew." ;;
    esac
    sleep "${POLL:-60}"
  done
}

# ---- the workers ----

install() {
  local setup
  setup=$(printf '%q %q' "${EXTRAS:-tpu,gcs}" "${PYTHON_VERSION:-3.12}")
  setup="bash ~/dsad/launch/worker.sh install $setup${SETUP:+ && $SETUP}"
  if [[ -n ${REPOSITORY:-} ]]; then
    on_worker all "rm -rf ~/dsad && git clone --quiet $(printf '%q' "$REPOSITORY") ~/dsad && \
git -C ~/dsad checkout --quiet $(printf '%q' "${REVISION:-HEAD}") && \
git -C ~/dsad rev-parse HEAD > ~/dsad/REVISION && $setup"
    return
  fi
  local revision archive
  revision=$(git -C "$root" rev-parse --verify "${REVISION:-HEAD}^{commit}") ||
    die "REVISION=${REVISION:-HEAD}: no such commit in $root."
  # Workers must run what a revision names; else nobody can tell later what was run.
  [[ -n ${REVISION:-} || -z $(git -C "$root" status --porcelain) ]] ||
    die "$root has changes that no commit holds. Commit them, or set REVISION=HEAD to leave them out."
  archive=$(mktemp -d)/dsad.tar.gz
  # return: set -e does not hold where resume calls this.
  do_ git -C "$root" archive --output="$archive" "$revision" || return
  tpus tpu-vm scp "$archive" "$NAME:dsad.tar.gz" "${ssh_flags[@]}" --worker=all || return
  rm -rf "$(dirname "$archive")"
  on_worker all "rm -rf ~/dsad && mkdir ~/dsad && tar -xzf ~/dsad.tar.gz -C ~/dsad && \
echo $revision > ~/dsad/REVISION && $setup"
}

# dsad's arguments with those that every run on a slice has.
run_arguments() {
  [[ $# -gt 0 ]] || die "the dsad command is missing: $command -- pretrain --config=..."
  local argument
  for argument in "${@:2}"; do
    case $argument in
      --workdir* | --distributed* | --continue* | --resume* | --overwrite)
        die "${argument%%=*} is set by this script; WORKDIR names the directory." ;;
    esac
  done
  arguments=("$@" --distributed --workdir="$WORKDIR")
  [[ $1 != pretrain ]] || arguments+=(--continue)
}

run() {
  local arguments
  run_arguments "$@"
  on_worker all "bash ~/dsad/launch/worker.sh start $(printf '%q ' "${arguments[@]}")"
}

# One line per worker; state=absent where dsad is not installed.
workers() {
  # shellcheck disable=SC2016  # the worker's shell expands it
  on_worker all 'if [ -x ~/dsad-env/bin/dsad ]; then bash ~/dsad/launch/worker.sh status; '\
'else echo "$(hostname) revision=none run=- state=absent code=- |"; fi'
}

status() {
  slice_state
  workers
}

logs() { on_worker "${1:-0}" "bash ~/dsad/launch/worker.sh log $(printf '%q' "${2:-20}")"; }

stop() { on_worker all "bash ~/dsad/launch/worker.sh stop"; }

# ---- until it is complete ----

fail() {
  say "$*"
  say "$NAME may still exist and cost money until it is deleted: look at launch/tpu_vm.sh logs," \
    "then launch/tpu_vm.sh delete"
  exit 1
}

count_failure() {
  failures=$((failures + 1))
  [[ $failures -le ${MAX_FAILURES:-3} ]] || fail "$1; that is failure $failures, giving up."
  say "$1 (failure $failures of at most ${MAX_FAILURES:-3})"
}

ask() { create || count_failure "$NAME could not be asked for"; }

# What fails here is tried again in the next round.
anew() {
  say "$NAME is $1: asking for it anew"
  if delete; then ask; else count_failure "$NAME could not be deleted"; fi
}

# The last deletion, which nothing comes after.
give_back() {
  local left state
  for left in 5 4 3 2 1 0; do
    if delete; then return; fi
    # What failed may have been the answer alone.
    if state=$(slice_state) && [[ -z $state ]]; then return; fi
    say "$NAME could not be deleted; $left more attempts"
    [[ $left == 0 ]] || sleep "${POLL:-60}"
  done
  fail "the run is complete, but $NAME could not be deleted."
}

start_again() { run "$@" || say "not every worker started; looking again"; }

# What to do about an ACTIVE slice. Sets complete=yes when the run is.
tend() {
  local report codes=() code bad=() mine
  if ! report=$(workers 2>&1); then
    say "the workers do not answer: $(tail -n 1 <<<"$report")"
    return
  fi
  report=$(sed -n 's/^\([^|]* state=[^|]*\) |.*/\1/p' <<<"$report") # without the lines of the logs
  mine=$(printf '%s\0' "${arguments[@]}" | cksum | cut -d' ' -f1)
  # What ended before with other arguments says nothing about this run.
  report=$(sed -E "/ run=$mine /!s/ state=(exited|lost) .*/ state=none code=-/" <<<"$report")
  mapfile -t codes < <(sed -n 's/.* state=exited code=\([0-9]*\)$/\1/p' <<<"$report" | sort -u)
  if [[ $report == *state=absent* ]]; then
    say "installing dsad"
    if install; then start_again "$@"; else count_failure "the installation failed"; fi
  elif grep state=running <<<"$report" | grep -qv " run=$mine "; then
    fail "another run goes on there; stop it first."
  elif [[ $report == *state=running* ]]; then
    tend_running "$report"
  elif [[ ${codes[*]} == 0 && $report != *state=lost* && $report != *state=none* ]]; then
    complete=yes
  elif [[ ${codes[*]} == 2 && $report != *state=lost* && $report != *state=none* ]]; then
    # Of all workers: one alone may have lost its peers or its disk.
    fail "dsad refused its input (exit code 2 on all workers); repeating would not help."
  else
    for code in "${codes[@]}"; do
      [[ $code == 0 || $code == "$stopped" ]] || bad+=("$code")
    done
    [[ ${#bad[@]} == 0 ]] || count_failure "dsad ended with exit code ${bad[*]}"
    say "continuing the run"
    start_again "$@"
  fi
}

# Processes that lost a peer end by themselves; those that hang instead are ended here.
tend_running() {
  local all running
  all=$(grep -c state= <<<"$1") running=$(grep -c state=running <<<"$1")
  say "running on $running of $all workers"
  if [[ $running == "$all" ]]; then
    partial=0
  elif [[ $((partial += 1)) -gt 10 ]]; then
    say "the others do not end; killing them"
    on_worker all "bash ~/dsad/launch/worker.sh kill" || say "not every worker was reached"
    partial=0
  fi
}

resume() {
  [[ ${1:-} == pretrain ]] || die "resume continues a pretraining: resume -- pretrain --config=..."
  local arguments state failures=0 partial=0 complete=no
  run_arguments "$@"
  if [[ $dry_run == yes ]]; then
    echo "# each round:" && slice_state && workers
    echo "# when there is no slice:" && create
    echo "# when it was preempted:" && delete && create
    echo "# when it is ACTIVE and new:" && install && run "$@"
    echo "# when the run is complete:" && delete
    return
  fi
  while :; do
    if ! state=$(slice_state); then
      say "gcloud does not answer; trying again"
      state=UNKNOWN
    fi
    case $state in
      ACTIVE) tend "$@" ;;
      "")
        say "asking for $NAME"
        ask
        ;;
      SUSPENDED) anew "$state" ;;
      FAILED)
        count_failure "the request failed"
        anew "$state"
        ;;
      *) say "$NAME is $state" ;;
    esac
    [[ $complete == no ]] || break
    sleep "${POLL:-60}"
  done
  say "the run in $WORKDIR is complete"
  [[ ${KEEP:-0} == 1 ]] || give_back
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
  create | install | status | logs | stop | delete | wait | run | resume) need PROJECT ZONE NAME ;;
  *) usage ;;
esac
case $command in
  run | resume) need WORKDIR ;;
esac
case $command in
  run | resume | logs) ;;
  *) [[ $# -eq 0 ]] || die "$command: unexpected argument $1." ;;
esac
case $command in
  wait) wait_ ;;
  *) "$command" "$@" ;;
esac
