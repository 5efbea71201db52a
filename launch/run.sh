#!/usr/bin/env bash
# dsad with an exit code that tells schedulers whether to start it again. Workers and containers
# start it; a dsad on PATH is all that it needs.
#
#   bash launch/run.sh pretrain --config=... --workdir=DIR --continue
#
# dsad itself exits with 0 both when a pretraining is complete and when it was asked to stop and
# saved. Here 0 means complete, 75 means that it stopped as it was asked to and is not complete; all
# other codes are dsad's: 1 for crashes, 2 for unusable input, 3 for faults of the storage. SIGTERM
# is passed on.
set -euo pipefail

child="" asked=no
trap 'told=yes asked=yes; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM
dsad "$@" &
child=$!
[[ $asked == no ]] || kill -TERM "$child" 2>/dev/null || true # asked before there was a child
told=yes
while [[ $told == yes ]]; do # a signal ends wait, not dsad
  told=no code=0
  wait "$child" || code=$?
done

if [[ $code == 143 && $asked == yes && ${1:-} == pretrain ]]; then
  # SIGTERM came before Python could catch it: no crash, and nothing to save yet.
  echo "run.sh: stopped before it began"
  code=75
elif [[ $code == 0 && ${1:-} == pretrain ]]; then
  for argument in "$@"; do
    [[ $argument != --workdir=* ]] || workdir=${argument#--workdir=}
  done
  # The file is written by dsad after the last step; epath because it may lie in a bucket.
  python - "${workdir:?run.sh: --workdir=DIR is missing}" <<'END' || code=$?
import sys
from etils import epath

complete = (epath.Path(sys.argv[1]).expanduser() / "complete.json").exists()
sys.exit(0 if complete else 75)
END
  case $code in
    0) ;;
    75) echo "run.sh: saved, but not complete" ;;
    *) echo "run.sh: cannot tell whether the run in $workdir is complete" >&2 ;;
  esac
fi
exit "$code"
