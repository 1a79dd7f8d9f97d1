#!/usr/bin/env bash
# Rehearses `benchmarks.gpu_run` without a GPU, on something like the bare machine that it is for: a fresh virtual
# environment with a CUDA build of torch 2.11, triton 3.6 and transformers 5.17, no gguf and no w2a4, and a clean
# copy of the committed tree without build outputs. What travels is made by this machine's own Python.
#
#     tools/rehearse_gpu_run.sh WORK [PYTHON]
#
# WORK: an empty folder; the environment (6 GB) in it is used again. PYTHON: 3.11 or 3.12, default python3.12.
# The Python that packs is .venv-test's (README, "Test it"); nvcc must be on PATH.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mkdir -p "$1" && cd "$1" && pwd)
python=${2:-python3.12}
packer=${PACKER:-$root/.venv-test/bin/python}

if [ ! -x "$work/bare/bin/python" ]; then
  "$python" -m venv "$work/bare"
  "$work/bare/bin/pip" install --quiet torch==2.11.0 triton==3.6.0 transformers==5.17.0 accelerate safetensors numpy \
    tqdm pyyaml click tabulate pytest pytest-xdist pytest-timeout pytest-benchmark hypothesis setuptools wheel
fi
bare=$work/bare/bin/python
"$bare" -P - <<'PY'
import importlib.util, sys
import torch, transformers, triton
print("bare:", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__, "transformers",
      transformers.__version__, "CUDA", torch.cuda.is_available())
there = [name for name in ("w2a4", "gguf") if importlib.util.find_spec(name)]
assert not there, f"{there} must not be there"
PY

rm -rf "$work/tree" "$work"/out* "$work/carried"
mkdir "$work/tree"
git -C "$root" archive HEAD | tar -x -C "$work/tree"

echo "== pack"
cd "$root"
"$packer" -m benchmarks.gpu_run pack --out "$work/carried"
du -sh "$work/carried"
# Sources that cannot be written to, as far as that holds for this user.
chmod -R a-w "$work/tree"
cd "$work/tree"

echo "== run"
"$bare" -m benchmarks.gpu_run run --device cpu --carry "$work/carried" --out "$work/out"

echo "== run, killed in the middle of a stage"
"$bare" -m benchmarks.gpu_run run --device cpu --carry "$work/carried" --out "$work/out-killed" &
victim=$!
for _ in $(seq 600); do
  grep -q '"stage": "engine", "event": "begin"' "$work/out-killed/results.jsonl" 2>/dev/null && break
  sleep 0.5
done
kill -9 "$victim"
pkill -9 -f "gpu_run shared .*$work/out-killed" || true
wait "$victim" 2>/dev/null || true
"$bare" -P - "$work/out-killed/results.jsonl" <<'PY'
import json, sys
lines = [json.loads(line) for line in open(sys.argv[1])]
ended = {line["stage"]: line["status"] for line in lines if "status" in line}
assert ended.get("gemv") == "ok" and "engine" not in ended, ended
print(f"{len(lines)} whole lines are left; ended: {ended}")
PY

echo "== again"
sed -i '0,/"outcome": "passed"/s//"outcome": "failed"/' "$work/out/results.jsonl"
"$bare" -m benchmarks.gpu_run again --device cpu --carry "$work/carried" --out "$work/out-again" \
  --from "$work/out/results.jsonl" --tune 64x128 --timeline

echo "== train"
rm -rf "$work/parts" "$work/together"
chmod u+w "$work/tree"
cd "$root"
"$packer" -m benchmarks.gpu_run pack --out "$work/parts" --train "$work/carried/model" \
  --text "$work/carried/train.txt" --held-out "$work/carried/held_out.txt" --tokens 200000
mkdir "$work/together"
cp "$work"/parts/part*/* "$work/together/"
cd "$work/tree"
"$bare" -m benchmarks.gpu_run train --device cpu --carry "$work/together" --out "$work/out-train" --budget 3 --seqlen 256 \
  --set training.seqlen=128 --set training.batch_size=4 --set calib_samples=4 --set calib_seqlen=128
cd "$root"
"$packer" -m benchmarks.gpu_run restore "$work/carried/model" --from "$work/out-train" --out "$work/out-restored"
ls -la "$work/out" "$work/out-train" "$work/out-restored"
