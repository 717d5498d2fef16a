#!/usr/bin/env bash
# Checks and tests:  bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh

setup requirements-dev.txt
"$PY" -m ruff check .
"$PY" -m ruff format --check .
"$PY" -m mypy
# Two processes, each with whole files: fixtures are made once.
"$PY" -m pytest -n 2 --dist loadfile "$@"
