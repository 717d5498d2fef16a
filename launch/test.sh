#!/usr/bin/env bash
# Runs the checks and the tests:  bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh

setup requirements-dev.txt
"$PY" -m ruff check .
"$PY" -m ruff format --check .
"$PY" -m mypy
# Each of the two processes runs whole files, so that every fixture is created once.
"$PY" -m pytest -n 2 --dist loadfile "$@"
