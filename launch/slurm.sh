#!/usr/bin/env bash
# Submits the stages of `prepare` to Slurm, each as an array of jobs that begins when the one before ended:
#
#   bash launch/slurm.sh JOBS --out=DIR --work=DIR --source=SOURCE [flags of prepare]
#
# JOBS is the size of every array; a job runs the tasks of a stage whose number is its index modulo JOBS. DIR and
# SOURCE must be on storage that all nodes reach. $SBATCH_FLAGS holds more flags of sbatch, such as "--partition=cpu
# --mem=4G --time=4:00:00", and $PY the interpreter (default .venv/bin/python). Submitted again, finished tasks are
# skipped.
set -euo pipefail
cd "$(dirname "$0")/.."

jobs=${1:-}
case $jobs in
  '' | *[!0-9]* | 0*) sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
shift
python=${PY:-.venv/bin/python}
stages=$("$python" -c '
from lory_jax.preparation.stages import STAGES
print(*(stage.name for stage in STAGES))')
read -r -a more <<<"${SBATCH_FLAGS:-}"
quoted=$(printf '%q ' "$python" -m lory_jax.prepare "$@")

after=()
for stage in $stages; do
  id=$(sbatch --parsable --job-name="lory-$stage" --array="0-$((jobs - 1))" --cpus-per-task=1 \
    --output="lory-$stage-%a.log" ${after[@]+"${after[@]}"} ${more[@]+"${more[@]}"} \
    --wrap="$quoted --stage=$stage --task=\$SLURM_ARRAY_TASK_ID/$jobs")
  echo "$stage: job ${id%%;*}"
  after=("--dependency=afterok:${id%%;*}")
done
