#!/usr/bin/env bash
# launch/tpu.sh runs this script on every worker of a TPU:
#
#   bash lory_jax/launch/worker.sh install               install Python 3.11 and requirements-tpu.txt
#   bash lory_jax/launch/worker.sh start VERB ARGUMENTS  run a verb in the background, once
#   bash lory_jax/launch/worker.sh follow | result | stop | kill
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh

UV=uv==0.13.9

is_running() { [ -s run/pid ] && kill -0 "$(cat run/pid)" 2>/dev/null; }

case ${1:-} in
  install)
    # The Python of the TPU images is older than 3.11.
    python3 -m pip install --quiet --user "$UV"
    ~/.local/bin/uv python install --quiet 3.11
    PYTHON=$(~/.local/bin/uv python find 3.11) && export PYTHON
    setup requirements-tpu.txt
    ;;
  start)
    shift
    mkdir -p run
    if is_running; then
      [ "$*" = "$(cat run/command)" ] || fail "another command is running: $(cat run/command); stop it first"
      echo "already running"
      exit
    fi
    rm -f run/result
    echo "$*" >run/command
    verb=$1
    shift
    # Detached, so that it outlives the connection. A signal to the group must not end the inner shell
    # before it has written the result.
    # shellcheck disable=SC2016
    LORY_DISTRIBUTED=1 nohup setsid bash -c 'trap : TERM; "$@"; echo $? >run/result' start \
      .venv/bin/python -m "lory_jax.$verb" "$@" >run/log 2>&1 </dev/null &
    echo $! >run/pid
    ;;
  follow) tail -n 100 -F --pid="$(cat run/pid)" run/log ;;
  result) if [ -s run/result ]; then cat run/result; fi ;;
  stop)
    is_running || fail "no command is running"
    kill -TERM -- "-$(cat run/pid)"
    ;;
  kill) # so that it can be started again at once
    if is_running; then kill -KILL -- "-$(cat run/pid)"; fi
    rm -f run/pid
    ;;
  *) fail "the first argument must be install, start, follow, result, stop or kill" ;;
esac
