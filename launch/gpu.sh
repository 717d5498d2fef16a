#!/usr/bin/env bash
# Runs `python -m lory_jax.VERB ARGUMENTS` on the NVIDIA GPUs of one or many hosts:
#
#   bash launch/gpu.sh [OPTIONS] VERB ARGUMENTS
#
# First        bash launch/gpu.sh doctor     checks the GPUs of this host
# One host     bash launch/gpu.sh train --config=configs/lory_0_3b.py --data=D --workdir=W
# Many hosts   on each of N hosts, with its own I from 0 to N - 1:
#              bash launch/gpu.sh --hosts=N --host=I --coordinator=HOST0:PORT train ...
# Measure      bash launch/gpu.sh bench --minutes=25     one GPU, everything in order of worth
#              bash launch/gpu.sh bench --dry-run        the same script at toy size, on a CPU
# SLURM        one task per host: srun --ntasks-per-node=1 --gpus-per-node=8 bash launch/gpu.sh train ...
#
# Options
#   --processes=N         processes on this host, which share its GPUs evenly (default 1: all GPUs)
#   --hosts=N --host=I    number of hosts, and the index of this one (default: SLURM's, else 1 and 0)
#   --coordinator=H:P     address and free port of host 0 (default: SLURM's, else this machine)
#   --restarts=N          if one process dies, stop the others and restart all of them, at most N
#                         times (default 3)
#
# $PYTHON and $VENV choose the interpreter and the environment; $XLA_FLAGS is appended to the flags
# that this script sets.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh

PORT=12321       # of the coordinator, unless --coordinator says otherwise
SAVE_SECONDS=600 # that a process has to save when it is stopped, before it is killed
PEER_SECONDS=10  # the same if another process died; a save would require all of them
# After a wrong flag or field, or a run that diverged, a restart would not help.
FINAL_STATUSES='2 3'

# Flags whose defaults do not suit this program, and why.
FLAGS=(
  # Starts collectives early and waits for them late, so that they overlap with computation; off by
  # default. FSDP gathers parameters and scatters gradients in every layer.
  --xla_gpu_enable_latency_hiding_scheduler=true
  # Lets the gather for a layer start in the previous iteration of the scan; off by default.
  --xla_gpu_enable_pipelined_all_gather=true
)

# ---------------------------------------------------------------- what is asked for
processes=1 hosts=${SLURM_NTASKS:-1} host=${SLURM_PROCID:-0} coordinator='' restarts=3
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' launch/gpu.sh && exit 0 ;;
    --processes=?*) processes=${1#*=} ;;
    --hosts=?*) hosts=${1#*=} ;;
    --host=?*) host=${1#*=} ;;
    --coordinator=?*) coordinator=${1#*=} ;;
    --restarts=?*) restarts=${1#*=} ;;
    -*) fail "$1: unknown or without a value; see --help" ;;
    *) break ;;
  esac
  shift
done
[ $# -gt 0 ] || fail "VERB: missing, such as train --config=... --data=... --workdir=..."
for number in "--processes=$processes" "--hosts=$hosts" "--host=$host" "--restarts=$restarts"; do
  case ${number#*=} in *[!0-9]* | '') fail "${number%%=*}: got '${number#*=}', must be a number" ;; esac
done
[ "$processes" -ge 1 ] || fail "--processes: got $processes, must be at least 1"
[ "$host" -lt "$hosts" ] || fail "--host: got $host, must be less than --hosts=$hosts"
if [ -z "$coordinator" ] && [ "$hosts" -gt 1 ]; then
  [ -n "${SLURM_JOB_NODELIST:-}" ] || fail "--coordinator: missing; must be HOST:PORT of host 0"
  [ "${SLURM_NTASKS_PER_NODE:-1}" = 1 ] || fail "srun: requires --ntasks-per-node=1; a task sees all GPUs of its host"
  coordinator=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$PORT
fi
coordinator=${coordinator:-localhost:$PORT}
verb=$1
shift

# ---------------------------------------------------------------- measurements
# They require few packages, so an image that has them is used as it is.
if [ "$verb" = bench ]; then
  PY=${PYTHON:-python3}
  "$PY" -c 'import jax, flax, optax, orbax.checkpoint' 2>/dev/null || setup requirements-cuda.txt
  exec "$PY" benchmarks/gpu.py "$@"
fi

# ---------------------------------------------------------------- set-up
setup requirements-cuda.txt
# JAX may reserve 90 % of the memory of each GPU instead of 75 %: cuDNN and NCCL need little.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
export XLA_FLAGS="${FLAGS[*]} ${XLA_FLAGS:-}"
gpus=0
case ${JAX_PLATFORMS:-cuda} in
  *cuda* | *gpu*)
    gpus=$(nvidia-smi --list-gpus | grep -c .) ||
      fail "nvidia-smi: found no GPU; is the driver installed? (JAX_PLATFORMS=cpu requires none)"
    [ $((gpus % processes)) -eq 0 ] ||
      fail "--processes: got $processes, must divide the $gpus GPUs of this host"
    ;;
esac

# ---------------------------------------------------------------- processes
children=()

start() {
  local i first per_process=$((gpus / processes))
  children=()
  for ((i = 0; i < processes; i++)); do
    local settings=(env)
    if [ $((hosts * processes)) -gt 1 ]; then
      settings+=("LORY_COORDINATOR=$coordinator" "LORY_NUM_PROCESSES=$((hosts * processes))"
        "LORY_PROCESS_ID=$((host * processes + i))")
      # Without this JAX would use one GPU per task under SLURM.
      if [ "$gpus" -gt 0 ]; then
        first=$((i * per_process))
        settings+=("JAX_LOCAL_DEVICE_IDS=$(seq -s, "$first" $((first + per_process - 1)))")
      fi
    fi
    "${settings[@]}" "$PY" -m "lory_jax.$verb" "$@" &
    children+=($!)
  done
}

# Waits until all have succeeded. If one fails, it stops the others and returns its status.
wait_for_all() {
  local running=("${children[@]}") still child status
  while [ ${#running[@]} -gt 0 ]; do
    still=()
    for child in "${running[@]}"; do
      if kill -0 "$child" 2>/dev/null; then
        still+=("$child")
      else
        status=0
        wait "$child" || status=$?
        if [ "$status" -ne 0 ]; then
          stop_all "$PEER_SECONDS"
          return "$status"
        fi
      fi
    done
    running=(${still[@]+"${still[@]}"})
    if [ ${#running[@]} -gt 0 ]; then sleep 1; fi
  done
}

stop_all() { # seconds
  local second
  kill -TERM "${children[@]}" 2>/dev/null || true
  for ((second = 0; second < $1; second++)); do
    kill -0 "${children[@]}" 2>/dev/null || break
    sleep 1
  done
  kill -KILL "${children[@]}" 2>/dev/null || true
  wait
}

stop() {
  trap '' INT TERM
  if [ ${#children[@]} -gt 0 ]; then stop_all "$SAVE_SECONDS"; fi
  echo "stopped; run the same command again to resume" >&2
  exit 143
}
trap stop INT TERM

for ((attempt = 0; ; attempt++)); do
  start "$@"
  status=0
  wait_for_all || status=$?
  [ "$status" -ne 0 ] || exit 0
  case " $FINAL_STATUSES " in *" $status "*) exit "$status" ;; esac
  [ "$verb" != doctor ] || exit "$status" # it would find the same problems again
  [ "$attempt" -lt "$restarts" ] || fail "a process failed with status $status after $restarts restarts, and --restarts=$restarts allows no more"
  echo "a process failed with status $status: restarting all of them ($((attempt + 1)) of at most $restarts)" >&2
done
