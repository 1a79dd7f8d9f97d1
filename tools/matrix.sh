#!/usr/bin/env bash
# Tries one wheel, as tools/release.sh makes it, on other versions of Python, torch and transformers: every op against its
# reference (w2a4 doctor), and the tests of checkpoints and of generation.
#
#     tools/matrix.sh WHEEL FOLDER 'PYTHON torch==2.13.0 transformers==4.57.6' ['PYTHON …']…
#
# FOLDER: for the environments, which are used again. Everything behind PYTHON is given to pip.
set -uo pipefail
cd "$(dirname "$0")/.."
wheel=$(realpath "$1") folder=$(mkdir -p "$2" && cd "$2" && pwd)
shift 2
status=0
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONSAFEPATH=1
for row in "$@"; do
  read -ra words <<<"$row"
  environment=$folder/$(tr -c 'a-zA-Z0-9.\n' _ <<<"$row")
  python=$environment/bin/python
  if [ ! -x "$python" ]; then
    "${words[0]}" -m venv "$environment"
    "$python" -m pip install --quiet "${words[@]:1}" pytest pytest-xdist pytest-timeout hypothesis || status=1
  fi
  "$python" -m pip install --quiet --force-reinstall --no-deps "$wheel"
  "$python" -m pip install --quiet "$wheel" "${words[@]:1}"
  versions=$("$python" -c 'import platform as p, torch, transformers as t; print("Python", p.python_version(), "torch", torch.__version__, "transformers", t.__version__)')
  doctor=$("$python" -m w2a4.cli doctor 2>&1 | tail -1)
  tests=$(PYTHONPATH=tests "$python" -P -m pytest -q -n 2 -p no:cacheprovider tests/models/test_checkpoint.py \
    tests/models/test_generation.py tests/models/test_engine.py 2>&1 | tail -1)
  echo "$versions | $doctor | $tests"
  grep -q passed <<<"$tests" && ! grep -q failed <<<"$tests" || status=1
done
exit "$status"
