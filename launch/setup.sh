# The other launch scripts source this file. It creates the virtual environment and installs the pinned
# packages:
#
#   setup requirements.txt      sets $PY to the environment's interpreter
#
# $PYTHON is the interpreter to start from (default python3), $VENV the environment (default .venv).

fail() {
  echo "error: $*" >&2
  exit 1
}

setup() {
  local requirements=$1 python=${PYTHON:-python3} venv=${VENV:-.venv} stamp
  command -v "$python" >/dev/null || fail "$python: not found; lory_jax requires Python 3.11 or newer (set PYTHON=...)"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) found; lory_jax requires Python 3.11 or newer (set PYTHON=...)"
  if [ ! -x "$venv/bin/python" ]; then
    echo "creating the virtual environment $venv"
    "$python" -m venv "$venv" || fail "$python -m venv failed; on Debian: apt-get install python3-venv"
  fi
  PY=$venv/bin/python
  stamp=$venv/.installed-$requirements
  # The packages are installed already if the stamp holds this very list.
  if ! cat requirements*.txt | cmp -s - "$stamp"; then
    echo "installing $requirements into $venv"
    "$PY" -m pip install --quiet --disable-pip-version-check -r "$requirements" ||
      fail "pip could not install $requirements"
    "$PY" -m pip install --quiet --disable-pip-version-check --no-deps --editable . ||
      fail "pip could not install lory_jax itself"
    cat requirements*.txt >"$stamp"
  fi
}
