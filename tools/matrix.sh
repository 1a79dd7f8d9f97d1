#!/usr/bin/env bash
# Tries one wheel, as tools/release.sh makes it, on other versions of Python, torch and transformers: every op against its
# reference (w2a4 doctor), and the tests marked `doors`, which every version of transformers passes.
#
#     tools/matrix.sh WHEEL FOLDER 'PYTHON torch==2.13.0 transformers==4.57.6' ['PYTHON …']…
#
# FOLDER: for the environments, which are used again. Everything behind PYTHON is given to pip.
set -uo pipefail
wheel=$(realpath "$1") folder=$(mkdir -p "$2" && cd "$2" && pwd)
tests=$(cd "$(dirname "$0")/../tests" && pwd)
shift 2
status=0 empty=$(mktemp -d)
trap 'rm -rf "$empty"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
cd "$empty"  # so that nothing but the wheel is w2a4, also to a Python that knows no PYTHONSAFEPATH

try() {
  local environment=$1/$(tr -c 'a-zA-Z0-9.\n' _ <<<"$2") words bin about
  read -ra words <<<"$2"
  bin=$environment/bin
  if [ ! -e "$environment/whole" ]; then
    "${words[0]}" -m venv --clear "$environment" &&
      "$bin/pip" install --quiet "${words[@]:1}" pytest pytest-xdist pytest-timeout hypothesis || return
    touch "$environment/whole"
  fi
  "$bin/pip" install --quiet --force-reinstall --no-deps "$wheel" || return
  "$bin/pip" install --quiet "$wheel" "${words[@]:1}" || return
  about='import platform, torch, transformers, w2a4; print("Python", platform.python_version(), "torch", torch.__version__)
print("transformers", transformers.__version__, "w2a4 in", w2a4.__path__[0])'
  "$bin/python" -c "$about" || return
  "$bin/w2a4" doctor | tail -1 || return
  mapfile -t doors < <(grep -l 'mark\.doors' "$tests"/*/test_*.py)
  PYTHONPATH=$tests "$bin/pytest" -q -n 2 -m "doors and not gpu" -p no:cacheprovider --rootdir "$tests/.." \
    -c "$tests/../pyproject.toml" "${doors[@]}" | tail -1
}

for row in "$@"; do
  try "$folder" "$row" || { status=1; echo "failed: $row"; }
done
exit "$status"
