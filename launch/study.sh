#!/usr/bin/env bash
# Runs the study of docs/study.md: every claim about Lory, with seeds, intervals and a verdict.
#
#   bash launch/study.sh [--stage=A|B|C|D|beyond|sparse] [--arms=NAME,...] [--hours=H] [--cores=N]
#
# It resumes from the finished runs in docs/study/runs and trains those that are missing (with --arms, of
# these arms only; * and ? are wildcards), one on each of N cores (default 1). Then it writes docs/study.*
# and the study's tables in other pages. Ctrl-C and the end of the hours save the runs under way; run the
# same command again to resume. $PYTHON and $VENV name the interpreter and the virtual environment.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh

case ${1-} in
  -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 0 ;;
esac
setup requirements.txt
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export PYTHONUNBUFFERED=1
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} # as in local.sh
exec "$PY" -m tools.study "$@"
