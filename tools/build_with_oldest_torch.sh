#!/usr/bin/env bash
# Compiles the CPU extension against the headers of the oldest torch that is supported, which pip seldom installs.
# Nothing is installed: the wheel is downloaded (0.5 GB) and its headers are taken out.
#
#     tools/build_with_oldest_torch.sh [PYTHON]
#
# PYTHON has setuptools; default python3.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${1:-python3}")
oldest=$("$python" -c 'import sys; sys.path.insert(0, "build_backend"); import w2a4_build as b; print("%d.%d.0" % b.MINIMUM)')
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"$python" -m pip download --quiet --no-deps --only-binary=:all: -d "$folder" "torch==$oldest"
"$python" - "$folder" <<'PY'
import sys, zipfile
from pathlib import Path

folder = Path(sys.argv[1])
(wheel,) = folder.glob("torch-*.whl")
with zipfile.ZipFile(wheel) as archive:
    wanted = ("torch/include/", "torch/version.py", "torch/lib/libtorch_cpu.so")
    archive.extractall(folder, [name for name in archive.namelist() if name.startswith(wanted)])
wheel.unlink()
PY
# What is asked is whether the sources compile; without optimisation the answer comes in a third of the time.
printf '#!/bin/sh\nexec %s "$@" -O0\n' "${CXX:-c++}" >"$folder/unoptimized"
chmod +x "$folder/unoptimized"
CXX=$folder/unoptimized W2A4_TORCH=$folder W2A4_BUILD_CUDA=0 "$python" setup.py --quiet build_ext \
  --build-lib "$folder/lib" --build-temp "$folder/temp" >"$folder/log" 2>&1 || { tail -20 "$folder/log"; exit 1; }
ls "$folder/lib/w2a4"/_C*.so >/dev/null
echo "w2a4._C builds against torch $oldest"
