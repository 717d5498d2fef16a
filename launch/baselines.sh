#!/usr/bin/env bash
# Trains Lory and all its baselines on the local corpus, one run after the other:
#
#   bash launch/baselines.sh [--steps=N] [--data=DIR] [--out=DIR]
#
# Every run trains N steps (default 600) on the data of launch/local.sh (default runs/local/data) into
# runs/baselines/. The script writes comparison.json, comparison.html and how.txt to --out (default
# docs/comparison). Run it again to resume. $PYTHON and $VENV name the Python interpreter to start from
# (default python3) and the virtual environment (default .venv).
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh

steps=600 data=runs/local/data out=docs/comparison runs=runs/baselines
for argument in "$@"; do
  case $argument in
    --steps=*[!0-9]* | --steps=) fail "--steps: got '${argument#--steps=}', must be a number" ;;
    --steps=*) steps=${argument#--steps=} ;;
    --data=?*) data=${argument#--data=} ;;
    --out=?*) out=${argument#--out=} ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 0 ;;
    *) fail "$argument: unknown option; the options are --steps=N, --data=DIR and --out=DIR" ;;
  esac
done
[ -f "$data/manifest.json" ] || fail "$data: no prepared data found; prepare it with bash launch/local.sh --steps=60"

setup requirements.txt
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} # as in local.sh

names=(dense lory prefix expert_choice_segment expert_choice_token top1 top2 lory_without_warmup)
for name in "${names[@]}"; do
  experts=8
  fields=("--config.train.steps=$steps" "--config.train.validate_every_steps=50")
  case $name in
    dense) experts=0 ;;
    lory) ;;
    lory_without_warmup) fields+=("--config.train.dense_warmup_fraction=0") ;;
    *) fields+=("--config.model.routing=$name") ;;
  esac
  workdir=$runs/$name
  echo "== $name"
  "$PY" -m lory_jax.train --config="configs/local.py:experts=$experts" "${fields[@]}" \
    --data="$data" --workdir="$workdir"
  if [ ! -f "$workdir/evaluation.json" ]; then
    "$PY" -m lory_jax.evaluate --workdir="$workdir" --data="$data"
  fi
  if [ "$experts" != 0 ] && [ ! -f "$workdir/analysis/analysis.json" ]; then
    "$PY" -m lory_jax.analyze --workdir="$workdir" --data="$data"
  fi
done

"$PY" -m lory_jax.compare "${names[@]/#/$runs/}" --data="$data" --out="$out/comparison"
{
  echo "bash launch/baselines.sh --steps=$steps"
  date -u +%Y-%m-%d
  echo "$(uname -sm), $(nproc) cores, $("$PY" --version)"
} >"$out/how.txt.tmp"
mv "$out/how.txt.tmp" "$out/how.txt"
