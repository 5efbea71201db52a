#!/usr/bin/env bash
# One worker of a slice, or any machine reached by ssh: installs dsad, and starts, watches and stops
# a command there that goes on when the connection ends. tpu_vm.sh calls it on every worker.
#
#   bash ~/dsad/launch/worker.sh install [EXTRAS [PYTHON]]   an environment (tpu,gcs and 3.12)
#   bash ~/dsad/launch/worker.sh start pretrain --config=... dsad with these arguments, detached
#   bash ~/dsad/launch/worker.sh status                      one line, see below
#   bash ~/dsad/launch/worker.sh log [LINES]                 the end of the log (20 lines)
#   bash ~/dsad/launch/worker.sh stop                        SIGTERM: dsad saves and exits
#   bash ~/dsad/launch/worker.sh kill                        SIGKILL: what was not saved is lost
#
# status prints  HOST revision=REV run=RUN state=STATE code=CODE | LAST LINE OF THE LOG, where RUN is
# a number that stands for dsad's arguments, and STATE
#   none     nothing was started here           running  it runs
#   exited   it ended, CODE as in run.sh says   lost     it vanished, for example with a reboot
#
# Needs: dsad's files in ~/dsad, python3 with pip, the network. Installing takes minutes, mostly for
# the download of libtpu (about 650 MB).
set -euo pipefail

code_dir=$HOME/dsad
environment=$HOME/dsad-env
run_dir=$HOME/dsad-run # pid, process group and boot of the run, exit code once it ended, log

die() {
  echo "worker.sh: $*" >&2
  exit 2
}

usage() {
  sed -n '2,/^set -e/p' "$0" | sed -n 's/^#   bash/  bash/p' >&2
  exit 2
}

boot() { cat /proc/sys/kernel/random/boot_id; }

alive() {
  [[ -f $run_dir/pid && -f $run_dir/group ]] || return 1
  # After a reboot the same number may belong to any other process.
  [[ $(cat "$run_dir/boot") == "$(boot)" ]] && kill -0 "$(cat "$run_dir/group")" 2>/dev/null
}

install() {
  local extras=${1:-tpu,gcs} python=${2:-3.12}
  # The images bring an older Python than dsad needs; uv fetches the one that is asked for.
  python3 -m pip install --quiet --user --upgrade uv
  python3 -m uv venv --quiet --clear --python "$python" "$environment"
  python3 -m uv pip install --quiet --python "$environment/bin/python" -e "${code_dir}[$extras]"
  "$environment/bin/dsad" --version
}

start() {
  [[ $# -gt 0 ]] || usage
  [[ -x $environment/bin/dsad ]] || die "dsad is not installed here; install it first."
  ! alive || die "a run goes on here (process $(cat "$run_dir/pid")); stop it first."
  mkdir -p "$run_dir"
  rm -f "$run_dir/code" "$run_dir/pid" "$run_dir/group"
  boot >"$run_dir/boot"
  printf '%s\0' "$@" | cksum | cut -d' ' -f1 >"$run_dir/run"
  { printf '%q ' dsad "$@" && echo; } >>"$run_dir/log"
  # A session of its own: the end of ssh does not reach it.
  setsid bash "$code_dir/launch/worker.sh" _run "$@" >>"$run_dir/log" 2>&1 </dev/null &
  for _ in {1..100}; do
    [[ ! -f $run_dir/pid ]] || break
    sleep 0.1
  done
  status
}

# The shell that stays beside the run to write down how it ended.
_run() {
  cd "$code_dir"
  PATH=$environment/bin:$PATH bash launch/run.sh "$@" &
  echo $$ >"$run_dir/group"
  echo $! >"$run_dir/pid.new"
  mv "$run_dir/pid.new" "$run_dir/pid"
  local code=0
  wait $! || code=$?
  # Stopped before run.sh could see to it: nothing was lost, and it may be started again.
  [[ $code != 143 ]] || code=75
  echo "$code" >"$run_dir/code.new"
  mv "$run_dir/code.new" "$run_dir/code"
}

status() {
  local state=none code=- line="" run=-
  [[ ! -f $run_dir/run ]] || run=$(cat "$run_dir/run")
  # In this order: the shell beside the run writes its exit code before it ends.
  if alive; then
    state=running
  elif [[ -f $run_dir/code ]]; then
    state=exited code=$(cat "$run_dir/code")
  elif [[ -f $run_dir/boot ]]; then
    state=lost
  fi
  [[ ! -f $run_dir/log ]] || line=$(tail -n 1 "$run_dir/log" | tr '\r' '\n' | tail -n 1)
  echo "$(hostname) revision=$(cat "$code_dir/REVISION" 2>/dev/null || echo unknown)" \
    "run=$run state=$state code=$code | $line"
}

log() {
  [[ -f $run_dir/log ]] || die "no log yet; nothing was started here."
  tail -n "${1:-20}" "$run_dir/log"
}

stop() {
  ! alive || kill -TERM "$(cat "$run_dir/pid")"
  status
}

kill_() {
  ! alive || kill -KILL -- "-$(cat "$run_dir/group")"
  status
}

[[ $# -gt 0 ]] || usage
case $1 in
  install | start | status | log | stop | _run) "$@" ;;
  kill) kill_ ;;
  *) usage ;;
esac
