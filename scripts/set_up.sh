#!/usr/bin/env bash
# Makes the virtual environment that `make demo`, `make test` and `make bench` run in. Called by the Makefile.
#
#   VENV         folder to make                                            (.venv)
#   PYTHON       interpreter to use instead of the first fitting one
#   CUDA         1 or 0 instead of asking nvidia-smi
#   TORCH_INDEX  package index with other builds of torch, for example https://download.pytorch.org/whl/cu126
#
# VENV/.ready is written last and holds the checkout's path. A folder without it was left half-finished and is made anew.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv}
READY=$VENV/.ready
OWNED=$VENV/.made-by-gemma-tune
CPU_INDEX=https://download.pytorch.org/whl/cpu

fail() {
  printf '\nset-up failed: %s\n' "$*" >&2
  exit 1
}

step() {
  printf '[%s] %s\n' "$1" "$2"
}

# One line about an interpreter: "ok 3.11.7", "no <why it does not fit>", or nothing when it does not start.
describe_python() {
  "$1" - 2>/dev/null <<'PY'
import sys

version = ".".join(map(str, sys.version_info[:3]))
if not (3, 11) <= sys.version_info[:2] < (3, 14):
    print("no", version, "is not 3.11, 3.12 or 3.13")
    raise SystemExit
try:
    import ensurepip, venv
except ImportError:
    print("no", version, "lacks venv (Debian and Ubuntu: apt install python%d.%d-venv)" % sys.version_info[:2])
else:
    print("ok", version)
PY
}

find_python() {
  local candidate found tried=""
  # 3.12 and 3.11 first: the stack was measured on these.
  for candidate in ${PYTHON:-python3.12 python3.11 python3.13 python3 python}; do
    if ! command -v "$candidate" >/dev/null; then
      tried="$tried\n  $candidate: not found"
      continue
    fi
    found=$(describe_python "$candidate") || found=""
    case $found in
      ok*)
        python=$candidate
        python_version=${found#ok }
        return
        ;;
      no*) tried="$tried\n  $candidate: ${found#no }" ;;
      *) tried="$tried\n  $candidate: does not start" ;;
    esac
  done
  fail "gemma-tune needs Python 3.11, 3.12 or 3.13. Tried:$(printf '%b' "$tried")
Install one, or name it: make PYTHON=/path/to/python3.12"
}

has_cuda() {
  case ${CUDA:-} in
    0 | 1) [ "$CUDA" = 1 ] ;;
    *) nvidia-smi -L >/dev/null 2>&1 ;;
  esac
}

# PyPI's Linux build of torch brings 3 GB of CUDA; PyTorch's own index has one without. Not every network lets us there, and
# pip alone would retry for a minute and print a warning for each try.
can_reach() {
  "$VENV/bin/python" - "$1" 2>/dev/null <<'PY'
import sys
import urllib.request

urllib.request.urlopen(urllib.request.Request(sys.argv[1] + "/torch/", method="HEAD"), timeout=8)
PY
}

pinned() {
  "$VENV/bin/python" - "$1" <<'PY'
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)
pins = {"torch": [project["tool"]["gemma-tune"]["torch"]], **project["project"]["optional-dependencies"]}
print(*pins[sys.argv[1]])
PY
}

install() {
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "$@" || fail "pip's own error is above; run make again when it is mended"
}

start=$SECONDS
num_steps=4
if has_cuda; then
  num_steps=3
fi
find_python
if [ -e "$VENV" ] && [ ! -e "$OWNED" ]; then
  fail "$VENV exists and was not made by this script. Move it away, or use another folder: make VENV=.venv-gemma"
fi
step 1/"$num_steps" "Python $python_version ($(command -v "$python")) → $VENV"
if [ ! -e "$READY" ] || [ "$(head -n 1 "$READY")" != "$PWD" ]; then
  mkdir -p "$VENV"
  touch "$OWNED"
  find "$VENV" -mindepth 1 -maxdepth 1 ! -path "$OWNED" -exec rm -rf {} +
  "$python" -m venv "$VENV" || fail "$python -m venv $VENV"
fi
rm -f "$READY"

torch=$(pinned torch)
if [ "$num_steps" = 3 ]; then
  step 2/3 "$torch with CUDA (about 3 GB)"
  install "$torch" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
  step 3/3 "gemma-tune and what it needs, with Unsloth's CUDA packages"
  install --editable ".[unsloth,dev]"
else
  index=${TORCH_INDEX:-}
  if [ -z "$index" ] && [ "$(uname -s)" = Linux ] && can_reach "$CPU_INDEX"; then
    index=$CPU_INDEX
  fi
  step 2/4 "$torch for the CPU (about 200 MB)"
  # With both indexes at hand pip takes 2.13.0+cpu over 2.13.0.
  install "$torch" ${index:+--extra-index-url "$index"}
  step 3/4 "gemma-tune and what it needs (about 250 MB)"
  install --editable ".[dev]"
  unsloth=$(pinned unsloth)
  step 4/4 "$unsloth, without the GPU packages that they ask for"
  # shellcheck disable=SC2086  # two requirements
  install --no-deps $unsloth
fi
printf '%s\n' "$PWD" >"$READY"
printf 'set-up done in %d s; the next time there is nothing to do\n\n' $((SECONDS - start))
