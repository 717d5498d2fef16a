#!/usr/bin/env bash
# Stands in for gcloud: writes down every call, and plays a queued resource whose one worker is a
# directory. $PLAY holds: calls (all arguments, one call a line), state, plan (what the next times
# of following bring: ok, preempted or dropped), worker/ (the home directory over there).
set -euo pipefail
printf '%s\n' "$*" >>"$PLAY/calls"
[ "$1 $2 $3" = "compute tpus queued-resources" ] || exit 64
verb=$4 state=$(cat "$PLAY/state")

next_plan() {
  head -n 1 "$PLAY/plan"
  [ "$(wc -l <"$PLAY/plan")" -le 1 ] || sed -i 1d "$PLAY/plan"
}

case $verb in
  describe)
    case "$*" in *failedData*) echo "no such type in this zone" && exit ;; esac
    if [ "$state" = MISSING ]; then
      echo "ERROR: (gcloud.compute.tpus) NOT_FOUND: no such resource" >&2
      exit 1
    fi
    echo "$state"
    case $state in
      WAITING_FOR_RESOURCES) echo PROVISIONING >"$PLAY/state" ;;
      PROVISIONING) echo ACTIVE >"$PLAY/state" ;;
    esac
    ;;
  create)
    [ "$state" = MISSING ] || { echo "ERROR: ALREADY_EXISTS" >&2 && exit 1; }
    if [ -e "$PLAY/refuse" ]; then echo FAILED; else echo WAITING_FOR_RESOURCES; fi >"$PLAY/state"
    mkdir -p "$PLAY/worker"
    ;;
  delete) echo MISSING >"$PLAY/state" && rm -rf "$PLAY/worker" ;;
  scp) [ -s "$5" ] ;;
  ssh)
    [ "$state" = ACTIVE ] || exit 255
    for word in "$@"; do
      case $word in --command=*) command=${word#--command=} ;; esac
    done
    cd "$PLAY/worker"
    case $command in
      "tar "*) mkdir -p lory_jax/.venv/bin && cp -R "$CHECKOUT/launch" lory_jax/ &&
        cp "$PLAY/python" lory_jax/.venv/bin/python ;;
      *"worker.sh install") ;;
      *"worker.sh follow")
        case $(next_plan) in
          ok) bash -c "$command" ;;
          dropped) exit 255 ;;
          preempted)
            kill -KILL -- "-$(cat lory_jax/run/pid)" || true
            echo SUSPENDED >"$PLAY/state"
            exit 255
            ;;
        esac
        ;;
      *) bash -c "$command" ;;
    esac
    ;;
esac
