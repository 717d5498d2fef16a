#!/usr/bin/env bash
# Runs the whole flow on this machine, from the documents of the Python installation to a report:
#
#   bash launch/local.sh [--steps=N] [--seed=N] [--out=DIR]
#
# It trains Lory (8 experts) and its dense baseline side by side into runs/local/ (or DIR). Ctrl-C
# saves both runs and stops; run the same command again to resume. $PYTHON and $VENV name the Python
# interpreter to start from (default python3) and the virtual environment (default .venv).
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh

out=runs/local
overrides=()
for argument in "$@"; do
  case $argument in
    --steps=*[!0-9]* | --steps=) fail "--steps: got '${argument#--steps=}', must be a number" ;;
    --steps=*) overrides+=("--config.train.steps=${argument#--steps=}") ;;
    --seed=*[!0-9]* | --seed=) fail "--seed: got '${argument#--seed=}', must be a number" ;;
    --seed=*) overrides+=("--config.train.seed=${argument#--seed=}") ;;
    --out=?*) out=${argument#--out=} ;;
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0" && exit 0 ;;
    *) fail "$argument: unknown option; the options are --steps=N, --seed=N and --out=DIR" ;;
  esac
done

children=()
stop() {
  trap '' INT TERM
  if [ ${#children[@]} -gt 0 ]; then kill -TERM "${children[@]}" 2>/dev/null || true; fi
  wait
  echo "stopped; run the same command again to resume" >&2
  exit 130
}
trap stop INT TERM

# ---------------------------------------------------------------- set-up
setup requirements.txt
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export PYTHONUNBUFFERED=1 # lines appear at once, in files and pipes too
# Large pages for glibc's allocator: XLA allocates and frees its buffers in every step, and with small
# pages the page faults took a fifth of a step.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
order=similar
if ! "$PY" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("scann") is None)'; then
  echo "ScaNN has no wheel for $("$PY" --version) on $(uname -sm): documents stay in random order." >&2
  echo "Everything else works. For similarity order, run prepare on Linux with Python 3.11 to 3.13" >&2
  echo "and copy its output directory to this machine." >&2
  order=random
fi

# ---------------------------------------------------------------- documents to instances
# Near duplicates stay, because the figures in docs/ were measured with them.
"$PY" -m lory_jax.prepare --config=configs/local.py --source=python --order=$order --out="$out/data" \
  --config.data.drop_near_duplicates=false

# ---------------------------------------------------------------- both models, half the cores each
prefix() { # name; it ends with its input, not by a signal: the trainer still has something to say
  trap '' INT TERM
  local line
  while IFS= read -r line || [ -n "$line" ]; do printf '%s: %s\n' "$1" "$line"; done
}
train() { # name, experts, cores
  local on_cores=(env)
  if command -v taskset >/dev/null; then on_cores=(taskset -c "$3"); fi
  # exec makes the trainer the job's process, so that signals reach it.
  exec "${on_cores[@]}" "$PY" -m lory_jax.train --config="configs/local.py:experts=$2" \
    ${overrides[@]+"${overrides[@]}"} --data="$out/data" --workdir="$out/$1" \
    > >(prefix "$1") 2>&1
}
read -r first second < <("$PY" -c '
import os
cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
half = max(1, len(cores) // 2)
print(",".join(map(str, cores[:half])), ",".join(map(str, cores[-half:])))')
train dense 0 "$first" &
children+=($!)
train lory 8 "$second" &
children+=($!)
for child in "${children[@]}"; do
  wait "$child" || { kill "${children[@]}" 2>/dev/null; wait; fail "training failed; see above"; }
done
children=()

# ---------------------------------------------------------------- evaluation and report
for name in dense lory; do
  if [ -f "$out/$name/evaluation.json" ]; then
    echo "$name: already evaluated"
  else
    "$PY" -m lory_jax.evaluate --workdir="$out/$name" --out="$out/$name/evaluation.json"
  fi
done
if [ -f "$out/lory/analysis/analysis.json" ]; then
  echo "lory: already analyzed"
else
  "$PY" -m lory_jax.analyze --workdir="$out/lory"
fi
"$PY" -m lory_jax.compare "dense=$out/dense" "lory=$out/lory" --out="$out/report"
