#!/usr/bin/env bash
# The whole flow on this machine, from the documents of the Python installation to a report:
#
#   bash launch/local.sh [--steps=N] [--out=DIR]
#
# Trains Lory (8 experts) and its dense baseline side by side into runs/local/ (or DIR). Run again, it
# goes on where it stopped; Ctrl-C saves first. $PYTHON and $VENV choose interpreter and environment.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh

out=runs/local
overrides=()
for argument in "$@"; do
  case $argument in
    --steps=*[!0-9]* | --steps=) fail "--steps: got '${argument#--steps=}', takes a number" ;;
    --steps=*) overrides+=("--config.train.steps=${argument#--steps=}") ;;
    --out=?*) out=${argument#--out=} ;;
    -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0" && exit 0 ;;
    *) fail "$argument: unknown; takes --steps=N and --out=DIR" ;;
  esac
done

children=()
stop() {
  trap '' INT TERM
  if [ ${#children[@]} -gt 0 ]; then kill -TERM "${children[@]}" 2>/dev/null || true; fi
  wait
  echo "stopped; the same command goes on from here" >&2
  exit 130
}
trap stop INT TERM

# ---------------------------------------------------------------- set-up
setup requirements.txt
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
# Large pages for glibc's allocator: XLA's buffers come and go with every step, and in small pages
# their faults took a fifth of a step.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
order=similar
if ! "$PY" -c 'import scann' 2>/dev/null; then
  echo "ScaNN has no wheel for this platform ($(uname -sm)): documents stay in random order." >&2
  echo "All else works here; for similarity order run prepare on Linux and copy its directory." >&2
  order=random
fi

# ---------------------------------------------------------------- documents to instances
"$PY" -m lory_jax.prepare --config=configs/local.py --source=python --order=$order --out="$out/data"

# ---------------------------------------------------------------- both models, half the cores each
train() { # name, experts, cores
  local on_cores=(env)
  if command -v taskset >/dev/null; then on_cores=(taskset -c "$3"); fi
  # exec: the job's process is the trainer itself, so that a signal reaches it.
  exec "${on_cores[@]}" "$PY" -m lory_jax.train --config="configs/local.py:experts=$2" \
    ${overrides[@]+"${overrides[@]}"} --data="$out/data" --workdir="$out/$1" \
    > >(sed "s/^/$1: /") 2>&1
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
  if [ ! -f "$out/$name/evaluation.json" ]; then
    "$PY" -m lory_jax.evaluate --workdir="$out/$name" --out="$out/$name/evaluation.json"
  fi
done
if [ ! -f "$out/lory/analysis/analysis.json" ]; then
  "$PY" -m lory_jax.analyze --workdir="$out/lory"
fi
"$PY" -m lory_jax.compare "dense=$out/dense" "lory=$out/lory" --out="$out/report"
