#!/usr/bin/env bash
# The tests marked `doors`, on every version of transformers that users may have: the oldest that pyproject.toml
# allows, one from the middle, and the newest that it allows and pip finds.
#
#     tools/doors.sh [PYTHON] [VERSION…]
#
# PYTHON has w2a4 installed with its extra `test`; default python3. Without versions, all three. A version that is not
# PYTHON's own goes into a folder in front of its packages, with those of its needs that PYTHON's do not meet.
# Folders are kept in $W2A4_DOORS (a temporary one by default) and used again. The checkpoints that one version saves are
# what the others load, see tests/models/test_versions.py. With W2A4_SUITE_PASSED=1, after the whole suite, PYTHON's own
# version runs only these: the suite had the rest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${1:-python3}")
shift || true
[ $# -gt 0 ] || set -- oldest 5.17.0 newest
folder=${W2A4_DOORS:-}
if [ -z "$folder" ]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
fi
mkdir -p "$folder"
export W2A4_DOORS_CHECKPOINTS=$folder/checkpoints OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
rm -rf "$W2A4_DOORS_CHECKPOINTS"

overlays=()
for version in "$@"; do
  overlay=$("$python" tools/transformers_overlay.py "$version" "$folder")
  overlays+=("$overlay")
  PYTHONPATH=$overlay:tests "$python" tests/support/version_checkpoints.py "$W2A4_DOORS_CHECKPOINTS"
done
mapfile -t tests < <(grep -l 'mark\.doors' tests/*/test_*.py)  # to collect all takes longer than these run
status=0
for overlay in "${overlays[@]}"; do
  PYTHONPATH=$overlay "$python" -c 'import transformers; print("transformers", transformers.__version__)'
  these=("${tests[@]}")
  if [ -z "$overlay" ] && [ "${W2A4_SUITE_PASSED:-}" = 1 ]; then
    these=(tests/models/test_versions.py)
  fi
  PYTHONPATH=$overlay "$python" -m pytest -q -n 2 -m "doors and not gpu" -p no:cacheprovider "${these[@]}" || status=1
done
exit "$status"
